"""Whole runs, as a user starts them: python or torchrun, on the debug TOML."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import whole_runs
from launches import ROOT, await_step, command, environment, launch, processes_of, run
from whole_runs import losses

from benchmarks.soak import tree_of

GOLDEN = Path(__file__).parent / "golden" / "debug_losses.json"


def kill_after_step(folder, step, *arguments, ranks) -> str:
    """Start a run and kill -9 all its processes once metrics.jsonl holds the step; what that file holds then."""
    words = command(folder, *arguments, ranks=ranks)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_step(folder, step, process)
    for each in tree_of(process.pid):
        os.kill(each, signal.SIGKILL)
    process.wait()
    return (folder / "metrics.jsonl").read_text()


def assert_resumed(folder, metrics_before, result):
    """A run from step 0 has the same losses. One that goes on loads a step, and the lines until there stay as they were."""
    assert result.returncode == 0, result.stderr
    (step,) = re.findall(rf"^checkpoint: loaded {re.escape(str(folder))}/checkpoint/step-0*([1-9]\d*) ", result.stdout, re.M)
    metrics = (folder / "metrics.jsonl").read_text()
    starts = [entry["step"] for entry in map(json.loads, metrics.splitlines()) if entry["kind"] == "start"]
    assert starts == [0, int(step)]
    before, after = (re.findall(r'^\{"kind": "train", .*\n', text, re.M)[: int(step)] for text in (metrics_before, metrics))
    assert len(before) == int(step) and after == before
    assert list(folder.glob("metrics.before-*")) == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """24 steps on one rank without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    result = run(folder, "--training.steps", "24")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_first_20_losses_are_the_golden_ones(straight):
    golden = json.loads(GOLDEN.read_text())
    assert losses(straight[0])[:20] == pytest.approx(golden["losses"], rel=1e-4), golden["command"]


def test_the_run_folder_holds_what_the_readme_promises(straight):
    folder, result = straight
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint",
        "metrics.jsonl",
        "config.toml",
        "exit.json",
        "report.html",
    }
    assert {path.name for path in (folder / "checkpoint").iterdir()} == {f"step-{step:08d}" for step in (15, 20, 24)}
    held = {path.name for path in (folder / "checkpoint" / "step-00000024").iterdir()}
    assert held == {".metadata", "__0_0.distcp", "manifest.json", "model.json", "train_state.json", "data.json"}
    assert "24/24" in result.stdout and str(folder) in result.stdout


def test_a_finished_run_started_again_says_so_and_trains_nothing(straight):
    folder, _ = straight
    before = (folder / "metrics.jsonl").read_text()
    ((raised, printed, _),) = whole_runs.start(folder, "--training.steps", "24")
    assert raised == "" and f"{folder} is finished: all 24 steps are done" in printed
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_scored_again_on_other_held_out_data_alone(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")

    def validations(*settings):
        assert whole_runs.start(tmp_path / "run", "--training.steps", "24", *settings)[0][0] == ""
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [line["held_out"] for line in lines if line["kind"] == "validation" and line["step"] == 24]

    assert len(validations()) == 1
    other = validations("--validation.split", "train")
    assert len(other) == 2 and other[0] != other[1]


def test_two_identical_runs_have_identical_losses(straight, tmp_path):
    """The second one in a process that has run others, and in a group of one rank."""
    assert whole_runs.start(tmp_path / "run", "--training.steps", "24")[0][0] == ""
    assert losses(tmp_path / "run") == losses(straight[0])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["disabled", "async"])
def test_two_ranks_killed_in_mid_run_resume_to_the_last_bit(tmp_path, asynchronous):
    settings = ["--training.steps", "24", "--checkpoint.interval", "5", "--checkpoint.async_mode", asynchronous]
    assert run(tmp_path / "straight", *settings, ranks=2).returncode == 0
    before = kill_after_step(tmp_path / "killed", 13, *settings, ranks=2)
    assert_resumed(tmp_path / "killed", before, run(tmp_path / "killed", *settings, ranks=2))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_within_1e_5(straight, tmp_path, ranks_before, ranks_after):
    settings = ["--training.steps", "24", "--checkpoint.interval", "4"]
    before = kill_after_step(tmp_path / "run", 9, *settings, ranks=ranks_before)
    assert_resumed(tmp_path / "run", before, run(tmp_path / "run", *settings, ranks=ranks_after))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["--training.global_batch_size", "8", "--data.mode", "aligned", "--training.steps", "20"],
            ["global_batch_size is 8 here and 4", "mode", "accept_changed", "training.steps=20", "already at step 24"],
        ),
        (["--training.steps", "30", "--checkpoint.enable", "false"], ["checkpoint.enable=false", "holds checkpoints"]),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused_and_touches_nothing(straight, settings, words):
    folder, _ = straight
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ((raised, _, _),) = whole_runs.start(folder, *settings)
    assert raised.startswith("ConfigError: ") and all(word in raised for word in words), raised
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_resume_names_each_setting_that_has_changed(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    ((raised, printed, _),) = whole_runs.start(tmp_path / "run", "--training.steps", "25", "--optimizer.lr", "0.002")
    assert raised == ""
    changed = [line.partition(": ")[2] for line in printed.splitlines() if line.startswith("changed since")]
    assert changed == [
        f"job.dump_folder: {straight[0]} -> {tmp_path / 'run'}",
        "optimizer.lr: 0.001 -> 0.002",
        "training.steps: 24 -> 25",
    ]


def test_without_checkpoints_a_second_run_keeps_the_metrics_of_the_first(tmp_path):
    settings = ["--training.steps", "2", "--checkpoint.enable", "false"]
    assert whole_runs.start(tmp_path, *settings)[0][0] == ""
    first = (tmp_path / "metrics.jsonl").read_text()
    ((raised, printed, _),) = whole_runs.start(tmp_path, *settings)
    assert raised == "" and "metrics.before-1.jsonl" in printed
    assert (tmp_path / "metrics.before-1.jsonl").read_text() == first and losses(tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_though_a_checkpoint_is_being_written(tmp_path):
    code = """
from torchtitan_bio.checkpoint import commit
write, step = commit.write, train.train_step
def slow_write(*settings):
    time.sleep(300)
    return write(*settings)
def failing_step(*settings):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("the third step of rank 1")
    return step(*settings)
commit.write, train.train_step = slow_write, failing_step
"""
    process = launch(tmp_path, code, "--checkpoint.async_mode", "async", interval=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "the third step of rank 1" in err and processes_of(tmp_path) == []


@pytest.mark.slow
def test_what_one_rank_alone_refuses_is_told_and_no_run_folder_is_made(tmp_path):
    code = """
from torchtitan_bio import attention
choose = attention.choose
attention.choose = lambda name, **settings: choose("fa3" if os.environ["RANK"] == "1" else name, **settings)
"""
    _, err = launch(tmp_path, code).communicate(timeout=120)
    assert "this run cannot work" in err and "failed on rank 1: the attention kernel 'fa3'" in err, err
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_work_exits_2_and_names_every_cause(tmp_path):
    mistakes = (
        "--training.global_batch_size 5 --training.local_batch_size 2 --model.overrides.dim 30 "
        "--model.overrides.nun_layers 2 --parallelism.data_parallel_shard_degree 3 --checkpoint.init_from nowhere"
    )
    result = run(tmp_path / "run", *mistakes.split())
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for words in ("nearest valid values are 4 and 6", "dim", "num_layers", "data_parallel_shard_degree", "init_from=nowhere"):
        assert words in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("--model.flavor=8b", "8B"),
        ('--model.freeze=["nothing.*"]', "nothing.*"),
        ("--data.source=no/such/folder.npz", "no/such/folder.npz"),
        ("--model.overrides.vocab_size=100", "smaller than the data's, 256"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_leaves_no_folder(tmp_path, setting, words):
    ((raised, _, _),) = whole_runs.start(tmp_path / "run", setting)
    assert raised.startswith("ConfigError: ") and words in raised and not (tmp_path / "run").exists()


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    ((raised, _, _),) = whole_runs.start(tmp_path / "run", '--model.freeze=["tok_embeddings.*"]', "--training.steps=2")
    assert raised == ""
    (step,) = (tmp_path / "run" / "checkpoint").glob("step-*")
    names = FileSystemReader(step).read_metadata().state_dict_metadata
    moments = [name for name in names if name.startswith("optimizer.") and "tok_embeddings" in name]
    assert any("tok_embeddings" in name for name in names) and not moments


def test_losses_are_finite_and_fall(straight):
    curve = losses(straight[0])
    assert all(math.isfinite(loss) for loss in curve) and curve[-1] < curve[0]


def test_a_run_whose_loss_stays_not_finite_stops_and_leaves_its_checkpoint(tmp_path):
    settings = "--training.steps 9 --optimizer.lr 1e30 --training.max_skipped_steps 2 --checkpoint.interval 1"
    ((raised, _, err),) = whole_runs.start(tmp_path / "run", *settings.split(), "--validation.enable", "false")
    assert raised.startswith("FloatingPointError: 3 steps in a row were skipped") and raised in err
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (told["reason"], told["step"]) == ("failed", 4) and "3 steps in a row were skipped" in told["error"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == [
        f"step-{step:08d}" for step in (1, 2, 3)
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if line["kind"] == "train"] == [False, True, True, True]


def test_a_warm_start_takes_the_weights_and_reports_what_it_left_out(straight, tmp_path):
    source = straight[0] / "checkpoint" / "step-00000024"
    settings = ["--checkpoint.init_from", str(source), "--checkpoint.init_allow_missing", '["output.weight"]']
    ((raised, _, _),) = whole_runs.start(tmp_path / "run", *settings, "--model.overrides.vocab_size=300")
    assert raised.startswith("ConfigError: ") and "tok_embeddings.weight" in raised, "a shape that differs was not refused"
    ((raised, _, _),) = whole_runs.start(tmp_path / "run", *settings[:3], '["nothing.*"]')
    assert raised.startswith("ConfigError: ") and "nothing.*" in raised, "a pattern that matches nothing was not refused"
    ((raised, printed, _),) = whole_runs.start(tmp_path / "run", *settings[:2], "--training.steps=1")
    assert raised == "" and str(source) in printed
    assert losses(tmp_path / "run")[0] < losses(straight[0])[10]


@pytest.mark.slow
def test_the_quickstart_stands_above_every_baseline(tmp_path):
    environment_of_a_laptop = environment() | {"PYTHON": sys.executable}
    environment_of_a_laptop.pop("OMP_NUM_THREADS")
    result = subprocess.run(
        [str(ROOT / "train.sh"), "--job.dump_folder", str(tmp_path / "run")],
        env=environment_of_a_laptop,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stderr
    ladder = {words[:44].strip(): float(words[44:]) for words in result.stdout.splitlines() if words.startswith("  ")}
    model = ladder.pop("this model")
    print(model, ladder)
    assert len(ladder) == 6 and model >= 1.20 and model > max(ladder.values())
