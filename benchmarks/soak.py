"""Whether a run loses anything when it is killed again and again: two ranks of a tiny model, beside the same run left in peace.

    python benchmarks/soak.py [--kills 50] [--seed 0] [--steps 500] [--folder FOLDER]

Each start is killed once: by SIGKILL to torchrun and all that came of it, by SIGTERM to one rank, or by a file STOP. One in
five falls into the start of the processes, the others soon after steps that are spread over the run at random; saves are
asynchronous in half of the starts. It ends with one line, and with exit code 1 if a loss, a validation or a weight at the end
differs in a bit, a step is missing or doubled, a checkpoint names other samples than its step has used, a run that was asked to
leave has not saved its last step, or a process is left behind.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 7
LIMIT_S = 600  # of any wait: a busy machine takes its time, a hang is an error


class Lost(Exception):
    """What the soak is there to find."""


class Start:
    """One start of the run under torchrun; all starts write into one log."""

    def __init__(self, folder: Path, steps: int, *settings: str):
        self.folder, self.log = folder, folder.with_suffix(".log")
        train = [str(ROOT / "train.py"), "--job.config_file", str(ROOT / "train_configs/debug.toml")]
        train += ["--job.dump_folder", str(folder), "--training.steps", str(steps), "--validation.freq", "50"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with self.log.open("a") as out:
            self._offset = out.tell()
            words = [*torchrun, *train, "--checkpoint.interval", str(INTERVAL), *settings]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)

    def told(self) -> int:
        """The last step that this start has done; 0 before its first."""
        with self.log.open() as lines:
            lines.seek(self._offset)
            return max(map(int, re.findall(r"^step +(\d+)/.* tokens/s", lines.read(), re.M)), default=0)

    def wait_for(self, step: int) -> bool:
        """Whether it got there; it may have ended."""
        deadline = time.monotonic() + LIMIT_S
        while self.told() < step:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Lost(f"step {step} was not done within {LIMIT_S} s")
            time.sleep(0.02)
        return True

    def kill(self, kind: str, draw: random.Random) -> int:
        """The exit code after a kill of this kind; no process is left."""
        tree = tree_of(self.process.pid)
        if kind == "SIGKILL":
            for each in tree:
                end(each, signal.SIGKILL)
        elif kind == "SIGTERM":
            end(draw.choice([each for each in tree[1:] if is_rank(each)] or tree[:1]), signal.SIGTERM)
        else:
            self.folder.mkdir(exist_ok=True)
            (self.folder / "STOP").touch()
        return self.end(tree)

    def end(self, tree: list[int]) -> int:
        try:
            code = self.process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Lost(f"the run did not end within {LIMIT_S} s") from None
        deadline = time.monotonic() + 30  # children of a killed parent are buried by another
        while left := [each for each in tree if is_rank(each)]:
            if time.monotonic() > deadline:
                raise Lost(f"processes are left: {left}")
            time.sleep(0.02)
        return code


def tree_of(process: int) -> list[int]:
    """A process and all that came of it. torchrun gives each rank a session of its own, so a process group would not do."""
    pairs = subprocess.run(["ps", "-A", "-o", "pid=", "-o", "ppid="], capture_output=True, text=True, check=True).stdout
    tree = [process]
    for parent in tree:
        tree += [int(child) for child, of in map(str.split, pairs.splitlines()) if int(of) == parent]
    return tree


def end(process: int, number: int):
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass  # it has just ended by itself


def is_rank(process: int) -> bool:
    """Whether a living process is one of train.py."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(ROOT / "train.py").encode() in words and b"torch.distributed.run" not in words


def newest(folder: Path) -> int:
    """The step of the newest committed checkpoint, whose samples are counted."""
    steps = [int(path.parent.name[5:]) for path in folder.glob("checkpoint/step-????????/manifest.json")]
    for step in steps:
        state = json.loads((folder / f"checkpoint/step-{step:08d}/train_state.json").read_text())
        if (state["step"], state["next_sample"]) != (step, step * state["global_batch_size"]):
            raise Lost(f"the checkpoint of step {step} goes on at step {state['step']}, sample {state['next_sample']}")
    return max(steps, default=0)


def curve(folder: Path) -> dict[tuple[str, int], dict]:
    """What metrics.jsonl knows of each step and validation, but for the clock and the machine."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        key = entry.pop("kind"), entry.pop("step")
        names = {"train": ("loss", "grad_norm", "lr", "tokens", "skipped")}.get(
            key[0], [name for name in entry if name != "seconds"]
        )
        if key in found and key[0] != "start":
            raise Lost(f"{key[0]} {key[1]} is there twice")
        found[key] = {name: entry[name] for name in names}
    return {key: entry for key, entry in found.items() if key[0] != "start"}


def compare(folder: Path, straight: Path, steps: int) -> int:
    """How many losses are equal: all, or it is Lost."""
    ours, theirs = curve(folder), curve(straight)
    if different := [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]:
        kind, step = key = min(different, key=lambda key: key[1])
        raise Lost(f"{len(different)} lines differ, first {kind} {step}: {ours.get(key)} instead of {theirs.get(key)}")
    last = f"checkpoint/step-{steps:08d}"
    words = [sys.executable, "-m", "torchtitan_bio.checkpoint", "diff", "--values", str(folder / last), str(straight / last)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    hashes = [json.loads((each / last / "manifest.json").read_text()) for each in (folder, straight)]
    shards = [{name: file["sha256"] for name, file in each["files"].items() if name.endswith(".distcp")} for each in hashes]
    if shards[0] != shards[1]:
        raise Lost(f"weights or moments differ at the end:\n{result.stdout}{result.stderr}")
    return sum(kind == "train" for kind, _ in ours)


def soak(folder: Path, kills: int, seed: int, steps: int) -> str:
    draw = random.Random(seed)
    began = time.monotonic()
    peaceful = Start(folder / "straight", steps)
    peaceful.wait_for(1)
    start_s = time.monotonic() - began
    if peaceful.end([peaceful.process.pid]):
        raise Lost("the run that nobody kills has failed")

    run, counts, repeated = folder / "killed", {"SIGKILL": 0, "SIGTERM": 0, "STOP": 0}, 0
    targets = sorted(draw.sample(range(1, steps), kills))
    for number, target in enumerate(targets, start=1):
        begins = newest(run)
        start = Start(run, steps, "--checkpoint.async_mode", draw.choice(["disabled", "async"]))
        kind = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "STOP"])
        if number % 5 == 0:
            # A SIGTERM to a rank that does not listen yet kills it alone, and torchrun takes half a minute to end the other.
            kind = "STOP" if kind == "STOP" else "SIGKILL"
            time.sleep(draw.uniform(0, start_s))
        elif not start.wait_for(max(target, begins + 1)) and newest(run) < steps:
            raise Lost(f"start {number} ended by itself, with {start.process.returncode}, before step {target}")
        else:
            time.sleep(draw.uniform(0, 0.15))
        code = start.kill(kind, draw)
        saved, done = newest(run), start.told()
        if saved < begins:
            raise Lost(f"the newest checkpoint was of step {begins} and is of step {saved}")
        if saved == steps:  # this one came too late, and there is nothing left to kill
            break
        counts[kind] += 1
        print(f"kill {number}: {kind} after step {done}, saved {saved}", flush=True)
        if kind == "SIGKILL":
            repeated += max(0, done - saved)
            continue
        left = json.loads((run / "exit.json").read_text())
        if code or left["reason"] != "preempted" or left["step"] not in (None, saved) or done > saved:
            raise Lost(f"after {kind} in step {done} and {code=}, saved step {saved}, exit.json says {left}")
    last = Start(run, steps)
    code = last.end([last.process.pid])
    if code or json.loads((run / "exit.json").read_text())["reason"] != "finished":
        raise Lost(f"the last start ended with {code}")
    equal = compare(run, folder / "straight", steps)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    minutes = (time.monotonic() - began) / 60
    return (
        f"{sum(counts.values())} kills survived ({kinds}), {repeated} steps repeated, {equal} of {steps} losses equal to the "
        f"last bit, and so are weights and moments ({minutes:.0f} minutes)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run again and again.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="many more than kills, or the run is done before the last one")
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(soak(folder, asked.kills, asked.seed, asked.steps))
        except Lost as error:
            print(f"LOST: {error}", file=sys.stderr)
            print("".join(path.read_text()[-3000:] for path in folder.glob("killed.log")), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
