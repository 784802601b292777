"""Faults injected into whole runs: those of docs/reliability.md that no other file injects."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import whole_runs
from launches import ROOT, SLOW_STEPS, await_step, launch, processes_of
from spike_files import recordings, table
from toy_checkpoints import flip_a_bit
from whole_runs import before_step, exit_json, lines, losses, saved_steps

from benchmarks.soak import tree_of
from torchtitan_bio import checkpoint, config_loader
from torchtitan_bio.config import ConfigError

SETTINGS = ["--training.steps=6", "--checkpoint.interval=2", "--validation.enable=false"]

# ---- whole runs on a standing group of ranks ----


def start(folder, *arguments, bend=None, ranks=2):
    """The outcome of each rank."""
    own = {argument.partition("=")[0] for argument in arguments}
    common = [setting for setting in SETTINGS if setting.partition("=")[0] not in own]
    return whole_runs.start(folder, *common, *arguments, bend=bend, ranks=ranks)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """6 steps on 2 ranks without a fault."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert [raised for raised, _, _ in start(folder)] == ["", ""]
    return folder


def shards(folder, step) -> dict[str, str]:
    """sha256 of the weights and moments of each rank after a step."""
    manifest = json.loads((folder / "checkpoint" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".distcp")}


def make_the_loss_nan(patch, steps):
    from torchtitan_bio.models import llama3

    calls, forward = [], llama3.Model.forward

    def broken(self, inputs):
        sums = forward(self, inputs)
        calls.append(None)
        step = (len(calls) + 1) // 2  # two microbatches a step
        return {term: term_sum * np.nan for term, term_sum in sums.items()} if step in steps else sums

    patch.setattr(llama3.Model, "forward", broken)


def make_a_gradient_nan(patch, steps):
    import torch

    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def broken(parameters, max_norm):
        calls.append(None)
        if len(calls) in steps:
            parameters[0].grad.to_local()[:1] = torch.nan
        return clip(parameters, max_norm)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)


def break_rank_1(broken, steps, patch, rank):
    if rank == 1:
        broken(patch, steps)


@pytest.mark.parametrize("broken", [make_the_loss_nan, make_a_gradient_nan])
def test_a_nan_on_one_rank_makes_all_skip_that_step_and_leaves_every_weight_and_moment(broken, tmp_path, straight):
    settings = ["--checkpoint.interval=1", "--checkpoint.keep_latest_k=all"]
    (raised, printed, _), other = start(tmp_path, *settings, bend=partial(break_rank_1, broken, [3]))
    assert raised == other[0] == "" and exit_json(tmp_path)["reason"] == "finished"
    steps = lines(tmp_path, "train")
    assert [line["skipped"] for line in steps] == [False, False, True, False, False, False]
    assert (steps[2]["loss"] is None) == (broken is make_the_loss_nan) and steps[2]["grad_norm"] is None
    assert len(re.findall("^step 3 skipped: loss .*A2929", printed, re.M)) == 1
    assert shards(tmp_path, 3) == shards(tmp_path, 2) and len(shards(tmp_path, 3)) == 2
    assert shards(tmp_path, 4) != shards(tmp_path, 3)
    assert losses(tmp_path)[:2] == losses(straight)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [make_the_loss_nan, make_a_gradient_nan])
def test_too_many_nans_in_a_row_stop_all_ranks_and_a_resume_counts_those_before(broken, tmp_path):
    settings = ["--checkpoint.interval=1", "--training.max_skipped_steps=1"]
    told = "FloatingPointError: 2 steps in a row were skipped; training.max_skipped_steps=1"
    outcomes = start(tmp_path, *settings, bend=partial(break_rank_1, broken, [3, 4]))
    assert [raised for raised, _, _ in outcomes] == [told] * 2
    record = exit_json(tmp_path)
    assert (record["reason"], record["step"], record["error"]) == ("failed", 4, told) and "crash_loop" not in record
    assert saved_steps(tmp_path) == [1, 2, 3]
    outcomes = start(tmp_path, *settings, bend=partial(break_rank_1, broken, [1]))  # step 4 again
    assert [raised for raised, _, _ in outcomes] == [told] * 2
    assert exit_json(tmp_path)["crash_loop"] is True and saved_steps(tmp_path) == [1, 2, 3]


def spoil_a_weight(patch, rank):
    """Of rank 1, between two steps."""
    import torch

    from torchtitan_bio import optimizer

    def spoil():
        with torch.no_grad():
            weights[0].to_local()[:1] = torch.nan

    weights, build = [], optimizer.build

    def build_and_keep(model, **settings):
        weights.extend(model.parameters())
        return build(model, **settings)

    patch.setattr(optimizer, "build", build_and_keep)
    if rank == 1:
        before_step(patch, 3, spoil)


@pytest.mark.slow
def test_a_nan_in_a_weight_is_never_saved_and_the_run_goes_on_from_before_it(tmp_path, straight):
    for raised, _, err in start(tmp_path, bend=spoil_a_weight):
        assert "not saved: model.tok_embeddings.weight" in raised and "not finite" in raised and "step 4, save" in err
    assert (exit_json(tmp_path)["reason"], exit_json(tmp_path)["phase"]) == ("failed", "save")
    assert saved_steps(tmp_path) == [2] and checkpoint.verify(tmp_path / "checkpoint" / "step-00000002") == []
    assert [raised for raised, _, _ in start(tmp_path)] == ["", ""]
    assert losses(tmp_path) == losses(straight) and shards(tmp_path, 6) == shards(straight, 6)


def fill_the_disk_of_rank_1_at_step_4(patch, rank):
    opened = Path.open

    def to_full(self, mode="r", *args, **kwargs):
        if "w" in mode and self.parent.name.startswith("step-00000004.") and self.suffix == ".distcp":
            self.symlink_to("/dev/full")
        return opened(self, mode, *args, **kwargs)

    if rank == 1:
        patch.setattr(Path, "open", to_full)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "noticed"), [("disabled", 4), ("async", 6)])
def test_a_full_disk_of_one_rank_stops_all_of_them_by_their_next_save_and_the_older_checkpoint_resumes(
    mode, noticed, tmp_path, straight
):
    outcomes = start(tmp_path, f"--checkpoint.async_mode={mode}", bend=fill_the_disk_of_rank_1_at_step_4)
    for raised, _, err in outcomes:
        assert re.search(r"step-00000004 was not saved: .*No space left.* \d+ bytes free", raised), raised
        assert f"step {noticed}, save" in err
    record = exit_json(tmp_path)
    assert (record["reason"], record["step"], record["phase"]) == ("failed", noticed, "save")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000002"]
    assert checkpoint.verify(tmp_path / "checkpoint" / "step-00000002") == []
    assert [raised for raised, _, _ in start(tmp_path)] == ["", ""]
    assert losses(tmp_path) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_that_may_miss_a_checkpoint_goes_on_over_a_full_disk_and_warns(mode, tmp_path, straight):
    settings = [f"--checkpoint.async_mode={mode}", "--checkpoint.on_save_error=continue"]
    (raised, printed, _), (other, _, _) = start(tmp_path, *settings, bend=fill_the_disk_of_rank_1_at_step_4)
    assert raised == other == "" and len(re.findall("^warning: saving step 4: .*No space left", printed, re.M)) == 1
    assert saved_steps(tmp_path) == [2, 6] and losses(tmp_path) == losses(straight)
    assert exit_json(tmp_path)["reason"] == "finished"


def test_a_flipped_bit_costs_a_run_the_steps_of_that_checkpoint_and_no_more(tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoint" / "step-00000006" / "__1_0.distcp")
    (raised, printed, _), _ = start(tmp_path / "run")
    assert raised == "" and "step-00000006/__1_0.distcp" in printed and "set aside as step-00000006.invalid-1" in printed
    assert lines(tmp_path / "run", "start")[-1]["step"] == 4 and losses(tmp_path / "run") == losses(straight)
    assert shards(tmp_path / "run", 6) == shards(straight, 6)


@pytest.mark.parametrize("place", ["run", "run/checkpoint"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(place, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file where a folder is to be")
    raised, other = (raised for raised, _, _ in start(tmp_path / "run"))
    assert raised.startswith("ConfigError: ") and other.startswith("ConfigError: ")
    assert str(tmp_path / place) in raised and "cannot be written" in raised
    assert [path.name for path in tmp_path.rglob("*")] == place.split("/")


def have_little_memory(patch, rank):
    from torchtitan_bio import metrics

    patch.setattr(metrics, "host_memory_bytes", lambda: 2**20)


def test_a_run_that_memory_cannot_hold_is_refused_before_ranks_meet_unless_it_is_to_be_tried(tmp_path):
    ((raised, _, _),) = start(tmp_path / "run", bend=have_little_memory, ranks=1)
    assert raised.startswith("ConfigError: a process needs ") and "job.must_fit=false" in raised
    assert not (tmp_path / "run").exists()
    settings = ["--job.must_fit=false", "--training.steps=1"]
    ((raised, printed, _),) = start(tmp_path / "run", *settings, bend=have_little_memory, ranks=1)
    assert raised == "" and re.search("^warning: a process needs ", printed, re.M) and len(losses(tmp_path / "run")) == 1


# ---- data ----


def write_data(folder, *, num_good=6, bad=()):
    """Parquet files of good recordings among bad rows."""
    folder.mkdir(exist_ok=True)
    good = [np.tile(matrix, (1, 12)) for matrix in recordings(num_good, seed=1)]
    signed = pa.list_(pa.list_(pa.int64()))
    pq.write_table(table([good[0], *bad, *good[1:]], signed, source_dataset=None, subject_id=None), folder / "a.parquet")
    return folder


BAD_ROWS = {"ragged": [[1, 2, 3], [1, 2]], "negative": [[0, -3]], "empty": [], "missing": [[1, None]]}


def raise_at_step_4(patch, rank):
    def fail():
        raise OSError("the fourth step")

    before_step(patch, 4, fail)


def test_malformed_rows_of_five_kinds_are_refused_by_name_or_left_out_and_a_resume_is_exact(tmp_path):
    data = write_data(tmp_path / "data", bad=BAD_ROWS.values())
    flat = table([[1, 2]], pa.list_(pa.uint8()), segment_id=["flat"])
    pq.write_table(flat, data / "b.parquet")
    settings, run = [f"--data.source={data}"], tmp_path / "run"
    ((raised, _, _),) = start(run, *settings, ranks=1)
    assert raised.startswith("ConfigError: ") and "data.max_malformed_rows=5" in raised and not run.exists()
    for kind, row in zip([*BAD_ROWS, "1-D"], ["1/s1", "1/s2", "1/s3", "1/s4", "1/flat"], strict=True):
        assert re.search(rf"{row}: {kind}", raised), raised

    settings += ["--data.max_malformed_rows=5"]
    ((raised, printed, _),) = start(tmp_path / "straight", *settings, ranks=1)
    assert raised == "" and len(re.findall("malformed and left out", printed)) == 5
    ((raised, _, _),) = start(run, *settings, bend=raise_at_step_4, ranks=1)
    assert raised == "OSError: the fourth step"
    ((raised, _, _),) = start(run, *settings, ranks=1)
    assert raised == "" and losses(run) == losses(tmp_path / "straight")
    assert lines(run, "start")[-1]["step"] == 2 and shards(run, 6) == shards(tmp_path / "straight", 6)


def test_a_row_that_was_appended_is_refused_with_what_differs_unless_it_is_accepted_and_recorded(tmp_path):
    data = write_data(tmp_path / "data")
    run, settings = tmp_path / "run", [f"--data.source={data}"]
    start(run, *settings, bend=raise_at_step_4, ranks=1)
    state = json.loads((run / "checkpoint/step-00000002/train_state.json").read_text())
    write_data(data, num_good=7)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ((raised, _, _),) = start(run, *settings, ranks=1)
    assert raised.startswith("ConfigError: the data is not that of ") and "data.accept_changed=true" in raised
    assert "num_rows: 6 -> 7" in raised, raised
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    ((raised, printed, _),) = start(run, *settings, "--data.accept_changed=true", ranks=1)
    assert raised == "" and "warning: the data is not that of" in printed
    after = json.loads((run / "checkpoint/step-00000004/train_state.json").read_text())
    assert after["config"]["data"]["accept_changed"] is True and after["fingerprint"] != state["fingerprint"]


# ---- what lies in the run folder ----


def test_a_corrupt_config_toml_of_a_run_folder_is_named_and_a_start_by_its_own_toml_writes_it_anew(tmp_path, straight):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoint" / "step-00000006")
    whole = (run / "config.toml").read_text()
    (run / "config.toml").write_text(whole[: len(whole) // 2] + '"')
    with pytest.raises(ConfigError, match=rf"{run}/config.toml:\d+: .*not TOML"):
        config_loader.load(["--job.config_file", str(run / "config.toml")])
    assert [raised for raised, _, _ in start(run)] == ["", ""]
    assert losses(run) == losses(straight)
    assert config_loader.load(["--job.config_file", str(run / "config.toml")]).config.training.steps == 6


@pytest.mark.parametrize("content", ['{"reason": "runn', "[]"])
def test_a_corrupt_exit_json_costs_its_memory_of_failures_and_nothing_else(content, tmp_path, straight):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "exit.json").write_text(content)
    assert [raised for raised, _, _ in start(run)] == ["", ""]
    assert exit_json(run) == exit_json(run) | {"reason": "finished", "step": 6}


def test_a_corrupt_line_of_metrics_is_named_and_nothing_is_touched(tmp_path, straight):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    path = run / "metrics.jsonl"
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*content[:3], "\0\0\0\n", *content[4:]]))
    shutil.rmtree(run / "checkpoint" / "step-00000006")
    before = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    (raised, _, _), (other, _, _) = start(run)
    assert raised.startswith("ConfigError: ") and f"{path}, line 4 is not a line of metrics" in raised
    assert "line 4 is not a line of metrics" in other
    assert {each: each.read_bytes() for each in run.rglob("*") if each.is_file()} == before


ON_A_SMALL_DISK = """
import os, shutil, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from whole_runs import before_step, train_main

disk, settings = Path(sys.argv[1]), sys.argv[2:]
ballast = disk / "ballast"

def fill():
    with open(ballast, "wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass

def die():
    raise OSError("it dies at step 16")

def full_for_a_while(patch, rank):
    before_step(patch, 3, fill)
    before_step(patch, 18, ballast.unlink)

def full_to_its_death(patch, rank):
    before_step(patch, 3, fill)
    before_step(patch, 16, die)

print(train_main(0, disk / "one", settings, full_for_a_while))

# The second one has its checkpoints elsewhere.
(disk / "two").mkdir()
Path("checkpoint").mkdir()
(disk / "two" / "checkpoint").symlink_to(Path("checkpoint").absolute())
try:
    train_main(0, disk / "two", settings, full_to_its_death)
except OSError as error:
    print(error)
ballast.unlink()
print(train_main(0, disk / "two", settings))
for name in ("one", "two"):
    shutil.copytree(disk / name, name)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_costs_saves_and_traces_but_no_line_of_the_metrics_and_no_run(tmp_path):
    """A file system of 16 MB in a namespace of its own, full from step 3 to 18; of another run to its death, with checkpoints
    elsewhere, which is started again once there is room."""
    (tmp_path / "disk").mkdir()
    script = ON_A_SMALL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests"))
    settings = ["--training.steps=20", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=all", "--validation.enable=false"]
    mount = 'mount -t tmpfs -o size=16m tmpfs disk && exec "$@"'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*unshare, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    words = [*unshare, sys.executable, "-c", script, "disk", *settings, "--checkpoint.on_save_error=continue"]
    words += ["--metrics.enable_tensorboard=true", "--profiling.enable_profiling=true", "--profiling.profile_freq=5"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    start(tmp_path / "straight", *settings, ranks=1)
    assert losses(tmp_path / "one") == losses(tmp_path / "two") == losses(tmp_path / "straight")
    first, again = done.stdout.split("it dies at step 16")
    assert len(re.findall(r"^warning: saving step \d+: .*No space left", first, re.M)) == 7  # after 4, 6 ... 16
    assert len(re.findall("^warning: .*metrics.jsonl: No space left .* until there is room", first, re.M)) == 1
    assert len(re.findall("metrics.jsonl is whole again", first)) == 1 and "warning: no trace" in first
    assert saved_steps(tmp_path / "one") == [2, 18, 20]
    assert json.loads((tmp_path / "checkpoint" / "step-00000014" / "unwritten_metrics.json").read_text())["lines"]
    assert lines(tmp_path / "two", "start")[-1]["step"] == 14, again


# ---- as a user starts it ----


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_in_a_collective_end_within_the_limit_and_name_it(tmp_path):
    code = """
import torch
import torch.distributed as dist
step = train.train_step
def waiting_step(*settings):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        open(sys.argv[0] + ".stuck", "w").write(str(time.time()))
        dist.recv(torch.zeros(1), src=0)
    return step(*settings)
train.train_step = waiting_step
"""
    process = launch(tmp_path, code, "--comm.train_timeout_seconds", "5")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "script.py.stuck").read_text()) < 5 + 20
    assert re.search(r"^rank [01] was in step 3, \w+ when another rank failed, went away or fell silent: ", err, re.M), err
    record = exit_json(tmp_path / "run")
    assert (record["reason"], record["step"], record["noticed"]) == ("failed", 3, True)
    assert processes_of(tmp_path) == [] and not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
def test_a_second_run_in_the_folder_exits_with_2_and_a_killed_data_worker_ends_the_first_with_its_row(tmp_path):
    process = launch(tmp_path, SLOW_STEPS.replace("0.05", "0.5"), "--data.num_workers", "1", ranks=1)
    await_step(tmp_path / "run", 3, process)
    second = subprocess.run(process.args, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert re.search(
        rf"this run cannot work:\n  {tmp_path}/run is in use by process {process.pid} on \S+, since", second.stderr
    )

    began, step = time.monotonic(), len(losses(tmp_path / "run"))
    workers = [each for each in tree_of(process.pid)[1:] if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
    assert len(workers) == 1 and process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    record = exit_json(tmp_path / "run")
    assert process.returncode == 1 and time.monotonic() - began < 30
    assert (record["reason"], record["phase"]) == ("failed", "data") and record["step"] > step
    assert re.search(r"a data worker died while rank 0 awaited sample \d+ \(\S*A2929.*\)", record["error"]), record
    assert f"rank 0 failed in step {record['step']}, data: {record['error']}" in err
    assert processes_of(tmp_path) == [] and not (tmp_path / "run" / "lock").exists()
