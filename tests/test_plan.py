"""plan.py: its verdicts, what it recommends, and the trace behind its formulas."""

import dataclasses
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import plan
import preflight
from torchtitan_bio import config_loader, costs, remedies
from torchtitan_bio.chips import CHIPS
from torchtitan_bio.models import llama3

ROOT = Path(__file__).resolve().parents[1]
PLAIN_8B = ("--model.flavor", "8B", "--training.seq_len", "131072", "--data.source", "nowhere/at-hand")
FULL = ("--activation_checkpoint.mode", "full")
GIB = costs.GIB
JOB_8B = costs.Job(
    **{name: getattr(llama3.FLAVORS["8B"], name) for name in costs.ARCHITECTURE}, seq_len=131072, shard=8, adam_bytes=4
)


def job_8b(**changes):
    return dataclasses.replace(JOB_8B, **changes)


def run_script(*arguments):
    return subprocess.run([sys.executable, "plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def run_main(*arguments):
    flags, rest = plan.read_own_flags(list(arguments))
    return plan.main(config_loader.load(rest), flags)


# ---- the command


@pytest.mark.slow
def test_the_exit_status_tells_what_fits_what_does_not_and_what_is_wrong():
    expected = {
        ("--gpus", "8", "--gpu", "h100", *FULL): (0, "verdict: fits"),
        ("--gpus", "1", "--gpu", "h100", *FULL): (3, "verdict: does not fit\n  a GPU needs "),
        ("--gpus", "8", "--training.global_batch_size", "12"): (2, "nearest valid values are 8 and 16"),
    }
    with ThreadPoolExecutor() as together:
        ended = list(together.map(lambda arguments: run_script(*PLAIN_8B, "--no-trace", *arguments), expected))
    for run, (status, said) in zip(ended, expected.values(), strict=True):
        assert run.returncode == status and said in run.stdout + run.stderr, run.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--host-memory-gib", "-1"], "must be positive"),
        (["--gpus", "8", "--training.seq_length", "512"], "did you mean training.seq_len?"),
        (["--activation_checkpoint.offload_inputs", "true"], 'needs activation_checkpoint.mode "full" or "keep_attention"'),
    ],
)
def test_a_flag_or_setting_that_is_wrong_is_refused_before_torch_is_imported(arguments, complaint):
    started = time.perf_counter()
    refused = run_script(*arguments)
    assert refused.returncode == 2 and complaint in refused.stderr
    assert time.perf_counter() - started < 2


def test_help_shows_the_flags_of_its_own_and_says_that_the_rest_is_configuration():
    shown = run_script("--help")
    assert shown.returncode == 0
    assert all(flag in shown.stdout for flag in ("--gpus", "--gpu {h100,", "--host-memory-gib", "--no-trace"))
    assert "All other arguments are configuration" in shown.stdout


@pytest.mark.parametrize(
    ("gpus", "gpu", "settings"),
    [
        ("1", "h100", {}),
        ("4", "mi250x", {"--activation_checkpoint.mode": "full"}),
        ("8", "h100", {"--activation_checkpoint.ffn_tiles": "2", "--training.local_batch_size": "2"}),
        ("8", "h100", {"--training.seq_len": "1048576"}),
    ],
    ids=["one H100", "half a node of MI250X", "two sequences at once", "a million tokens"],
)
def test_the_command_line_that_it_recommends_fits(capsys, gpus, gpu, settings):
    """Given beside the settings that did not fit; where a key is in both, it replaces them."""
    flags = ["--gpus", gpus, "--gpu", gpu, "--no-trace"]
    settings = dict(zip(PLAIN_8B[::2], PLAIN_8B[1::2], strict=True)) | settings
    assert run_main(*flags, *itertools.chain(*settings.items())) == 3
    recommended = capsys.readouterr().out.splitlines()[-1].split()
    settings |= dict(zip(recommended[::2], recommended[1::2], strict=True))
    assert run_main(*flags, *itertools.chain(*settings.items())) == 0
    assert capsys.readouterr().out.endswith("verdict: fits\n")


def test_a_run_that_nothing_makes_fit_is_told_so(capsys):
    assert run_main(*PLAIN_8B, "--gpus", "1", "--host-memory-gib", "16", "--no-trace") == 3
    assert "no set of switches makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("primate_8B", ["--gpus", "4", "--gpu", "gh200"]),
        (
            "primate_8B",
            ["--gpus", "144", "--gpu", "gh200", "--parallelism.data_parallel_replicate_degree", "36"],
        ),
        ("primate_8B_h100", ["--gpus", "8", "--gpu", "h100"]),
        ("primate_8B_mi250x", ["--gpus", "8", "--gpu", "mi250x"]),
        ("primate_8B_mi250x", ["--gpus", "4", "--gpu", "mi250x", *FULL]),
        ("primate_8B_1gpu", ["--gpus", "1", "--gpu", "h100", "--host-memory-gib", "160"]),
        ("primate_8B_1M", ["--gpus", "8", "--gpu", "h100"]),
    ],
)
def test_a_recipe_fits_the_machine_that_it_is_for(recipe, flags):
    assert run_main("--job.config_file", str(ROOT / "train_configs" / f"{recipe}.toml"), *flags, "--no-trace") == 0


def test_epochs_and_tokens_are_those_of_the_data(capsys):
    run_main("--job.config_file", str(ROOT / "train_configs" / "quickstart.toml"), "--gpus", "2", "--no-trace")
    shown = capsys.readouterr().out
    config = config_loader.load(["--job.config_file", str(ROOT / "train_configs" / "quickstart.toml")]).config
    dataset = plan.training_data(config)
    assert f"{len(dataset) * config.training.seq_len:,}" in shown
    assert f"{config.training.steps * 2 * config.training.local_batch_size / len(dataset):,.2f}" in shown


# ---- the trace


def traced_and_predicted(gpus, arguments):
    config = config_loader.load(list(arguments)).config
    architecture, _ = preflight.check(config, gpus)
    job = preflight.job_of(config, architecture, gpus, torch.device("cuda"), 80 * GIB)
    return plan.traced_bytes(config, architecture, job), costs.peak(job).bytes


KEPT = "--activation_checkpoint.mode=keep_attention"
TILED = "--activation_checkpoint.ffn_tiles=4"
ON_HOST = ("--activation_checkpoint.offload_inputs=true", "--activation_checkpoint.keep_on=host")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--activation_checkpoint.mode=none"],
        ["--activation_checkpoint.mode=full"],
        [KEPT, TILED],
        [KEPT, TILED, *ON_HOST],
        [KEPT, TILED, *ON_HOST, "--parallelism.offload_states=true"],
        [KEPT, "--parallelism.context_parallel_degree=4", "--training.global_batch_size=6"],
        [KEPT, TILED, "--parallelism.context_parallel_degree=4", "--parallelism.context_parallel_method=ring"],
    ],
    ids=["nothing", "full", "tiles", "activations on the host", "all on the host", "ulysses", "ring"],
)
def test_trace_and_formula_agree_in_bf16_on_eight_ranks(arguments):
    sizes = ["dim=256", "num_layers=3", "num_heads=8", "num_kv_heads=4", "ffn_dim=896"]
    model = [f"--model.overrides.{size}" for size in sizes]
    traced, predicted = traced_and_predicted(8, [*model, "--training.seq_len=16384", *arguments])
    assert predicted == pytest.approx(traced, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [FULL, [KEPT, "--activation_checkpoint.ffn_tiles=8", *ON_HOST]], ids=["full", "all"])
def test_the_8b_is_traced_within_a_minute(arguments):
    started = time.perf_counter()
    traced, predicted = traced_and_predicted(8, [*PLAIN_8B, *arguments])
    assert time.perf_counter() - started < 60
    assert predicted == pytest.approx(traced, rel=0.01)


# ---- remedies


def test_a_remedy_fits_and_no_cheaper_exact_set_does():
    chip = CHIPS["mi250x"]
    found = remedies.remedy(job_8b(recompute="none"), chip, 64, 64)
    assert not costs.check(found.job, 64, 64)
    assert found.job.adam_bytes == 4
    by_hand = [
        job_8b(ffn_tiles=8),
        job_8b(ffn_tiles=8, offload_inputs=True),
        job_8b(ffn_tiles=8, recompute="keep_attention", keep_on="host"),
        job_8b(ffn_tiles=8, offload_inputs=True, recompute="keep_attention"),
    ]
    fitting = [job for job in by_hand if not costs.check(job, 64, 64)]
    assert fitting and all(costs.step_time(found.job, chip) <= costs.step_time(job, chip) + 1e-3 for job in fitting)


def test_the_prices_of_a_remedy_add_up_to_what_the_step_then_takes():
    job, chip = job_8b(recompute="none"), CHIPS["h100"]
    found = remedies.remedy(job, chip, 40, 256)
    assert len(found.changes) > 2
    assert sum(found.seconds) == pytest.approx(costs.step_time(found.job, chip) - costs.step_time(job, chip))


def test_bf16_moments_are_the_last_resort_and_some_jobs_have_no_remedy():
    alone, chip = job_8b(shard=1), CHIPS["h200"]
    assert remedies.STATE_DTYPE not in remedies.remedy(alone, chip, 139, 40).settings
    assert remedies.STATE_DTYPE in remedies.remedy(alone, chip, 110, 40).settings
    assert remedies.remedy(alone, chip, 10, 300) is None


def test_sharing_sequences_keeps_ranks_and_the_global_batch():
    changes = remedies.shared_sequences(job_8b(microbatches=2, shard=16))
    assert [change.job.context for change in changes] == [2, 4, 8, 16]
    for change in changes:
        assert (change.job.ranks, change.job.sequences) == (16, 32)
        assert costs.states(change.job) == costs.states(job_8b(shard=16))
        assert change.job.context_method == ("ring" if change.job.context == 16 else "ulysses")  # of 8 key-value heads


def job_with(*arguments):
    config = config_loader.load(["--job.config_file", str(ROOT / "train_configs/primate_8B.toml"), *arguments]).config
    return preflight.job_of(config, preflight.check(config, 8)[0], 8, torch.device("cuda"), 80 * GIB)


def test_what_is_frozen_has_neither_gradients_nor_moments():
    all_trained, one_part = job_with(), job_with("--model.freeze", '["tok_embeddings*", "layers.*", "norm*"]')
    assert one_part.trained_share == pytest.approx(256 * 4096 / costs.parameters(one_part), rel=1e-12)
    saved = costs.states(all_trained)["optimizer"] - costs.states(one_part)["optimizer"]
    assert saved == pytest.approx(8 / 8 * (costs.parameters(all_trained) - 256 * 4096))
    assert costs.peak(one_part).bytes <= costs.peak(all_trained).bytes - saved + 1


def test_an_asynchronous_save_needs_room_for_its_copy_on_the_host():
    beside, before = job_with(), job_with("--checkpoint.async_mode", "disabled")
    assert costs.host_bytes(beside) - costs.host_bytes(before) == pytest.approx(12 / 8 * costs.parameters(beside))
