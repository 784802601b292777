"""However a run ends, exit.json says how: what failed, where, on which rank, and whether a restart would only repeat it."""

import contextlib
import io
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from launches import SLOW_STEPS, await_step, launch, processes_of
from ranks import on_ranks
from whole_runs import before_step, exit_json, losses, saved_steps, train_main

SETTINGS = ["--training.steps", "4", "--validation.freq", "4"]


def outcome_of_main(rank, folder, arguments, bend, environment):
    """What a run raised, in words; "" where it ended well. And what it wrote to stderr."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        variables = (
            "SLURM_RESTART_COUNT",
            "TORCHELASTIC_RESTART_COUNT",
            "SLURM_JOB_ID",
            "SLURM_ARRAY_JOB_ID",
            "TRAIN_SH_LAUNCH",
        )
        for name in variables:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            train_main(rank, folder, [*SETTINGS, *arguments], bend)
        except BaseException as error:
            return f"{type(error).__name__}: {error}", err.getvalue()
    return "", err.getvalue()


def start(folder, bend=None, *arguments, **environment):
    return on_ranks(1, outcome_of_main, folder, arguments, bend, environment)[0]


def fail_at_call(patch, target, name, call, error):
    """The call of this number to target.name fails, counted from 1."""
    calls, original = [], getattr(target, name)

    def sometimes(*settings, **names):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(*settings, **names)

    patch.setattr(target, name, sometimes)


def break_at(phase, patch, rank):
    import torch

    from torchtitan_bio import checkpoint
    from torchtitan_bio.data import spikes
    from torchtitan_bio.models import llama3

    target, name, call = {
        "reading the data": (spikes, "build", 1),
        "validation": (llama3.Model, "logits", 1),
        "data": (spikes.Spikes, "sample", 9),  # four of them a step
        "forward": (llama3.Model, "forward", 9),
        "backward": (torch.Tensor, "backward", 9),
        "optimizer": (torch.nn.utils, "clip_grad_norm_", 3),
        "save": (checkpoint.Checkpointer, "save", 1),
    }[phase]
    fail_at_call(patch, target, name, call, OSError(f"broken {phase} at {hex(id(patch))}"))


STEP_OF = {"reading the data": None, "validation": 0, "save": 2, "data": 3, "forward": 3, "backward": 3, "optimizer": 3}


@pytest.mark.parametrize("phase", STEP_OF)
def test_a_failure_is_recorded_and_told_with_its_rank_step_and_phase(phase, tmp_path):
    validates = str(phase == "validation").lower()
    raised, err = start(
        tmp_path / "run", partial(break_at, phase), "--checkpoint.interval=2", f"--validation.enable={validates}"
    )
    record, step = exit_json(tmp_path / "run"), STEP_OF[phase]
    assert (record["reason"], record["rank"], record["step"], record["phase"]) == ("failed", 0, step, phase)
    assert raised.split("\n")[0] == record["error"] and f"broken {phase}" in record["error"] and "crash_loop" not in record
    place = "before the first step" if step is None else f"step {step}"
    assert f"rank 0 failed in {place}, {phase}: {record['error']}" in err
    if phase == "data":
        assert re.search(r"reading sample 8 \(\S*A2929.*\) failed", record["error"])  # the row
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"exit.json", "metrics.jsonl", "config.toml", "checkpoint"}


ANEW = ("--validation.enable=false", "--checkpoint.enable=false")  # each start begins at step 0


def test_the_same_failure_at_the_same_step_twice_is_a_crash_loop_that_only_a_person_starts_again(tmp_path):
    start(tmp_path, partial(break_at, "forward"), *ANEW)
    start(tmp_path, partial(break_at, "backward"), *ANEW, SLURM_RESTART_COUNT="1")
    assert "crash_loop" not in exit_json(tmp_path), "another error is no loop"
    start(tmp_path, partial(break_at, "backward"), *ANEW, SLURM_ARRAY_JOB_ID="77", SLURM_JOB_ID="79", SLURM_RESTART_COUNT="2")
    record = exit_json(tmp_path)
    assert (record["crash_loop"], record["attempt"], record["step"], record["job"]) == (True, 3, 3, "77")

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    next_of_the_array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_JOB_ID": "80"}
    for machine in ({"SLURM_RESTART_COUNT": "3"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, next_of_the_array):
        raised, _ = start(tmp_path, None, *ANEW, **machine)
        assert raised.startswith("ConfigError: ") and "twice in a row at step 3" in raised and "start it by hand" in raised
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    leave_old_stop(tmp_path)  # what was meant for that array
    anew = {"SLURM_ARRAY_JOB_ID": "90", "SLURM_JOB_ID": "90", "TRAIN_SH_LAUNCH": f"{int(time.time())}.90.7"}
    assert start(tmp_path, None, *ANEW, **anew) == ("", "")
    record = exit_json(tmp_path)
    assert (record["reason"], record["attempt"], record["job"], record["steps_here"]) == ("finished", 1, "90", 4)
    assert record["launch"] == anew["TRAIN_SH_LAUNCH"]


def leave_old_stop(folder):
    (folder / "STOP").touch()
    os.utime(folder / "STOP", (10**9, 10**9))


def test_only_a_STOP_from_before_train_sh_began_is_removed(tmp_path, monkeypatch):
    from torchtitan_bio import attempt

    leave_old_stop(tmp_path)
    monkeypatch.delenv("TRAIN_SH_LAUNCH", raising=False)
    attempt.remove_old_stop(tmp_path)  # no SLURM job: whoever starts the run can see the file
    assert (tmp_path / "STOP").exists()
    monkeypatch.setenv("TRAIN_SH_LAUNCH", f"{10**9}.123.7")
    attempt.remove_old_stop(tmp_path)
    assert (tmp_path / "STOP").exists()
    monkeypatch.setenv("TRAIN_SH_LAUNCH", f"{10**9 + 1}.123.7")
    attempt.remove_old_stop(tmp_path)
    attempt.remove_old_stop(tmp_path)
    assert not (tmp_path / "STOP").exists()


def test_a_kill_between_two_equal_failures_does_not_hide_the_loop(tmp_path):
    start(tmp_path, partial(break_at, "data"), *ANEW)
    failure = exit_json(tmp_path)
    start(tmp_path, look_at_exit_json, *ANEW)
    reads_data, running = (json.loads((tmp_path / name).read_text()) for name in ("while-it-reads.json", "seen.json"))
    assert reads_data == running | {"step": None}  # killed there, it would not look like the start before
    assert running["reason"] == "running" and running["previous"] == failure and running["step"] == 0
    (tmp_path / "exit.json").write_text(json.dumps(running))  # what SIGKILL leaves
    start(tmp_path, partial(break_at, "data"), *ANEW)
    assert exit_json(tmp_path)["crash_loop"] is True


def look_at_exit_json(patch, rank):
    from torchtitan_bio import attempt

    runs = attempt.Attempt.runs

    def runs_and_looks(this, step):
        (this.folder / "while-it-reads.json").write_bytes((this.folder / "exit.json").read_bytes())
        runs(this, step)
        (this.folder / "seen.json").write_bytes((this.folder / "exit.json").read_bytes())

    patch.setattr(attempt.Attempt, "runs", runs_and_looks)


def interrupt(patch, rank):
    before_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_an_interrupted_run_says_so_and_gives_the_folder_back(tmp_path):
    raised, _ = start(tmp_path, interrupt, *ANEW)
    assert raised.startswith("KeyboardInterrupt")
    assert (exit_json(tmp_path)["reason"], exit_json(tmp_path)["step"]) == ("interrupted", 2)
    assert not (tmp_path / "lock").exists() and not (tmp_path / "stacks").exists()


def test_a_run_folder_that_another_run_holds_is_refused_and_left_as_it_is(tmp_path):
    lock = {"host": "login-7", "pid": 4242, "job": "99", "restarts": 0, "since": "2026-01-02 03:04:05", "token": "t"}
    (tmp_path / "lock").write_text(json.dumps(lock))
    leave_old_stop(tmp_path)  # job 99 is to find it
    raised, _ = start(tmp_path, TRAIN_SH_LAUNCH=f"{int(time.time())}.100.7")
    assert raised.startswith("ConfigError: ") and "in use by process 4242 on login-7, job 99" in raised
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "STOP"}
    assert json.loads((tmp_path / "lock").read_text()) == lock


def test_data_of_fewer_windows_than_ranks_is_refused_with_both_numbers(tmp_path):
    settings = ["--training.seq_len=800000", "--job.must_fit=false", "--validation.enable=false"]
    for raised, _ in on_ranks(2, outcome_of_main, tmp_path / "run", settings, None, {}):
        assert "has 1 training windows" in raised and "for 2 ranks" in raised
    assert not (tmp_path / "run").exists()


def break_reading_on_rank_1(patch, rank):
    from torchtitan_bio import attempt
    from torchtitan_bio.data import spikes

    if rank == 1:
        fail_at_call(patch, spikes, "build", 1, OSError("the disk of rank 1"))
    record, write = attempt.Attempt._record, attempt.Attempt._write

    def record_late(this, *settings, **names):
        time.sleep(0.1 * rank)
        record(this, *settings, **names)

    def write_slowly(this, reason, *settings, **names):
        time.sleep(0.3 if reason == "failed" and rank == 0 else 0)  # so that it would come after what rank 1 writes
        write(this, reason, *settings, **names)

    patch.setattr(attempt.Attempt, "_record", record_late)
    patch.setattr(attempt.Attempt, "_write", write_slowly)


def hide_data_from_rank_1(patch, rank):
    from torchtitan_bio.data import spikes

    build = spikes.build
    if rank == 1:
        patch.setattr(spikes, "build", lambda **settings: build(**settings | {"source": "nowhere.arrow"}))


def test_a_failure_of_one_rank_before_training_is_that_ranks_every_time_and_a_refusal_puts_back_what_was_there(tmp_path):
    (tmp_path / "exit.json").write_text('{"reason": "finished"}')
    (first, _), (second, _) = on_ranks(2, outcome_of_main, tmp_path, [], hide_data_from_rank_1, {})
    assert first.startswith("ConfigError: reading the data failed on rank 1: ") and "nowhere.arrow" in first
    assert second.startswith("ConfigError: ") and "nowhere.arrow" in second
    assert exit_json(tmp_path) == {"reason": "finished"}
    for is_loop in (False, True):
        (first, _), (second, _) = on_ranks(2, outcome_of_main, tmp_path, [], break_reading_on_rank_1, {})
        assert first == "FailedElsewhere: reading the data failed on rank 1: the disk of rank 1"
        assert second == "OSError: the disk of rank 1"
        record = exit_json(tmp_path)
        assert (record["reason"], record["rank"], record["phase"]) == ("failed", 1, "reading the data")
        assert "noticed" not in record and record.get("crash_loop", False) is is_loop


def lose_the_lock(patch, rank):
    from torchtitan_bio import checkpoint

    save = checkpoint.Checkpointer.save

    def save_and_lose(checkpoints, step, *settings, **names):
        save(checkpoints, step, *settings, **names)
        (checkpoints.folder.parent / "lock").write_text("{}")

    patch.setattr(checkpoint.Checkpointer, "save", save_and_lose)


def test_a_run_whose_folder_was_taken_over_saves_nothing_more(tmp_path):
    raised, _ = start(tmp_path, lose_the_lock, "--validation.enable=false", "--checkpoint.interval=2")
    assert "lock was taken over" in raised and saved_steps(tmp_path) == [2] and (tmp_path / "lock").exists()


# ---- which of several ranks is to blame ----


def blame(rank, folder, order):
    """What ranks of one start say that fail in this order; with nothing to wait for, because they are one process."""
    from torchtitan_bio import attempt, distributed
    from torchtitan_bio.config import ConfigError

    errors = {
        "own": OSError("disk"),
        "gloo": RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:35465"),
        "interrupt": KeyboardInterrupt(),
        "refused": ConfigError("no such file"),
        "elsewhere": distributed.FailedElsewhere("saving failed on rank 3: disk"),
    }
    ranks = []
    for number in range(len(order)):
        world = SimpleNamespace(rank=number)
        ranks.append(attempt.Attempt(folder, world, started="now", is_new=False, last_failure=None, lock=None, limit_s=60))
        ranks[-1].watch.enter("forward", 5)
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempt, "GRACE_S", 0)
        for each, name in sorted(zip(ranks, order, strict=True), key=lambda pair: pair[1] == "refused"):
            each.__exit__(type(errors[name]), errors[name], None)
    return err.getvalue()


@pytest.mark.parametrize(
    ("order", "blamed"),
    [(["own", "gloo"], 0), (["gloo", "own"], 1), (["gloo", "elsewhere", "own", "own"], 2), (["elsewhere", "gloo"], 0)],
)
def test_a_ranks_own_error_comes_before_what_others_noticed_of_it(order, blamed, tmp_path):
    (err,) = on_ranks(1, blame, tmp_path, order)
    record = exit_json(tmp_path)
    assert (record["rank"], record.get("noticed", False)) == (blamed, order[blamed] != "own")
    for rank, name in enumerate(order):
        verb = "failed in" if name == "own" else "was in"
        assert re.search(rf"^rank {rank} {verb} step 5, forward", err, re.M)


def fail_without_space(rank, folder):
    def full(path, content):
        path.touch()
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        return blame(rank, folder, ["own"])


def test_a_full_disk_keeps_the_exit_json_there_is_and_leaves_no_half_of_another(tmp_path):
    (tmp_path / "exit.json").write_text('{"reason": "running"}')
    (err,) = on_ranks(1, fail_without_space, tmp_path)
    assert "rank 0 could not write exit.json: No space left" in err and "rank 0 failed in step 5, forward: OSError: disk" in err
    assert exit_json(tmp_path) == {"reason": "running"} and not list(tmp_path.glob("exit.json.*"))


def test_what_other_ranks_notice_of_an_interruption_does_not_make_a_failure_of_it(tmp_path):
    on_ranks(1, blame, tmp_path, ["interrupt", "gloo", "elsewhere"])
    assert (exit_json(tmp_path)["reason"], exit_json(tmp_path)["step"]) == ("interrupted", 5)


def test_a_rank_0_that_is_refused_leaves_the_failure_that_another_rank_has_told_in_the_meantime(tmp_path):
    on_ranks(1, blame, tmp_path, ["refused", "own"])
    assert (exit_json(tmp_path)["reason"], exit_json(tmp_path)["rank"]) == ("failed", 1)


# ---- as a user starts it ----


def test_sigterm_ends_a_process_with_0_and_a_checkpoint_of_its_step(tmp_path):
    process = launch(tmp_path, SLOW_STEPS, ranks=1)
    await_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    record = exit_json(tmp_path / "run")
    assert process.returncode == 0 and err == "" and "stopped by SIGTERM" in out
    assert (record["reason"], record["why"]) == ("preempted", "SIGTERM")
    assert saved_steps(tmp_path / "run") == [record["step"]] == [len(losses(tmp_path / "run"))]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks_though_it_reaches_data_workers_too(tmp_path):
    process = launch(tmp_path, SLOW_STEPS, "--data.num_workers", "1")
    await_step(tmp_path / "run", 3, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    record = exit_json(tmp_path / "run")
    assert (record["reason"], record["why"]) == ("preempted", "SIGTERM"), err
    assert saved_steps(tmp_path / "run") == [record["step"]] == [len(losses(tmp_path / "run"))]
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_at_once_and_they_name_their_step_and_phase(tmp_path):
    code = """
step = train.train_step
def deadly_step(*settings):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        open(sys.argv[0] + ".died", "w").write(str(time.time()))
        os._exit(9)
    return step(*settings)
train.train_step = deadly_step
"""
    process = launch(tmp_path, code)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "script.py.died").read_text()) < 20
    assert re.search(r"^rank 0 was in step 3, \w+ when another rank failed, went away or fell silent: ", err, re.M), err
    record = exit_json(tmp_path / "run")
    assert (record["reason"], record["rank"], record["step"], record["noticed"]) == ("failed", 0, 3, True)
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_data_ends_the_job_within_the_limit_and_its_stacks_say_where(tmp_path):
    code = """
from torchtitan_bio.data import spikes
sample = spikes.Spikes.sample
def stuck_sample(self, i):
    calls.append(None)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        open(sys.argv[0] + ".stuck", "w").write(str(time.time()))
        time.sleep(300)
    return sample(self, i)
spikes.Spikes.sample = stuck_sample
"""
    process = launch(tmp_path, code, "--comm.train_timeout_seconds", "5")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "script.py.stuck").read_text()) < 5 + 20
    assert re.search(r"rank 1: no progress for 5 s or more in step 3, data, reading sample 10 \(\S*A2929.*\); the stacks", err)
    record = exit_json(tmp_path / "run")
    assert (record["reason"], record["rank"], record["step"], record["phase"]) == ("failed", 1, 3, "data")
    (stacks,) = (tmp_path / "run" / "stacks").iterdir()
    assert stacks.read_text().startswith("rank 1, step 3, data ") and "stuck_sample" in stacks.read_text()
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_restarts_by_torchrun_go_on_from_a_checkpoint_and_a_crash_loop_ends_them(tmp_path):
    code = """
step = train.train_step
def broken_step(*settings):
    calls.append(None)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if len(calls) == (4 if restarts == 0 else 2) and os.environ["RANK"] == "1":
        raise OSError("the disk of rank 1")
    return step(*settings)
train.train_step = broken_step
"""
    process = launch(tmp_path, code, interval=2, launcher=["--max-restarts", "2"])
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    record = exit_json(tmp_path / "run")
    # Fails in step 4, then goes on from step 2 and fails in step 4 again: the third start is refused.
    assert (record["reason"], record["rank"], record["step"], record["attempt"]) == ("failed", 1, 4, 2), err
    assert record["crash_loop"] is True and record["error"] == "OSError: the disk of rank 1"
    assert len(re.findall("rank 1 failed in step 4", err)) == 2 and "twice in a row at step 4" in err
    assert processes_of(tmp_path) == []
