"""Runs as a user starts them: processes of their own, by python or torchrun, on the debug TOML."""

import os
import subprocess
import sys
import time
from pathlib import Path

from whole_runs import TOML

ROOT = Path(__file__).parents[1]
BENT = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from torchtitan_bio import config_loader, exits

calls = []
{code}
if __name__ == "__main__":
    sys.exit(exits.run(lambda: train.main(config_loader.load(sys.argv[1:]))))
"""
SLOW_STEPS = """
step = train.train_step
def slow_step(*settings):
    time.sleep(0.05)
    return step(*settings)
train.train_step = slow_step
"""


def environment():
    """That of this process, but for what makes a rank of it."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}


def command(folder, *arguments, ranks=1, script=ROOT / "train.py", launcher=()):
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    return [*words, str(script), "--job.config_file", TOML, "--job.dump_folder", str(folder), *arguments]


def run(folder, *arguments, ranks=1):
    words = command(folder, *arguments, ranks=ranks)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)


def launch(folder, code, *arguments, ranks=2, interval=1000, launcher=()):
    """A run in folder/run of 200 steps, of a script that bends train.py before it starts it: its process, not awaited."""
    script = folder / "script.py"
    script.write_text(BENT.format(root=str(ROOT), code=code))
    settings = ["--validation.enable", "false", "--training.steps", "200", "--checkpoint.interval", str(interval)]
    words = command(folder / "run", *settings, *arguments, ranks=ranks, script=script, launcher=launcher)
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_step(run_folder, step, process):
    """Until metrics.jsonl holds it."""
    path, deadline = run_folder / "metrics.jsonl", time.monotonic() + 200
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended too early"
        time.sleep(0.02)


def processes_of(folder) -> list[str]:
    """Those that are left of launch()."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(folder / "script.py") in line]
