"""What only an accelerator can show. Skipped, and so untested, where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchtitan_bio import attention
from torchtitan_bio.attention import by_definition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parent.parent


def run(folder, *arguments):
    settings = ["--job.config_file", str(ROOT / "train_configs/debug.toml"), "--job.dump_folder", str(folder)]
    command = [sys.executable, str(ROOT / "train.py"), *settings, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"], result.stdout


def test_fp32_losses_on_the_gpu_are_the_golden_ones_of_the_cpu(tmp_path):
    golden = json.loads((ROOT / "tests/golden/debug_losses.json").read_text())["losses"]
    losses, _ = run(tmp_path / "run", "--training.steps", "24")
    assert losses[:20] == pytest.approx(golden, rel=1e-3)


def test_bf16_losses_follow_those_of_fp32(tmp_path):
    exact, _ = run(tmp_path / "fp32", "--training.steps", "10")
    rounded, _ = run(tmp_path / "bf16", "--training.steps", "10", "--training.mixed_precision_param", "bfloat16")
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != exact


@pytest.mark.parametrize("asynchronous", ["disabled", "async"])
def test_a_resumed_run_repeats_the_straight_one(tmp_path, asynchronous):
    settings = ["--training.steps", "12", "--checkpoint.interval", "4", "--checkpoint.async_mode", asynchronous]
    straight, _ = run(tmp_path / "straight", *settings)
    run(tmp_path / "resumed", *settings)
    (tmp_path / "resumed" / "checkpoint" / "step-00000012").rename(tmp_path / "gone")
    resumed, output = run(tmp_path / "resumed", *settings)
    assert "step-00000008" in output and len(resumed) == 12
    assert resumed == pytest.approx(straight, rel=1e-6)


@pytest.mark.parametrize("arguments", [["--compile.enable", "true"], ["--activation_checkpoint.mode", "full"]])
def test_compiled_or_recomputed_blocks_give_the_same_losses(tmp_path, arguments):
    settings = ["--training.steps", "5", "--validation.enable", "false"]
    plain, _ = run(tmp_path / "plain", *settings)
    other, _ = run(tmp_path / "other", *settings, *arguments)
    assert other == pytest.approx(plain, rel=1e-4)


def test_auto_takes_a_fused_kernel_and_says_why_not_the_others():
    kernel = attention.choose("auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    print(kernel.name, kernel.why)
    assert kernel.name in ("fa3", "cudnn", "flash")


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("bounds", [None, [0, 700, 1024, 1536, 2048]])
def test_kernels_equal_the_definition_in_bf16(name, bounds):
    kernel = attention.choose(name, device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 1024, 8, 128, generator=generator).bfloat16()
    k, v = (torch.randn(2, 1024, 2, 128, generator=generator).bfloat16() for _ in range(2))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    ours = [tensor.cuda().requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out, truth = kernel(*ours, cu_seqlens=cu_seqlens), by_definition(*exact, cu_seqlens=cu_seqlens)
    upstream = torch.randn(truth.shape, generator=generator).double()
    out.backward(upstream.bfloat16().cuda())
    truth.backward(upstream.bfloat16().double())
    for mine, true in zip((out, *(t.grad for t in ours)), (truth, *(t.grad for t in exact)), strict=True):
        assert ((mine.cpu().double() - true).abs().max() / true.abs().max()).item() < 2e-2
