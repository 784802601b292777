"""One run folder, one run: a second writer is refused by name, and what a dead one left is taken over."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from torchtitan_bio import run_lock

STALE_S = 600
DEAD = 2**22 + 1  # above the largest process id that Linux gives


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left_behind(folder, age_s=0.0, **changes):
    """A lock of another process, whose last sign of life is so old."""
    folder.mkdir(exist_ok=True)
    holder = {"host": socket.gethostname(), "pid": DEAD, "job": "", "restarts": 0, "since": "2026-01-02 03:04:05", "token": "t"}
    path = folder / "lock"
    path.write_text(json.dumps(holder | changes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def take(folder, said=None):
    return run_lock.take(folder, stale_s=STALE_S, say=(said if said is not None else []).append)


def test_a_folder_is_held_until_it_is_given_back(tmp_path):
    lock = take(tmp_path)
    held = json.loads((tmp_path / "lock").read_text())
    assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    take(tmp_path).release()


def test_a_second_writer_is_refused_and_told_the_host_the_pid_and_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    code = (
        f"import pathlib, time; from torchtitan_bio import run_lock; run_lock.take(pathlib.Path({str(tmp_path)!r}), stale_s=9)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {holder.pid} on {socket.gethostname()}, job 4711.*dump_folder"):
            take(tmp_path)
        holder.kill()
        holder.wait()
        said = []
        take(tmp_path, said).release()  # SIGKILL left the lock, and its process is gone
        assert len(said) == 1 and f"taken over from process {holder.pid}" in said[0] and "its process is gone" in said[0]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


JOB, OTHER_JOB = {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}
REQUEUED, TORCHRUN_AGAIN = JOB | {"SLURM_RESTART_COUNT": "1"}, JOB | {"TORCHELASTIC_RESTART_COUNT": "1"}
ELSEWHERE = {"host": "another-host", "pid": 1}
TAKEN_OVER = {
    "dead process on this host": ({}, 0, {}, "its process is gone"),
    "this job on another host, started again": (ELSEWHERE | {"job": "7"}, 0, REQUEUED, "this job was started again"),
    "this job on this host, started again; its pid lives, after a reboot": (
        {"pid": os.getppid(), "job": "7"},
        0,
        REQUEUED,
        "this job was started again",
    ),
    "dead process on this host, in this job": ({"job": "7"}, 0, JOB, "its process is gone"),
    "no heartbeat on another host": (ELSEWHERE | {"job": "7"}, STALE_S + 10, OTHER_JOB, "no sign of life for 610 s"),
    "no heartbeat of a process that seems to live": ({"pid": 1}, STALE_S + 10, {}, "no sign of life"),
    "this process in an earlier life of its container": ({"pid": os.getpid()}, 0, {}, "its process is gone"),
}
REFUSED = {
    "living process on this host": ({"pid": os.getppid()}, 0, {}),
    "living process on this host, in this job": ({"pid": os.getppid(), "job": "7"}, 0, JOB),
    "this start of this job, on another host": (ELSEWHERE | {"job": "7"}, 1, JOB),
    "this start of this job, on another host, after a requeue": (ELSEWHERE | {"job": "7", "restarts": 1}, 1, REQUEUED),
    "this start of this job, for ranks that a second torchrun starts again": (ELSEWHERE | {"job": "7"}, 1, TORCHRUN_AGAIN),
    "another host": (ELSEWHERE, STALE_S - 10, {}),
    "another job on another host": (ELSEWHERE | {"job": "7"}, 0, OTHER_JOB),
    "clock that was set back": (ELSEWHERE, -1000, {}),
}


def set_all(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("case", TAKEN_OVER)
def test_a_stale_lock_is_taken_over_and_the_log_says_why(case, tmp_path, monkeypatch):
    changes, age_s, environment, reason = TAKEN_OVER[case]
    set_all(monkeypatch, environment)
    left_behind(tmp_path, age_s, **changes)
    said = []
    lock = take(tmp_path, said)
    assert len(said) == 1 and reason in said[0]
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", REFUSED)
def test_a_lock_whose_holder_may_live_is_left_alone(case, tmp_path, monkeypatch):
    changes, age_s, environment = REFUSED[case]
    set_all(monkeypatch, environment)
    path = left_behind(tmp_path, age_s, **changes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"is in use by process {(changes | {'pid': changes.get('pid')})['pid']} on"):
        take(tmp_path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_a_torn_lock_counts_as_held_until_its_heart_has_stood_still(tmp_path):
    path = tmp_path / "lock"
    path.write_bytes(b'{"host": "n')
    with pytest.raises(ValueError, match="has not said its name"):
        take(tmp_path)
    os.utime(path, (time.time() - STALE_S - 1,) * 2)
    take(tmp_path).release()


@pytest.mark.parametrize("content", [b"[]", b'"held"', b'{"host": "n"}', b"\xff\xfe"])
def test_a_lock_that_is_none_of_ours_is_refused_like_a_torn_one(content, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(ValueError, match="has not said its name"):
        take(tmp_path)


def test_a_run_of_short_limits_does_not_take_a_heart_between_two_beats_for_dead(tmp_path):
    left_behind(tmp_path, run_lock.BEAT_S + 2, **ELSEWHERE)
    with pytest.raises(ValueError, match="After 60 s without a sign it counts as dead"):
        run_lock.take(tmp_path, stale_s=2)  # comm.train_timeout_seconds=1
    left_behind(tmp_path, 61, **ELSEWHERE)
    run_lock.take(tmp_path, stale_s=2).release()


def test_a_folder_that_vanished_with_its_lock_is_not_another_runs(tmp_path):
    lock = take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "away")
    lock.check()
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError, match="lock is gone"):
        lock.check()
    lock.release()


def test_of_many_that_find_a_stale_lock_one_gets_the_folder(tmp_path, monkeypatch):
    describe = run_lock.describe_self
    monkeypatch.setattr(run_lock, "describe_self", lambda: describe() | {"pid": os.getppid()})  # as if each were a process
    for trial in range(20):
        left_behind(tmp_path, STALE_S + 10, token=f"old {trial}")
        held, refused, start = [], [], threading.Barrier(4)

        def compete(held=held, refused=refused, start=start):
            start.wait()
            try:
                held.append(take(tmp_path))
            except ValueError as error:
                refused.append(str(error))

        rivals = [threading.Thread(target=compete) for _ in range(4)]
        for each in rivals:
            each.start()
        for each in rivals:
            each.join()
        assert len(held) == 1 and len(refused) == 3
        held[0].check()
        held[0].release()


def test_a_holder_that_was_taken_for_dead_notices_and_leaves_the_new_lock_alone(tmp_path):
    lock = take(tmp_path)
    (tmp_path / "lock").unlink()
    path = left_behind(tmp_path, 0, host="another-host", pid=5)
    with pytest.raises(RuntimeError, match="taken over by process 5 on another-host"):
        lock.check()
    lock.release()
    assert path.exists()


def test_the_heart_beats_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    lock = take(tmp_path)
    os.utime(tmp_path / "lock", (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / "lock").stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run cannot be written"):
        take(tmp_path / "file" / "run")


def test_a_full_disk_leaves_no_lock_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ValueError, match="cannot be written: .*No space left"):
        take(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    take(tmp_path).release()
