"""Saves that fail: nothing is committed, nothing older is lost, and all ranks know it with the same words."""

# ruff: noqa: F401, F811  (fixtures: imported, and then parameters)

import errno
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint import filesystem
from toy_checkpoints import MODEL_JSON, assert_bit_equal, build, flip_a_bit, full, listing, local, run, said, world

from torchtitan_bio import checkpoint, distributed
from torchtitan_bio.checkpoint import Checkpointer, CheckpointError, commit, dcp


def test_a_step_that_is_there_and_verifies_is_not_written_again(run, said):
    path = run.save(1, seed=1)
    before = {name.name: name.stat().st_mtime_ns for name in path.iterdir()}
    run.save(1, seed=2)
    assert {name.name: name.stat().st_mtime_ns for name in path.iterdir()} == before
    assert "not saved again" in said[-1]


def test_a_damaged_folder_of_the_same_step_is_set_aside_and_written_anew(run):
    path = run.save(1)
    flip_a_bit(path / "model.json")
    run.save(1)
    assert checkpoint.verify(path) == []
    assert (run.folder / "step-00000001.invalid-1" / "__0_0.distcp").exists()


@pytest.mark.parametrize("crash_point", ["manifest.json.new", "manifest.json", "step-00000002"])
def test_a_crash_at_any_rename_leaves_the_older_checkpoint_to_resume_from(run, monkeypatch, said, crash_point):
    older = run.save(1)
    rename = os.rename

    class Crash(BaseException):
        pass

    def crash(source, target):
        if crash_point == Path(source).name:
            raise Crash
        rename(source, target)
        if crash_point == Path(target).name:
            raise Crash

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash):
        run.save(2)
    monkeypatch.undo()
    path, state = run.checkpoints.latest()
    committed = crash_point == "step-00000002"
    assert path == (run.folder / "step-00000002" if committed else older) and checkpoint.verify(path) == []
    assert committed or any("left over" in line and "step-00000002.partial-" in line for line in said)


def test_a_crash_between_rename_and_retention_leaves_two_and_the_next_save_tidies_up(run, world, monkeypatch):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1)
    run.save(1, checkpoints=checkpoints)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        run.save(2, checkpoints=checkpoints)
    monkeypatch.undo()
    assert checkpoints.latest()[0].name == "step-00000002"
    run.save(3, checkpoints=checkpoints)
    assert [path.name for path in run.folder.iterdir()] == ["step-00000003"]


def fill_the_disk(monkeypatch, suffix):
    """Every file with this ending is written to /dev/full."""
    opened = Path.open

    def to_full(self, mode="r", *args, **kwargs):
        if "w" in mode and self.name.endswith(suffix):
            self.symlink_to("/dev/full")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", to_full)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("suffix", [".distcp", ".metadata.tmp", "train_state.json", "manifest.json.new"])
def test_a_full_disk_is_an_error_with_path_and_free_bytes_and_the_old_checkpoint_verifies(
    run, world, monkeypatch, suffix, asynchronous
):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=asynchronous)
    older = run.save(1)
    fill_the_disk(monkeypatch, suffix)
    with pytest.raises(CheckpointError, match=rf"{run.folder}/step-00000002 .*No space left.* \d+ bytes free"):
        run.save(2, checkpoints=checkpoints)
        checkpoints.wait()
    assert [path.name for path in run.folder.iterdir()] == [older.name]
    assert checkpoint.verify(older) == []


def test_an_error_of_an_asynchronous_save_is_raised_at_the_next_save_and_only_once(run, world, monkeypatch):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=True)
    run.save(1, checkpoints=checkpoints)
    checkpoints.wait()
    fill_the_disk(monkeypatch, ".distcp")
    run.save(2, checkpoints=checkpoints)
    with pytest.raises(CheckpointError, match="step-00000002"):
        run.save(3, checkpoints=checkpoints)
    monkeypatch.undo()
    checkpoints.wait()
    assert [path.name for path in run.folder.iterdir()] == ["step-00000001"]


def fail(*args, **kwargs):
    raise OSError(errno.EIO, "broken wire")


def vanish(folder, monkeypatch):
    """Unmounted, so to say, once the save has begun: DCP makes the folder anew and writes."""
    write = dcp.write

    def lose_the_folder(*args):
        folder.rename(folder.with_name("elsewhere"))
        write(*args)

    monkeypatch.setattr(dcp, "write", lose_the_folder)


FAULTS = {
    "full disk": (lambda folder, patch: fill_the_disk(patch, ".distcp"), "No space left on device"),
    "full disk at the manifest": (lambda folder, patch: fill_the_disk(patch, "manifest.json.new"), "No space left on device"),
    "read-only folder": (lambda folder, patch: patch.setattr(Path, "mkdir", refuse_to_make), "Read-only file system"),
    "failing writer": (lambda folder, patch: patch.setattr(filesystem, "_write_item", fail), "broken wire"),
    "folder gone": (lambda folder, patch: folder.rename(folder.with_name("elsewhere")), "has vanished; is its file system"),
    "folder gone in mid-save": (vanish, "No such file"),
}


def refuse_to_make(self, *args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system", str(self))


@contextmanager
def broken(fault, folder):
    """The folder and its disk have this fault; afterwards they are as they were."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault][0](folder, patch)
        yield
    elsewhere = folder.with_name("elsewhere")
    if elsewhere.exists():
        shutil.rmtree(folder, ignore_errors=True)
        elsewhere.rename(folder)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_is_one_warning_if_the_config_says_so_unless_it_is_the_last(
    world, tmp_path, said, asynchronous, fault
):
    folder, words = tmp_path / "checkpoint", FAULTS[fault][1]
    settings = {"keep_latest_k": 1, "asynchronous": asynchronous, "on_error": "continue"}
    checkpoints = Checkpointer(folder, world=world, say=said.append, **settings)
    trained = build(world, seed=1)

    def save(step, **settings):
        checkpoints.save(step, *trained, {"step": step}, MODEL_JSON, **settings)
        checkpoints.wait()

    save(1)
    said.clear()
    with broken(fault, folder):
        save(2)
    (line,) = said
    assert line.startswith(f"warning: saving step 2: {folder}/step-00000002 was not saved: ")
    assert words in line and "bytes free" in line
    assert checkpoints.latest()[0].name == "step-00000001"
    told = rf"^{folder}/step-00000003 was not saved: .*{words}.*\b\d+ bytes free"
    with broken(fault, folder), pytest.raises(CheckpointError, match=told):
        save(3, is_last=True)
    assert checkpoints.latest()[0].name == "step-00000001"
    assert checkpoint.verify(folder / "step-00000001") == []
    save(4)
    assert [name for name in os.listdir(folder) if ".partial-" not in name] == ["step-00000004"]


def test_a_vanished_folder_is_not_made_anew(world, tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoint", world=world)
    checkpoints.preflight(1, saves_ahead=1)
    (tmp_path / "checkpoint").rmdir()
    with pytest.raises(CheckpointError, match="vanished"):
        checkpoints.save(1, *build(world, seed=1), {}, MODEL_JSON)
    assert listing(tmp_path) == []


def fail_on_one_rank(rank, folder, place, on_error, asynchronous):
    """Rank 1 fails at `place`; what each rank raised."""
    world = distributed.start()
    checkpoints = Checkpointer(folder, world=world, on_error=on_error, asynchronous=asynchronous)
    model, optimizer = build(world, seed=1)
    checkpoints.save(1, model, optimizer, {}, MODEL_JSON)
    checkpoints.wait()
    patch = pytest.MonkeyPatch()
    if rank == 1 and place == "write":
        patch.setattr(filesystem, "_write_item", fail)
    if rank == 1 and place == "hash":
        patch.setattr(commit, "sha256", fail)
    if place == "parameter":
        with torch.no_grad():
            model.layers["0"].weight.to_local()[-1:] = torch.nan if rank == 1 else 0.0
    try:
        checkpoints.save(2, model, optimizer, {}, MODEL_JSON)
        checkpoints.wait()
        raised = "nothing"
    except (CheckpointError, ValueError) as error:
        raised = str(error)
    patch.undo()
    path, _ = checkpoints.latest()
    checkpoints.load(path, model, optimizer, MODEL_JSON)
    return raised, path.name


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("place", "on_error", "words"),
    [
        ("write", "stop", "rank 1: OSError"),
        ("write", "continue", "nothing"),
        ("hash", "stop", "rank 1: OSError"),
        ("parameter", "stop", "rank 1: not saved: model.layers.0.weight"),
        ("parameter", "continue", "rank 1: not saved: model.layers.0.weight"),
    ],
)
def test_a_failure_on_one_rank_is_the_same_on_all_and_nothing_is_committed(tmp_path, place, on_error, words, asynchronous):
    outcomes = on_ranks(2, fail_on_one_rank, tmp_path, place, on_error, asynchronous)
    assert outcomes[0] == outcomes[1]
    assert words in outcomes[0][0] and outcomes[0][1] == "step-00000001"
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_shard_that_did_not_reach_the_files_in_full_is_not_committed(run, monkeypatch):
    write = dcp.write

    def lose_the_end(folder, tensors, peers, read=None):
        write(folder, tensors, peers)
        os.truncate(folder / "__0_0.distcp", 3000)

    monkeypatch.setattr(dcp, "write", lose_the_end)
    with pytest.raises(CheckpointError, match="did not reach the files in full"):
        run.save(1)
    assert listing(run.folder) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["parameter", "moment"])
def test_values_that_are_not_finite_are_not_saved(world, tmp_path, kind, value):
    model, optimizer = build(world, seed=1)
    broken = model.temperature if kind == "parameter" else optimizer.state[model.temperature]["exp_avg"]
    with torch.no_grad():
        broken.fill_(value)
    for settings in ({}, {"on_error": "continue"}, {"on_error": "continue", "asynchronous": True}):
        with pytest.raises(ValueError, match=r"temperature.* not finite"):
            Checkpointer(tmp_path, world=world, **settings).save(1, model, optimizer, {}, MODEL_JSON)
    assert listing(tmp_path) == []


def test_large_values_whose_sum_is_not_finite_are_saved(world, tmp_path):
    model, optimizer = build(world, seed=1)
    with torch.no_grad():
        model.embedding.weight.fill_(3e38)
    Checkpointer(tmp_path, world=world).save(1, model, optimizer, {}, MODEL_JSON)
    assert checkpoint.verify(tmp_path / "step-00000001") == []


# Asynchronous saves


def test_asynchronous_saves_share_memory_and_each_holds_its_own_step(world, tmp_path, said):
    checkpoints = Checkpointer(tmp_path, world=world, asynchronous=True, say=said.append)
    model, optimizer = build(world, seed=1)
    write, places, saved = dcp.write, [], {}

    def slow_write(folder, tensors, *settings):
        time.sleep(0.1)  # the next save has come by then, and must wait
        places.append([local(tensor).data_ptr() for tensor in tensors.values()])
        write(folder, tensors, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "write", slow_write)
        for step in (1, 2, 3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(step)
            saved[step] = full(model, optimizer)
            checkpoints.save(step, model, optimizer, {}, MODEL_JSON)
        checkpoints.wait()
    assert places[0] == places[1] == places[2]
    held = sum(array.nbytes for array in saved[1].values())
    assert [line for line in said if "host memory" in line] == [
        f"checkpoint: asynchronous saves keep {held / 2**20:.1f} MiB of host memory in this process"
    ]
    for step in saved:
        other = build(world, seed=2, steps=0)
        checkpoints.load(tmp_path / f"step-{step:08d}", *other, MODEL_JSON)
        assert_bit_equal(full(*other), saved[step])


# Preflight


def test_preflight_names_the_path_and_both_numbers_when_space_is_short(world, tmp_path, run):
    free = shutil.disk_usage(tmp_path).free
    for keep, copies in ((3, 4), ("all", 2)):
        checkpoints = Checkpointer(tmp_path, world=world, keep_latest_k=keep)
        checkpoints.preflight(1000, saves_ahead=copies)
        too_large = free // copies + 10**9
        told = rf"{tmp_path} has [\d.]+ GiB free, and {copies} more checkpoint\(s\) of {too_large / 2**30:.1f} GiB each"
        with pytest.raises(ValueError, match=told):
            checkpoints.preflight(too_large, saves_ahead=9)
        checkpoints.preflight(too_large, saves_ahead=1)
    assert listing(tmp_path) == []
    run.save(1)
    Checkpointer(tmp_path, world=world, keep_latest_k=1).preflight(int(free * 0.6), saves_ahead=9)


def test_preflight_refuses_a_folder_that_cannot_be_written(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Checkpointer(tmp_path / "file" / "checkpoint", world=world).preflight(1, 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="cannot be written: .*Permission denied"):
        Checkpointer(tmp_path / "new", world=world).preflight(1, 1)


def test_the_size_foretold_is_the_size_on_disk_within_a_tenth(world, tmp_path):
    model = nn.Linear(300, 400)
    optimizer = torch.optim.AdamW(model.parameters())
    Checkpointer(tmp_path, world=world).save(1, model, optimizer, {}, MODEL_JSON)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert checkpoint.num_bytes(model) == pytest.approx(on_disk, rel=0.1)


def test_settings_that_mean_nothing_are_refused(world, tmp_path):
    for wrong in (0, -1, "some"):
        with pytest.raises(ValueError, match="keep_latest_k"):
            Checkpointer(tmp_path, world=world, keep_latest_k=wrong)
    with pytest.raises(ValueError, match="on_error"):
        Checkpointer(tmp_path, world=world, on_error="ignore")


def die_in_a_save(rank, folder):
    world = distributed.start()
    checkpoints = Checkpointer(folder, world=world, keep_latest_k=1)
    model, optimizer = build(world, seed=1)
    checkpoints.save(7, model, optimizer, {"step": 7}, MODEL_JSON)
    if rank == 1:
        filesystem._write_item = lambda *args: os._exit(9)
    checkpoints.save(8, model, optimizer, {"step": 8}, MODEL_JSON)


def test_a_rank_that_dies_inside_a_save_leaves_no_step_folder_and_the_previous_one_loads(tmp_path, world, said):
    with pytest.raises(RuntimeError, match=r"rank 0 failed(.|\n)*(closed|reset) by peer"):
        on_ranks(2, die_in_a_save, tmp_path)
    checkpoints = Checkpointer(tmp_path, world=world, say=said.append)
    path, state = checkpoints.latest()
    assert (path.name, state) == ("step-00000007", {"step": 7})
    checkpoints.load(path, *build(world, seed=2), MODEL_JSON)
    assert len(os.listdir(tmp_path)) == 2 and "step-00000008.partial-" in said[0]
