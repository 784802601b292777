"""Stand-ins for sbatch, srun, scontrol and train.py, and a cluster of one machine made of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs a copy of the script, again each time that scontrol has requeued it, six times at most, with all its output in one file.
SBATCH = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
cp "$1" "$CLUSTER/slurm_script"
shift
export SLURM_JOB_ID=${SLURM_JOB_ID:-123} SLURM_SUBMIT_DIR=$PWD
while true; do
    rm -f "$CLUSTER/pending"
    bash "$CLUSTER/slurm_script" "$@" >>"$CLUSTER/log" 2>&1 &
    echo $! >"$CLUSTER/script.pid"
    wait $! && code=0 || code=$?
    echo $code >>"$CLUSTER/codes"
    if [[ ! -f $CLUSTER/pending || ${SLURM_RESTART_COUNT:-0} == 6 ]]; then exit; fi
    export SLURM_RESTART_COUNT=$((${SLURM_RESTART_COUNT:-0} + 1))
done
"""
# So many tasks as are asked for, each with its numbers; all on this machine.
SRUN = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in
        --ntasks=*) ntasks=${1#*=} ;;
        --ntasks-per-node=*) each=${1#*=} ;;
    esac
    shift
done
code=0
for ((i = 0; i < ntasks; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$((i % each)) SLURM_CPUS_PER_TASK=7 "$@" & done
for ((i = 0; i < ntasks; i++)); do wait -n || code=$?; done
exit $code
"""
# A requeue ends the script that asks for it, as Slurm does.
SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "JobId=$3 JobState=${STATE:-RUNNING} Reason=None" ;;
    "requeue "*)
        echo "$2" >>"$CLUSTER/requeued"
        if [[ -n ${REFUSED:-} ]]; then echo "Requested operation is presently disabled" >&2; exit 1; fi
        touch "$CLUSTER/pending"
        kill -TERM $PPID ;;
esac
"""
# Does in each attempt what PLAN says: take the folder or not, wait for STOP, linger, leave an exit.json, exit with a code. As
# train.py it marks its exit.json and drops an older STOP (tests/test_attempt.py).
TRAINER = r"""
import json, os, socket, sys, time
from pathlib import Path

folder = Path(os.environ["CLUSTER"], "run folder")
folder.mkdir(exist_ok=True)
plan = json.loads(os.environ["PLAN"])[int(os.environ.get("SLURM_RESTART_COUNT", 0))]
stop, launch = folder / "STOP", os.environ["TRAIN_SH_LAUNCH"]


def record(told):
    (folder / "exit.json.new").write_text(json.dumps(told | {"launch": launch}, indent=1))
    (folder / "exit.json.new").rename(folder / "exit.json")


(folder / "arrived").touch()
if os.environ.get("RANK", "0") == "0" and plan.get("takes", True):
    time.sleep(plan.get("takes_after", 0))
    if stop.exists() and stop.stat().st_mtime < int(launch.partition(".")[0]):
        stop.unlink()
    record({"reason": "running"})
seen = {name: os.environ.get(name) for name in plan.get("tell", [])} | {"STOP": stop.exists()}
(folder / f"started-{os.environ.get('RANK', 0)}").write_text(json.dumps(seen))
if plan.get("waits"):
    deadline = time.monotonic() + 20
    while not stop.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (folder / "saving").touch()
time.sleep(plan.get("lingers", 0))
if plan.get("leaves_a_rank"):
    holder = {"host": socket.gethostname(), "pid": os.getpid()}
    (folder / "lock").write_text(json.dumps(holder))
    if os.fork():
        os._exit(plan["code"])  # as a torchrun that was killed
    (folder / "lock").write_text(json.dumps(holder | {"pid": os.getpid()}))
    time.sleep(0.6)
if "exit.json" in plan:
    try:
        record(json.loads(plan["exit.json"]))
    except (ValueError, TypeError):
        (folder / "exit.json").write_text(plan["exit.json"])
(folder / "lock").unlink(missing_ok=True)
os._exit(plan["code"])
"""
PREFLIGHT = r"""
import os, time
from pathlib import Path

cluster = Path(os.environ["CLUSTER"])
(cluster / "checking").touch()
time.sleep(float(os.environ.get("CHECK_S", 0)))
print(cluster / "run folder")
raise SystemExit(int(os.environ.get("CHECK", 0)))
"""
PREEMPTED = {"exit.json": '{"reason": "preempted", "step": 5, "why": "STOP"}', "code": 1}  # torchrun's code is no better
FINISHED = {"exit.json": '{"reason": "finished", "step": 10}', "code": 0}
UNTIL_STOP = PREEMPTED | {"waits": True}
WITHOUT_A_STEP = PREEMPTED | {"exit.json": '{"reason": "preempted", "step": null, "steps_here": 0, "why": "STOP"}'}


def processes_of(job: subprocess.Popen) -> list[str]:
    """Those of its process group that still run; dead ones that nobody has asked after do not."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [arguments for group, state, arguments in lines if int(group) == job.pid and not state.startswith("Z")]


@dataclass(frozen=True)
class Cluster:
    """A checkout and a job of it: `sbatch` starts the job, `end` waits for its last attempt."""

    checkout: Path
    state: Path
    environment: dict
    jobs: list

    @property
    def run_folder(self) -> Path:
        return self.state / "run folder"

    @property
    def log(self) -> str:
        return (self.state / "log").read_text()

    @property
    def requeued(self) -> list[str]:
        told = self.state / "requeued"
        return told.read_text().split() if told.exists() else []

    def start(self, *command, cwd: Path | None = None, **env: str) -> subprocess.Popen:
        """In a process group of its own, so that it shows what is left of it."""
        job = subprocess.Popen(command, cwd=cwd or self.checkout, env=self.environment | env, start_new_session=True)
        self.jobs.append(job)
        return job

    def sbatch(self, *plan: dict, **env: str):
        self.start("sbatch", "--requeue", "train.sh", "x.toml", PLAN=json.dumps(plan), **env)

    def wait_for(self, path: Path, what: str = ""):
        deadline = time.monotonic() + 120
        while not (path.exists() and what in path.read_text()):
            assert time.monotonic() < deadline, f"{path} does not say {what!r}; the log: {self.log}"
            time.sleep(0.02)

    def signal(self, number: int):
        """To the batch script and nothing else, as --signal=B: has it."""
        os.kill(int((self.state / "script.pid").read_text()), number)

    def end(self) -> list[int]:
        """The exit code of each attempt; nothing of the job may still run."""
        self.jobs[-1].wait(timeout=400)
        assert processes_of(self.jobs[-1]) == []
        return [int(code) for code in (self.state / "codes").read_text().split()]


def a_cluster(tmp_path):
    """One, without a job; what it has started is ended afterwards."""
    checkout, state, programs = tmp_path / "the checkout", tmp_path / "state", tmp_path / "bin"
    for made in (checkout, state, programs):
        made.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "train.sh", checkout)
    (checkout / "train.py").write_text(TRAINER)
    (checkout / "preflight.py").write_text(PREFLIGHT)
    (state / "log").touch()
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "CLUSTER": str(state), "NPROC": "1"}
    cluster = Cluster(checkout, state, environment | {"PYTHON": sys.executable}, [])
    yield cluster
    for job in cluster.jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
