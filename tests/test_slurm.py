"""A SLURM job under train.sh saves when it is told to leave, is requeued, and goes on as if nothing had been.

sbatch, srun and scontrol are stand-ins that behave as Slurm's manual says. So is the trainer, without torch, but in slow tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cluster import (
    FINISHED,
    PREEMPTED,
    ROOT,
    TRAINER,
    UNTIL_STOP,
    WITHOUT_A_STEP,
    a_cluster,
    processes_of,
)
from torch.distributed.run import get_args_parser


@pytest.fixture
def cluster(tmp_path):
    yield from a_cluster(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_script_makes_STOP_and_the_job_is_requeued_once_and_finishes(cluster, number):
    cluster.sbatch(UNTIL_STOP, FINISHED)
    cluster.wait_for(cluster.run_folder / "started-0")
    cluster.signal(number)
    assert cluster.end() == [0, 0]
    assert cluster.requeued == ["123"]
    assert "train.sh: attempt 1 of job 123 on 1 node(s)\n" in cluster.log
    assert "train.sh: attempt 2 of job 123 on 1 node(s)\n" in cluster.log
    assert "preempted, step 5, why STOP; requeueing job 123" in cluster.log
    assert not (cluster.run_folder / "STOP").exists()


FAILED, CRASH_LOOP = '{"reason": "failed", "step": 5}', '{"reason": "failed", "step": 5, "crash_loop": true}'
RUNNING = '{"reason": "running", "attempt": 1, "previous": {"reason": "preempted"}}'


@pytest.mark.parametrize(
    "before, now, code",
    [
        (None, FAILED, 1),
        (FAILED, CRASH_LOOP, 1),
        (None, None, 137),
        (None, RUNNING, 1),
        (None, '{"reason": "preemp', 3),
        (None, "[]", 1),
        (PREEMPTED["exit.json"], None, 1),
        (FINISHED["exit.json"], None, 4),
    ],
    ids=["failed", "crash loop", "absent", "running", "cut short", "no object", "an earlier preempted", "an earlier finished"],
)
def test_a_job_that_was_not_preempted_is_not_requeued_and_its_exit_code_is_that_of_the_run(cluster, before, now, code):
    cluster.run_folder.mkdir()
    if before:
        (cluster.run_folder / "exit.json").write_text(before)
    cluster.sbatch({"code": code} | ({"exit.json": now} if now else {"takes": False}))
    assert cluster.end() == [code] and cluster.requeued == []
    assert "job 123 is not requeued" in cluster.log
    if not now:
        assert "exit.json: nothing of this start" in cluster.log


@pytest.mark.parametrize("earlier", [FAILED, FINISHED["exit.json"]], ids=["failed", "finished"])
def test_what_an_earlier_start_wrote_is_there_for_train_py_to_read_and_after_one_that_is_refused(cluster, earlier):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "exit.json").write_text(earlier)
    cluster.sbatch({"takes": False, "code": 2})
    cluster.end()
    assert (cluster.run_folder / "exit.json").read_text() == earlier


def test_a_mistake_in_the_config_ends_the_job_with_code_2_before_anything_starts(cluster):
    cluster.sbatch(FINISHED, CHECK="2")
    assert cluster.end() == [2] and cluster.requeued == [] and not cluster.run_folder.exists()


def test_a_finished_run_ends_well_whatever_code_the_launcher_makes_of_it_and_an_old_STOP_does_not_touch_it(cluster):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "STOP").touch()
    os.utime(cluster.run_folder / "STOP", (1, 1))
    cluster.sbatch(FINISHED | {"code": 1})
    assert cluster.end() == [0] and cluster.requeued == []
    assert json.loads((cluster.run_folder / "started-0").read_text()) == {"STOP": False}


def test_an_element_of_an_array_requeues_itself_and_not_the_array(cluster):
    array = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    cluster.sbatch(PREEMPTED, FINISHED, **array)
    assert cluster.end() == [0, 0] and cluster.requeued == ["77_3"]
    assert "attempt 2 of job 77_3" in cluster.log


def test_more_signals_while_the_run_saves_change_nothing(cluster):
    cluster.sbatch(UNTIL_STOP | {"lingers": 0.5}, FINISHED)
    cluster.wait_for(cluster.run_folder / "started-0")
    cluster.signal(signal.SIGUSR1)
    cluster.wait_for(cluster.run_folder / "saving")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        cluster.signal(number)
        time.sleep(0.05)
    assert cluster.end() == [0, 0] and cluster.requeued == ["123"]
    assert json.loads((cluster.run_folder / "started-0").read_text()) == {"STOP": False}


OF_ANOTHER_JOB = json.dumps({"reason": "running", "launch": "1.122.9"}, indent=1)


def test_a_signal_before_the_run_has_started_is_not_lost_and_reaches_it_once_it_has_the_folder(cluster):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "exit.json").write_text(OF_ANOTHER_JOB)
    cluster.sbatch(UNTIL_STOP | {"takes_after": 0.5}, FINISHED, CHECK_S="0.3")
    cluster.wait_for(cluster.state / "checking")
    cluster.signal(signal.SIGUSR1)
    cluster.wait_for(cluster.run_folder / "arrived")
    time.sleep(0.3)
    assert not (cluster.run_folder / "STOP").exists()  # the other run would have left
    assert cluster.end() == [0, 0] and cluster.requeued == ["123"]


def test_a_second_job_in_a_folder_is_refused_and_neither_it_nor_its_signals_touch_the_first_ones_STOP(cluster):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "exit.json").write_text(OF_ANOTHER_JOB)
    refused = {"takes": False, "lingers": 0.4, "code": 2}
    cluster.sbatch(refused, CHECK_S="0.2")
    for place in (cluster.state / "checking", cluster.run_folder / "arrived"):
        cluster.wait_for(place)
        cluster.signal(signal.SIGTERM)
    assert cluster.end() == [2] and cluster.requeued == []
    assert not (cluster.run_folder / "STOP").exists()
    (cluster.run_folder / "STOP").touch()  # for the first one, which has not looked yet
    os.utime(cluster.run_folder / "STOP", (1, 1))
    cluster.sbatch(refused | {"lingers": 0})
    assert cluster.end() == [2, 2] and (cluster.run_folder / "STOP").exists()
    assert (cluster.run_folder / "exit.json").read_text() == OF_ANOTHER_JOB


def test_ranks_that_save_when_torchrun_was_killed_are_waited_for(cluster):
    left = PREEMPTED["exit.json"].replace("STOP", "launcher gone")
    cluster.sbatch({"leaves_a_rank": True, "exit.json": left, "code": 137}, FINISHED)
    assert cluster.end() == [0, 0] and cluster.requeued == ["123"]
    assert "preempted, step 5, why launcher gone; requeueing job 123" in cluster.log


def test_a_lock_whose_process_is_gone_is_not_waited_for(cluster):
    dead = subprocess.Popen(["true"])
    dead.wait()
    cluster.run_folder.mkdir()
    (cluster.run_folder / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}))
    trainer = TRAINER.replace('(folder / "lock").unlink(missing_ok=True)', "")
    (cluster.checkout / "train.py").write_text(trainer)
    began = time.monotonic()
    cluster.sbatch({"code": 137})
    assert cluster.end() == [137] and time.monotonic() - began < 30
    assert "exit code 137, exit.json: running; job 123 is not requeued" in cluster.log


def test_three_starts_in_a_row_without_a_step_end_the_requeueing_and_the_remedy_is_told(cluster):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "idle_starts").write_text("99\n" * 5)  # of a job that was given up; this one was submitted anew
    with_steps = PREEMPTED | {"exit.json": '{"reason": "preempted", "step": 9, "steps_here": 4, "why": "STOP"}'}
    cluster.sbatch(WITHOUT_A_STEP, with_steps, *[WITHOUT_A_STEP] * 5)
    assert cluster.end() == [0, 0, 0, 0, 1] and cluster.requeued == ["123"] * 4
    assert "preempted, step 9, steps_here 4, why STOP; requeueing job 123" in cluster.log
    assert "steps_here 0, why STOP; job 123 is not requeued: three starts in a row" in cluster.log
    assert "longer --time" in cluster.log


@pytest.mark.parametrize("left", [WITHOUT_A_STEP, PREEMPTED], ids=["without a step", "with steps"])
def test_a_count_of_starts_that_cannot_be_written_is_told_and_the_job_goes_on(cluster, left):
    (cluster.run_folder / "idle_starts").mkdir(parents=True)  # neither `>>` nor `rm -f` can do anything with it
    cluster.sbatch(left, FINISHED)
    assert cluster.end() == [0, 0] and cluster.requeued == ["123"]
    assert "train.sh: warning: " in cluster.log and "idle_starts" in cluster.log


def test_the_legs_of_an_array_count_their_starts_without_a_step_together(cluster):
    cluster.run_folder.mkdir()
    (cluster.run_folder / "idle_starts").write_text("77\n" * 2)
    cluster.sbatch(WITHOUT_A_STEP, SLURM_JOB_ID="80", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3")
    assert cluster.end() == [1] and cluster.requeued == []


SLOW_TORCH = """
import os, time

open(os.environ["CLUSTER"] + "/counting", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "number, place",
    [
        (signal.SIGTERM, "checking"),
        (signal.SIGINT, "checking"),
        (signal.SIGHUP, "checking"),
        (signal.SIGUSR1, "checking"),
        (signal.SIGTERM, "counting"),
    ],
)
def test_a_signal_while_a_run_by_hand_is_prepared_ends_the_script_and_what_it_asks_at_once(cluster, number, place):
    (cluster.checkout / "torch.py").write_text(SLOW_TORCH)
    uncounted = {"NPROC": "", "PYTHONPATH": str(cluster.checkout)} if place == "counting" else {}
    script = cluster.start("bash", "train.sh", "x.toml", CHECK_S="60", **uncounted)
    cluster.wait_for(cluster.state / place)
    script.send_signal(number)
    assert script.wait(timeout=5) == -number
    deadline = time.monotonic() + 5
    while processes_of(script) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(script) == [] and not cluster.run_folder.exists()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_was_cancelled_is_not_brought_back(cluster, state):
    cluster.sbatch(PREEMPTED, STATE=state)
    assert cluster.end() == [0] and cluster.requeued == []
    assert "Slurm is ending job 123" in cluster.log


def test_a_cluster_that_does_not_requeue_is_told_and_the_job_ends_well(cluster):
    cluster.sbatch(UNTIL_STOP, REFUSED="yes")
    cluster.wait_for(cluster.run_folder / "started-0")
    cluster.signal(signal.SIGUSR1)
    assert cluster.end() == [0] and cluster.requeued == ["123"]
    assert "job 123 is not requeued" in cluster.log
    assert not (cluster.run_folder / "STOP").exists()  # a start by hand would find it


def test_ctrl_c_in_an_allocation_reaches_the_run(cluster):
    # Not at once: see train.sh on a run that ends at the moment of a signal.
    told_by_exits_py = "sys.excepthook = lambda *error: time.sleep(0.2) or os._exit(130)\n"
    (cluster.checkout / "train.py").write_text(TRAINER.replace("\nplan =", f"\n{told_by_exits_py}plan ="))
    job = cluster.start("bash", "train.sh", "x.toml", PLAN=json.dumps([UNTIL_STOP]), SLURM_JOB_ID="5")
    cluster.wait_for(cluster.run_folder / "started-0")
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    assert job.wait(timeout=20) == 130 and cluster.requeued == []


def test_srun_starts_each_process_itself_where_a_site_wants_a_gpu_a_task(cluster):
    told = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    plan = {"tell": told, "exit.json": FINISHED["exit.json"], "code": 0}
    cluster.sbatch(plan, TASKS_PER_NODE="2", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="x[1-2]", SLURM_JOB_ID="20123")
    assert cluster.end() == [0]
    seen = [json.loads((cluster.run_folder / f"started-{rank}").read_text()) for rank in range(4)]
    assert [[each[name] for name in told] for each in seen] == [
        [str(rank), str(rank % 2), "4", "2", "localhost", "10123", "7"] for rank in range(4)
    ]
    assert "2 node(s) with 2 process(es) each, which meet at localhost:10123" in cluster.log


WORKER = r"""
import os, signal, sys, time
from pathlib import Path

folder, rank = Path(os.environ["CLUSTER"]), os.environ["RANK"]


def save(number, frame):
    time.sleep(0.2)
    (folder / f"saved-{rank}").write_text(f"{number} {os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']}")
    sys.exit()


signal.signal(signal.SIGUSR1, save)
(folder / f"up-{rank}").touch()
time.sleep(120)
"""


@pytest.mark.slow  # torchrun imports torch
@pytest.mark.skipif("signals_to_handle" not in get_args_parser().format_help(), reason="this torchrun dies of SIGUSR1")
def test_a_sigusr1_to_torchrun_reaches_its_workers_and_leaves_none_behind(cluster):
    (cluster.checkout / "train.py").write_text(WORKER)
    job = cluster.start("bash", "train.sh", "x.toml", NPROC="2")
    for rank in range(2):
        cluster.wait_for(cluster.state / f"up-{rank}")
    job.send_signal(signal.SIGUSR1)  # train.sh has become torchrun
    job.wait(timeout=60)
    assert [(cluster.state / f"saved-{rank}").read_text() for rank in range(2)] == [f"{signal.SIGUSR1.value} 300"] * 2
    assert processes_of(job) == []


OF_THE_MACHINE = ("_per_s", "_per_s_per_device", "_s", "seconds", "_gib", "mfu", "hfu")


def curve(run_folder: Path) -> list[dict]:
    """What metrics.jsonl knows of each step and validation, but for the clock and the machine."""
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if not name.endswith(OF_THE_MACHINE)}
        for record in records
        if record["kind"] != "start"
    ]


def settings(run_folder: Path) -> list[str]:
    """A run that has checkpoints where it stops and at its end alone."""
    steps = ["--training.steps", "40", "--checkpoint.interval", "1000", "--validation.freq", "20"]
    return ["train_configs/debug.toml", "--job.dump_folder", str(run_folder), *steps]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    environment = os.environ | {"NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", "train.sh", *settings(folder)], cwd=ROOT, env=environment, check=True)
    return curve(folder)


@pytest.mark.slow  # two starts of the trainer on two ranks, and the first test's third
@pytest.mark.parametrize("launcher", [{"TASKS_PER_NODE": "2"}, {"NPROC": "2"}], ids=["srun", "torchrun"])
def test_a_real_run_that_is_told_to_leave_goes_on_to_the_last_bit_of_the_uninterrupted_one(cluster, uninterrupted, launcher):
    folder, one_node = cluster.state / "run", {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    alike = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = cluster.start("sbatch", str(ROOT / "train.sh"), *settings(folder), cwd=ROOT, **one_node, **launcher, **alike)
    cluster.wait_for(folder / "metrics.jsonl", '"step": 5,')
    cluster.signal(signal.SIGUSR1)
    assert cluster.end() == [0, 0], cluster.log
    assert cluster.requeued == ["123"] and job.returncode == 0
    assert "stopped by STOP" in cluster.log and "why STOP; requeueing job 123" in cluster.log
    assert "attempt 2 of job 123 on 1 node(s)" in cluster.log
    assert curve(folder) == uninterrupted
    told = json.loads((folder / "exit.json").read_text())
    assert (told["reason"], told["step"], told["attempt"]) == ("finished", 40, 2)
    saved = sorted(path.name for path in (folder / "checkpoint").glob("step-*"))
    assert len(saved) == 2 and 5 <= int(saved[0][5:]) < 40 and saved[1] == "step-00000040"
