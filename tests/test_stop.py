"""A run that is told to stop saves the step it has just done, on all ranks alike, and the same command goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launches import ROOT, command, environment
from ranks import on_ranks
from spike_files import table, write_arrow
from whole_runs import before_step, deaf_again, exit_json, lines, losses, saved_steps, train_main

from torchtitan_bio import distributed, stop

SETTINGS = ["--training.steps", "12", "--checkpoint.interval", "100", "--validation.freq", "6"]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """12 steps on 2 ranks without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    on_ranks(2, train_main, folder, SETTINGS)
    assert exit_json(folder)["reason"] == "finished" and exit_json(folder)["step"] == 12
    return folder


def assert_goes_on_as_if_never_stopped(folder, straight):
    done = exit_json(folder)["step"]
    printed, _ = on_ranks(2, train_main, folder, SETTINGS)
    assert losses(folder) == losses(straight)
    assert [entry["step"] for entry in lines(folder, "validation")] == [0, 6, 12]
    bits = [[entry["bits_per_spike"] for entry in lines(each, "validation")] for each in (folder, straight)]
    assert bits[0] == bits[1]
    assert exit_json(folder)["reason"] == "finished"
    assert exit_json(folder)["steps_here"] == 12 - done
    return printed


def signal_one_rank_and_again_during_the_save(patch, rank):
    from torchtitan_bio.checkpoint import commit

    write = commit.write

    def write_under_fire(*settings):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        return write(*settings)

    if rank == 1:
        before_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    patch.setattr(commit, "write", write_under_fire)


@pytest.mark.parametrize("asynchronous", ["disabled", pytest.param("async", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_makes_all_save_that_step_and_a_second_one_does_no_harm(tmp_path, straight, asynchronous):
    folder = tmp_path / "run"
    settings = [*SETTINGS, "--checkpoint.async_mode", asynchronous]
    printed, _ = on_ranks(2, train_main, folder, settings, signal_one_rank_and_again_during_the_save)
    left = exit_json(folder)
    assert (left["reason"], left["step"], left["why"], left["attempt"]) == ("preempted", 5, "SIGTERM", 1)
    assert "stopped by SIGTERM" in printed and left["steps_here"] == 5
    assert saved_steps(folder) == [5] and [path.name for path in (folder / "checkpoint").iterdir()] == ["step-00000005"]
    assert_goes_on_as_if_never_stopped(folder, straight)


FOLDER = "STOP_IS_PUT_INTO"


def touch_stop_while_step_6_is_scored(patch, rank):
    import train

    finite, calls = train.loader.finite, []

    def interrupted(*settings, **names):
        calls.append(None)
        for number, batch in enumerate(finite(*settings, **names)):
            if rank == 0 and len(calls) == 2 and number == 1:  # the first call was before step 1
                (Path(os.environ[FOLDER]) / "STOP").touch()
            yield batch

    patch.setattr(train.loader, "finite", interrupted)


def set_folder(rank, folder):
    os.environ[FOLDER] = str(folder)


@pytest.mark.slow
def test_a_stop_file_during_validation_leaves_no_half_score_and_the_score_is_made_up_for(tmp_path, straight):
    folder = tmp_path / "run"
    on_ranks(2, set_folder, folder)
    on_ranks(2, train_main, folder, SETTINGS, touch_stop_while_step_6_is_scored)
    left = exit_json(folder)
    assert (left["reason"], left["step"], left["why"]) == ("preempted", 6, "STOP")
    assert saved_steps(folder) == [6] and not (folder / "STOP").exists()
    assert [entry["step"] for entry in lines(folder, "validation")] == [0]
    assert_goes_on_as_if_never_stopped(folder, straight)


def test_a_run_that_finds_a_stop_file_leaves_before_it_builds_anything(tmp_path):
    (tmp_path / "STOP").touch()
    on_ranks(2, train_main, tmp_path, SETTINGS)
    assert exit_json(tmp_path) == exit_json(tmp_path) | {"reason": "preempted", "step": None, "steps_here": 0, "why": "STOP"}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def signal_at_the_second_row(patch, rank):
    from torchtitan_bio.data import recordings

    rows, original = [], recordings.checksum_counts

    def checksum_counts(*counts):
        rows.append(1)
        if len(rows) == 2 and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(rows) < 6, "the index is made to its end"
        return original(*counts)

    patch.setattr(recordings, "checksum_counts", checksum_counts)


def test_a_signal_while_an_index_is_made_is_heeded_before_the_next_row(tmp_path):
    source = tmp_path / "rows.arrow"
    write_arrow(source, table([np.full((4, 90), row, np.uint8) for row in range(20)]), max_rows=1)
    settings = [*SETTINGS, "--data.source", str(source), "--validation.enable", "false"]
    on_ranks(2, train_main, tmp_path / "run", settings, signal_at_the_second_row)
    left = exit_json(tmp_path / "run")
    assert (left["reason"], left["step"], left["why"]) == ("preempted", None, "SIGTERM")


def let_the_third_step_take_950_s(patch, rank):
    late_s, monotonic = [0], time.monotonic
    patch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: monotonic() + late_s[0], time=time.time))
    before_step(patch, 3, lambda: late_s.append(late_s.pop() + 950))


def test_the_wall_clock_stops_a_run_before_its_time_is_up(tmp_path):
    settings = [*SETTINGS, "--job.max_wall_s", "1000", "--validation.enable", "false"]
    on_ranks(2, train_main, tmp_path, settings, let_the_third_step_take_950_s)
    left = exit_json(tmp_path)
    assert (left["reason"], left["step"], left["why"]) == ("preempted", 3, "wall clock")
    assert saved_steps(tmp_path) == [3]


def signal_at_step_2(patch, rank):
    before_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def test_without_checkpoints_a_stopped_run_leaves_and_says_that_nothing_is_saved(tmp_path):
    settings = [*SETTINGS, "--checkpoint.enable", "false"]
    (printed,) = on_ranks(1, train_main, tmp_path, settings, signal_at_step_2)
    assert "checkpoint.enable=false, so nothing is saved" in printed and "stopped by SIGUSR1" in printed
    assert exit_json(tmp_path)["step"] == 2 and not (tmp_path / "checkpoint").exists()


def lose_the_launcher_at_step_3(patch, rank):
    patch.setenv("TORCHELASTIC_RUN_ID", "none")
    if rank == 1:
        before_step(patch, 3, lambda: patch.setattr(os, "getppid", lambda: 1))  # as of a process whose parent was killed


def test_ranks_whose_torchrun_was_killed_save_and_leave_instead_of_training_on_unseen(tmp_path):
    settings = [*SETTINGS, "--validation.enable", "false"]
    on_ranks(2, train_main, tmp_path, settings, lose_the_launcher_at_step_3)
    left = exit_json(tmp_path)
    assert (left["reason"], left["step"], left["why"]) == ("preempted", 3, "launcher gone")
    assert saved_steps(tmp_path) == [3] and not (tmp_path / "lock").exists()


ALONE = """
import ctypes, os, pathlib, signal, time
from torchtitan_bio import stop
stops = stop.Stops(pathlib.Path("/nowhere"))
{before}
with stops.alone():
    print("waits", flush=True)
    {meanwhile}
    ctypes.CDLL(None).sleep(20)
"""


@pytest.mark.parametrize(
    ("before", "meanwhile", "code"),
    [
        ("", "os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("", "os.kill(os.getpid(), signal.SIGUSR1)", -signal.SIGUSR1),
        ("os.kill(os.getpid(), signal.SIGTERM)", "", -signal.SIGTERM),
        ("", "os.getppid = lambda: 1", 1),  # as of a process whose parent was killed
        ("os.getppid = lambda: 1", "", 1),
    ],
)
def test_a_rank_that_waits_for_the_others_in_a_library_ends_at_a_signal_and_without_its_launcher(before, meanwhile, code):
    text = ALONE.format(before=before, meanwhile=meanwhile or "pass")
    variables = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", text], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == code and time.monotonic() - began < 10
    assert ("torchrun is gone" in result.stderr) == (code == 1)


def test_once_ranks_have_met_a_signal_is_a_wish_again(tmp_path):
    with deaf_again():
        stops = stop.Stops(tmp_path)
        with stops.alone():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.wishes()["SIGTERM"] == 1


# A sitecustomize that holds every rank, not torchrun, before its first import of torch.
SLOW_TORCH = """
import os, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and "RANK" in os.environ:
            sys.meta_path.remove(self)
            open(os.environ["LOADING"] + os.environ["RANK"], "w").write(str(os.getpid()))
            time.sleep(2)
sys.meta_path.insert(0, Slow())
"""


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_while_they_load_torch_do_not_wait_for_each_other(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_TORCH)
    variables = environment() | {"PYTHONPATH": str(tmp_path), "LOADING": str(tmp_path / "rank-")}
    output = (tmp_path / "output").open("w")
    torchrun = subprocess.Popen(command(tmp_path / "run", ranks=2), env=variables, stdout=output, stderr=output)
    started, pids = time.monotonic(), []
    try:
        while len(pids) < 2:
            assert time.monotonic() - started < 100
            time.sleep(0.05)
            pids = [int(text) for text in (path.read_text() for path in tmp_path.glob("rank-*")) if text]
        torchrun.kill()
        torchrun.wait()
        killed = time.monotonic()
        while any(map(is_there, pids)):
            assert time.monotonic() - killed < 60, "ranks outlive their torchrun"
            time.sleep(0.1)
        assert (tmp_path / "output").read_text().count("torchrun is gone, and the ranks had not met") == 2
        assert not (tmp_path / "run").exists()
    finally:
        output.close()
        torchrun.kill()
        for pid in filter(is_there, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_process_without_torchrun_may_outlive_its_shell(tmp_path, monkeypatch, clock):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stops = stop.Stops(tmp_path)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert set(stops.wishes().values()) == {0}


# ---- how a rank knows, and how all do ----


def what_ranks_know(rank, folder, sender):
    with deaf_again():
        world, stops = distributed.start(), stop.Stops(folder)
        if rank == sender:
            os.kill(os.getpid(), signal.SIGUSR1)
        wishes = stops.wishes()
        alone = stops.why
        stops.hear(world.sum({"flops": 1.0} | wishes))
        return sum(wishes.values()), alone, stops.why


def test_a_signal_is_a_wish_of_one_rank_and_the_sum_tells_all(tmp_path):
    assert on_ranks(2, what_ranks_know, tmp_path, 1) == [(0, None, "SIGUSR1"), (1, None, "SIGUSR1")]
    (tmp_path / "STOP").touch()
    assert on_ranks(2, what_ranks_know, tmp_path, None) == [(1, None, "STOP"), (0, None, "STOP")]


@pytest.fixture
def clock(monkeypatch):
    """Times that pass when a test says so; signal handlers of the test process stay."""
    monkeypatch.setattr(stop.signal, "signal", lambda number, handler: None)
    now = {"s": 1000.0}
    monkeypatch.setattr(stop.time, "monotonic", lambda: now["s"])
    monkeypatch.setattr(stop.time, "time", lambda: 1e9 + now["s"])
    return now


def seconds_before_the_end_when_it_stops(clock, stops, end_s, step_s):
    while not any(stops.wishes().values()):
        clock["s"] += step_s
    return end_s - clock["s"]


@pytest.mark.parametrize(
    ("whole_s", "save_s", "step_s", "expected"),
    [
        (6 * 3600, None, 10, 300 + 20),  # no save was timed yet
        (6 * 3600, 600, 10, 600 + 20),
        (6 * 3600, 3, 10, 60),  # a minute at least
        (300, None, 1, 30 + 2),  # a tenth of the whole limits what is guessed
        (300, 2, 1, 30),
    ],
)
def test_the_run_leaves_a_save_and_two_steps_before_its_time_is_up(
    clock, tmp_path, monkeypatch, whole_s, save_s, step_s, expected
):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(10**9 + 1000 + whole_s))
    stops = stop.Stops(tmp_path, "auto")
    stops.save_s = save_s
    left_s = seconds_before_the_end_when_it_stops(clock, stops, 1000 + whole_s, step_s)
    assert expected - step_s <= left_s < expected


def test_the_earlier_limit_counts(monkeypatch):
    assert stop.seconds_left("auto") is None and stop.seconds_left(50) == 50
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(round(time.time()) + 100))
    assert stop.seconds_left("auto") == pytest.approx(100, abs=1)
    assert stop.seconds_left(50) == 50 and stop.seconds_left(500) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("told", ["UNLIMITED", "nan", "2026-11-21T14:00:00"])
def test_an_end_time_that_is_no_number_of_seconds_is_a_warning_of_the_first_rank_and_no_limit(
    told, clock, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SLURM_JOB_END_TIME", told)
    clock["s"] += 10**6
    assert set(stop.Stops(tmp_path).wishes().values()) == {0}
    assert capsys.readouterr().err.startswith(f"warning: SLURM_JOB_END_TIME={told} is no time in seconds")
    assert stop.seconds_left(50) == 50
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    stop.Stops(tmp_path)
    assert capsys.readouterr().err == ""


def test_only_the_first_rank_looks_at_disk_and_clock(clock, tmp_path, monkeypatch):
    (tmp_path / "STOP").touch()
    monkeypatch.setenv("RANK", "1")
    stops = stop.Stops(tmp_path, 10.0)
    clock["s"] += 100
    assert set(stops.wishes().values()) == {0}
    monkeypatch.setenv("RANK", "0")
    stops = stop.Stops(tmp_path, 10.0)
    assert stops.wishes() == dict.fromkeys(stop.SOURCES, 0) | {"STOP": 1}
    clock["s"] += 100
    assert stops.wishes() == dict.fromkeys(stop.SOURCES, 0) | {"STOP": 1, "wall clock": 1}
