"""What only an accelerator can show. Skipped, and so untested, where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_llama import largest_error, lively, train_once

from torchtitan_bio import attention, recompute
from torchtitan_bio.attention import by_definition
from torchtitan_bio.models import layers
from torchtitan_bio.models.llama3 import Architecture, Model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parent.parent
DEVICE = "cuda"


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


def test_initial_weights_are_those_of_the_cpu_but_for_the_last_bit_of_a_few():
    on_gpu, on_cpu = torch.empty(2**24, device="cuda"), torch.empty(2**24)
    for values in (on_gpu, on_cpu):
        layers.draw_normal(values, 0.02, seed=42, name="layers.0.attention.wq.weight")
    apart = (on_gpu.cpu().view(torch.int32) - on_cpu.view(torch.int32)).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-6


LARGE = Architecture(dim=512, num_layers=6, num_heads=8, num_kv_heads=2, ffn_dim=1792)


@pytest.mark.parametrize("keep_on", ["device", "host"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 100, 4096, 4097, 8192]])
def test_recomputed_kept_moved_to_the_host_and_in_tiles_gradients_are_the_plain_ones(keep_on, is_compiled, bounds):
    """Long enough that copies and computation overlap: a buffer that is used again too early shows as a large error."""
    chosen = attention.choose("auto", device=torch.device(DEVICE), dtype=torch.float32, head_dim=64, with_halves=True)
    kept, inputs_on_host = recompute.KeptAttention(chosen, keep_on), recompute.HostMemory()
    plain, model = (lively(Model(LARGE, *settings)).to(DEVICE) for settings in ((chosen,), (kept, 3)))
    for block in model.blocks():
        forward = torch.compile(block.forward) if is_compiled else block.forward
        block.forward = recompute.recomputed(forward, kept=kept, inputs=inputs_on_host)
    for step in range(4):
        drawn = torch.randint(0, 256, (2, 4097), generator=torch.Generator().manual_seed(step)).to(DEVICE)
        batch = {"tokens": drawn[:, :-1], "labels": drawn[:, 1:]}
        batch["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        assert largest_error(train_once(model, batch), train_once(plain, batch)) <= 1e-4
    assert inputs_on_host.allocated_bytes == LARGE.num_layers * 2 * 4096 * LARGE.dim * 4


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
