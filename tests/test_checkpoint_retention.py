"""Which checkpoint a run goes on from, and which ones are deleted."""

# ruff: noqa: F401, F811  (fixtures: imported, and then parameters)

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from toy_checkpoints import MODEL_JSON, build, flip_a_bit, run, said, world

from torchtitan_bio import checkpoint
from torchtitan_bio.checkpoint import Checkpointer, CheckpointError, commit

# Discovery


DAMAGES = {
    "flipped shard": ("__0_0.distcp", flip_a_bit),
    "flipped metadata": (".metadata", flip_a_bit),
    "flipped train state": ("train_state.json", flip_a_bit),
    "flipped manifest": ("manifest.json", flip_a_bit),
    "truncated": ("__0_0.distcp", lambda path: os.truncate(path, 100)),
    "missing shard": ("__0_0.distcp", Path.unlink),
    "missing manifest": ("manifest.json", Path.unlink),
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b"")),
    "manifest of nothing": ("manifest.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_by_name_and_the_one_before_is_used(world, run, said, damage):
    older, newest = run.save(1), run.save(2)
    name, harm = DAMAGES[damage]
    harm(newest / name)
    assert name in checkpoint.verify(newest)[0]
    assert run.checkpoints.latest()[0] == older
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002"], "touched before the run was agreed to"
    run.checkpoints.load(older, *build(world, seed=2), MODEL_JSON)
    assert any(name in line and "set aside as step-00000002.invalid-1" in line for line in said)
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002.invalid-1"]
    assert run.checkpoints.latest()[0] == older


def test_step_folders_of_which_none_verifies_are_an_error_and_stay_where_they_are(run):
    for step in (1, 2):
        flip_a_bit(run.save(step) / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none that verifies(.|\n)*step-00000002/__0_0(.|\n)*step-00000001/__0_0"):
            run.checkpoints.latest()
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002"]


def test_a_folder_without_step_folders_starts_at_step_0_and_says_so(run, said):
    assert run.checkpoints.latest() is None
    (run.folder / "step-00000002.partial-0123abcd").mkdir()
    (run.folder / "step-00000002.trash-0123abcd").mkdir()
    (run.folder / "step-2").mkdir()
    (run.folder / "step-00000009").write_text("a file, not a folder")
    (run.folder / "run.lock").write_text("")
    assert run.checkpoints.latest() is None
    assert "starting at step 0" in said[-1] and sum("left over" in line for line in said) == 2
    assert len(os.listdir(run.folder)) == 5


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(run, world, monkeypatch):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=2)
    for step, clock in ((9, 2e9), (10, 1e9), (11, 0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        path = run.save(step, checkpoints=checkpoints)
        for each in (*path.iterdir(), path):
            os.utime(each, (clock, clock))
    assert sorted(os.listdir(run.folder)) == ["step-00000010", "step-00000011"]
    assert checkpoints.latest()[0] == path


def test_an_unreadable_disk_is_an_error_and_sets_nothing_aside(run, monkeypatch):
    run.save(1)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(commit, "sha256", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        run.checkpoints.latest()
    assert os.listdir(run.folder) == ["step-00000001"]


# Retention


def test_retention_keeps_k_that_verify_and_touches_nothing_foreign(run, world, said):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=2, say=said.append)
    for step in (1, 2, 3, 4):
        run.save(step)
    os.truncate(run.folder / "step-00000004" / "__0_0.distcp", 10)
    (run.folder / "step-00000001" / "hf").mkdir()
    strays = ["step-5", "step-00000002.bak", "step-00000009.invalid-1", "best", "step-00000003.partial-0123abcd"]
    for name in strays:
        (run.folder / name).mkdir()
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "step-00000002.trash-0123abcd").mkdir()
    run.save(6, checkpoints=checkpoints)
    kept = ["step-00000001", "step-00000003", "step-00000004", "step-00000006"]
    assert sorted(os.listdir(run.folder)) == sorted([*kept, *strays, "notes.txt"])
    assert any("step-00000001 is kept because it holds hf" in line for line in said)
    assert any("neither counted nor deleted" in line and "step-00000004" in line for line in said)


def test_retention_never_deletes_what_was_just_saved(run, world):
    for step in (5, 6):
        run.save(step)
    run.save(2, checkpoints=Checkpointer(run.folder, world=world, keep_latest_k=1))
    assert sorted(os.listdir(run.folder)) == ["step-00000002", "step-00000006"]


def test_an_asynchronous_save_retires_nothing_before_it_is_committed(run, world):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=True)
    run.save(1, checkpoints=checkpoints)
    run.save(2, checkpoints=checkpoints)
    assert "step-00000001" in os.listdir(run.folder)
    checkpoints.wait()
    assert os.listdir(run.folder) == ["step-00000002"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_old_checkpoints_that_cannot_be_deleted_are_a_warning_if_the_config_says_so(
    run, world, monkeypatch, said, asynchronous
):
    checkpoints = Checkpointer(
        run.folder, world=world, keep_latest_k=1, asynchronous=asynchronous, on_error="continue", say=said.append
    )
    run.save(1, checkpoints=checkpoints)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    path = run.save(2, checkpoints=checkpoints)
    checkpoints.wait()
    assert said[-1].startswith("warning: saving step 2: retention failed: ") and "Permission denied" in said[-1]
    assert checkpoints.latest()[0] == path and checkpoint.verify(path) == []
