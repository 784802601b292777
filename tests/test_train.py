"""Whole runs, as a user starts them: python or torchrun, on the debug TOML."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "debug_losses.json"


def environment():
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}


def command(folder, *arguments, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = ["--job.config_file", str(ROOT / "train_configs/debug.toml"), "--job.dump_folder", str(folder)]
    return [*launcher, str(ROOT / "train.py"), *settings, *arguments]


def run(folder, *arguments, ranks=1):
    return subprocess.run(
        command(folder, *arguments, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=300
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)), "a step is missing or doubled"
    return [line["loss"] for line in steps]


def kill_after_step(folder, step, *arguments, ranks):
    """Start a run and kill -9 all its processes once metrics.jsonl holds the step."""
    process = subprocess.Popen(
        command(folder, *arguments, ranks=ranks),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    path = folder / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    assert {"checkpoint", "metrics.jsonl", "config.toml"} <= {path.name for path in folder.iterdir()}
    assert "24/24" in result.stdout and str(folder) in result.stdout


def test_a_finished_run_started_again_says_so_and_trains_nothing(straight):
    folder, _ = straight
    before = (folder / "metrics.jsonl").read_text()
    result = run(folder, "--training.steps", "24")
    assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout
    assert (folder / "metrics.jsonl").read_text() == before


def test_two_identical_runs_have_identical_losses(straight, tmp_path):
    assert run(tmp_path / "run", "--training.steps", "24").returncode == 0
    assert losses(tmp_path / "run") == losses(straight[0])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["disabled", "async"])
def test_two_ranks_killed_in_mid_run_resume_to_the_last_bit(tmp_path, asynchronous):
    settings = ["--training.steps", "24", "--checkpoint.interval", "5", "--checkpoint.async_mode", asynchronous]
    assert run(tmp_path / "straight", *settings, ranks=2).returncode == 0
    kill_after_step(tmp_path / "killed", 13, *settings, ranks=2)
    result = run(tmp_path / "killed", *settings, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "step-000000" in result.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_within_1e_5(straight, tmp_path, before, after):
    settings = ["--training.steps", "24", "--checkpoint.interval", "4"]
    kill_after_step(tmp_path / "run", 5, *settings, ranks=before)
    result = run(tmp_path / "run", *settings, ranks=after)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), rel=1e-5)


def test_resume_with_another_global_batch_is_refused(straight):
    result = run(straight[0], "--training.steps", "30", "--training.global_batch_size", "8")
    assert result.returncode == 2
    assert "global_batch_size" in result.stderr and "Traceback" not in result.stderr


def test_resume_on_changed_data_says_what_differs(straight):
    result = run(straight[0], "--training.steps", "30", "--data.mode", "aligned")
    assert result.returncode == 2
    assert "mode" in result.stderr and "accept_changed" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.global_batch_size", "5", "--training.local_batch_size", "2"], ["nearest valid values are 4 and 6"]),
        (["--model.overrides.dim", "30", "--model.overrides.nun_layers", "2"], ["dim", "num_layers"]),
        (["--model.flavor", "8b"], ["8B"]),
        (["--model.freeze", '["nothing.*"]'], ["nothing.*"]),
        (["--data.source", "no/such/folder.npz"], ["no/such/folder.npz"]),
        (["--parallelism.data_parallel_shard_degree", "3"], ["data_parallel_shard_degree", "ranks"]),
        (["--checkpoint.init_from", "nowhere"], ["init_from", "nowhere"]),
        (["--model.overrides.vocab_size", "100"], ["vocab"]),
    ],
)
def test_a_run_that_cannot_work_exits_2_and_names_the_cause(tmp_path, arguments, words):
    result = run(tmp_path / "run", *arguments)
    assert result.returncode == 2, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    result = run(tmp_path / "run", "--model.freeze", '["tok_embeddings.*"]', "--training.steps", "2")
    assert result.returncode == 0, result.stderr
    (step,) = (tmp_path / "run" / "checkpoint").glob("step-*")
    names = FileSystemReader(step).read_metadata().state_dict_metadata
    moments = [name for name in names if name.startswith("optimizer.") and "tok_embeddings" in name]
    assert any("tok_embeddings" in name for name in names) and not moments


def test_losses_are_finite_and_fall(straight):
    curve = losses(straight[0])
    assert all(math.isfinite(loss) for loss in curve) and curve[-1] < curve[0]


def test_a_run_whose_loss_stays_not_finite_stops_and_leaves_its_checkpoint(tmp_path):
    settings = "--training.steps 9 --optimizer.lr 1e30 --training.max_skipped_steps 2 --checkpoint.interval 1"
    result = run(tmp_path / "run", *settings.split(), "--validation.enable", "false")
    assert result.returncode == 1
    assert "3 steps in a row were skipped" in result.stderr and "skipped: loss" in result.stdout and "A2929" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, True, True]


def test_a_warm_start_takes_the_weights_and_reports_what_it_left_out(straight, tmp_path):
    source = straight[0] / "checkpoint" / "step-00000024"
    settings = ["--checkpoint.init_from", str(source), "--checkpoint.init_allow_missing", '["output.weight"]']
    result = run(tmp_path / "run", *settings, "--model.overrides.vocab_size", "300", "--training.steps", "1")
    assert result.returncode == 2 and "tok_embeddings.weight" in result.stderr, "a shape that differs was not refused"
    result = run(tmp_path / "run", *settings[:3], '["nothing.*"]', "--training.steps", "1")
    assert result.returncode == 2 and "nothing.*" in result.stderr, "a pattern that matches nothing was not refused"
    result = run(tmp_path / "run", *settings[:2], "--training.steps", "1")
    assert result.returncode == 0, result.stderr
    assert str(source) in result.stdout
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
