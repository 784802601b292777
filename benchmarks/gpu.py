"""What one accelerator does with the 8B's shapes at 131,072 tokens, in slices that each end well inside ten minutes.

    python benchmarks/gpu.py kernels     TFLOP/s of each attention kernel, forward and backward, checked against fp32
    python benchmarks/gpu.py probe       what model.attention = "auto" takes here, and why not the others
    python benchmarks/gpu.py block       a step of one block, the predecessor's and ours, and its memory beside plan.py's
    python benchmarks/gpu.py model       as many layers as fit, three steps
    python benchmarks/gpu.py longest     doubled sequences until memory or time runs out
    python benchmarks/gpu.py all [--json FILE]

What the chip lacks is skipped with the reason. Each slice checks what it times. Smaller shapes (--seq_len, --dim, ...) run
anywhere, also on a CPU: a rehearsal, whose figures mean nothing.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import preflight
import train
from benchmarks import peers
from torchtitan_bio import assembly, attention, config_loader, costs, distributed, kernels, metrics, optimizer, parallelize
from torchtitan_bio.data.batch import Batch
from torchtitan_bio.models import llama3

CHECKED = 64
"""The last queries of a row, for which a kernel is checked: what they give and get needs no other query."""
TOLERANCE = 2e-2  # of the largest value: bf16 has 8 bits
KEPT = ["activation_checkpoint.mode=keep_attention"]
TILED = [*KEPT, "activation_checkpoint.ffn_tiles=8"]
ON_HOST = [*TILED, "activation_checkpoint.offload_inputs=true"]
EVERYTHING = [*ON_HOST, "activation_checkpoint.keep_on=host"]
BLOCK_VARIANTS = {
    "full": ["activation_checkpoint.mode=full"],
    "keep_attention": KEPT,
    "keep_attention, 8 tiles": TILED,
    "keep_attention, 8 tiles, inputs on host": ON_HOST,
    "keep_attention on host, 8 tiles, inputs on host": EVERYTHING,
}


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device: torch.device, repeats: int = 3) -> float:
    """The median, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# ---- attention


def measure_kernels(shape, device, dtype) -> list[dict]:
    rows = []
    for name in attention.preference(device, dtype):
        if name == "math" and shape.seq_len > attention.MATH_LIMIT:
            rows.append({"kernel": name, "skipped": f"keeps all pairs of {shape.seq_len:,} tokens in memory"})
            continue
        try:
            kernel = attention.choose(name, device=device, dtype=dtype, head_dim=shape.architecture.head_dim)
        except ValueError as error:
            rows.append({"kernel": name, "skipped": str(error)})
            continue
        rows.append({"kernel": name} | time_kernel(kernel, shape, device, dtype))
    return rows


def time_kernel(kernel, shape, device, dtype) -> dict:
    a = shape.architecture
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, shape.seq_len, heads, a.head_dim, device=device, dtype=dtype, generator=generator)
        for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads, a.num_heads)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    forward_s = seconds_of(lambda: kernel(*inputs), device)
    out = kernel(*inputs)
    backward_s = seconds_of(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True), device)
    error = largest_error([out, *torch.autograd.grad(out, inputs, upstream)], by_chunk(q, k, v, upstream))
    if error > TOLERANCE:
        raise SystemExit(f"{kernel.name} differs from fp32 by {error:.2g} of the largest value, more than {TOLERANCE}")
    flops = 2 * shape.seq_len**2 * a.num_heads * a.head_dim  # two products of half of all pairs
    return {
        "forward_tflops": flops / forward_s / 1e12,
        "backward_tflops": 2.5 * flops / backward_s / 1e12,
        "forward_s": forward_s,
        "backward_s": backward_s,
        "error": error,
    }


@torch.no_grad()
def by_chunk(q, k, v, upstream) -> list[torch.Tensor]:
    """Output and gradients of the last CHECKED tokens in fp32. Only these queries look at these keys: attention is causal."""
    groups, tokens = q.shape[2] // k.shape[2], q.shape[1]
    q, grad = (tensor[0, -CHECKED:].float().unflatten(1, (-1, groups)) for tensor in (q, upstream))
    k, v = (tensor[0].float() for tensor in (k, v))
    scores = torch.einsum("qhgd,khd->hgqk", q, k) / q.shape[-1] ** 0.5
    position = torch.arange(tokens, device=q.device)
    weights = scores.masked_fill(position[-CHECKED:, None] < position, -torch.inf).softmax(-1)
    out = torch.einsum("hgqk,khd->qhgd", weights, v)
    of_weights = torch.einsum("qhgd,khd->hgqk", grad, v)
    of_scores = weights * (of_weights - (grad * out).sum(-1).permute(1, 2, 0)[..., None]) / q.shape[-1] ** 0.5
    return [
        out.flatten(1, 2),
        torch.einsum("hgqk,khd->qhgd", of_scores, k).flatten(1, 2),
        torch.einsum("hgqk,qhgd->khd", of_scores[..., -CHECKED:], q),
        torch.einsum("hgqk,qhgd->khd", weights[..., -CHECKED:], grad),
    ]


def largest_error(tensors, truths) -> float:
    last = (tensor[0, -CHECKED:].float() for tensor in tensors)
    return max(((mine - true).abs().max() / true.abs().max()).item() for mine, true in zip(last, truths, strict=True))


# ---- steps


def random_batch(seq_len: int) -> Batch:
    tokens = torch.randint(0, 256, (1, seq_len + 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].to(torch.int16), "cu_seqlens": None}
    return Batch(inputs, {"next_token": seq_len}, [(0, 0)])


def measure_step(architecture, settings: list[str], seq_len: int, world, *, repeats: int = 3) -> dict:
    """A training step of ours: seconds, causal MFU, and the measured peak beside plan.py's."""
    argv = [f"--{setting}" for setting in (*settings, f"training.seq_len={seq_len}")]
    config = config_loader.load(argv).config
    job = preflight.job_of(config, architecture, world.size, world.device)
    built = assembly.build_model(config, architecture, job, world, lambda line: None)
    row = time_steps(built.model, optimizer.build(built.model, **asdict(config.optimizer)), seq_len, world, repeats)
    predicted = costs.peak(job).bytes / costs.GIB
    row |= {"kernel": built.kernel.name, "predicted_gib": predicted}
    row["plan_error"] = predicted / row["peak_gib"] - 1 if row["peak_gib"] else None
    return row


def measure_predecessor(architecture, seq_len: int, world) -> dict:
    """Its block, told again: eager norms, complex rotations, repeated keys and values, torch's own choice of kernel."""
    kernels.restore_flash()  # an earlier slice may have left FA3 active, which is no choice of torch's
    with torch.device(world.device):
        model = peers.Predecessor(architecture)
    dtype = assembly.compute_dtype(config_loader.load([]).config, world.device)
    parallelize.parallelize(
        model,
        world.mesh,
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        recompute="full",
        compile_blocks=False,
        reshard_after_forward=False,
    )
    adamw = optimizer.build(model, lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    return time_steps(model, adamw, seq_len, world, 3) | {"kernel": "torch's choice"}


def time_steps(model, adamw, seq_len: int, world, repeats: int) -> dict:
    batch, device, losses = random_batch(seq_len), world.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: losses.append(train.train_step(model, adamw, [batch], world, 1.0)[0]), device, repeats=repeats)
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the same batch again and again, and its loss did not fall: {losses}")
    flops = llama3.flops_per_token(model.architecture, seq_len) * seq_len
    return {
        "tokens": seq_len,
        "layers": model.architecture.num_layers,
        "seconds": seconds,
        "tokens_per_s": seq_len / seconds,
        "mfu": metrics.mfu(flops, seconds, metrics.peak_flops(metrics.device_name(device))),
        "peak_gib": metrics.peak_memory_gib(device) if device.type == "cuda" else None,
    }


def attempt(function, world) -> dict:
    """What it returns, or why not; the memory it took is given back."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_block(shape, world) -> list[dict]:
    one = replace(shape.architecture, num_layers=1)
    rows = [{"variant": "predecessor"} | attempt(lambda: measure_predecessor(one, shape.seq_len, world), world)]
    for name, settings in BLOCK_VARIANTS.items():
        rows.append({"variant": name} | attempt(lambda: measure_step(one, settings, shape.seq_len, world), world))  # noqa: B023
        if "seconds" in rows[0] and "seconds" in rows[-1]:
            rows[-1]["times_the_predecessor"] = rows[0]["seconds"] / rows[-1]["seconds"]
    return rows


def measure_model(shape, world) -> list[dict]:
    """The most layers that plan.py's formula puts into this device, with inputs on the host, fp32 and bf16 moments."""
    rows, limit = [], metrics.device_memory_bytes(world.device)
    for state_dtype in ("float32", "bfloat16"):
        settings = [*ON_HOST, f"optimizer.state_dtype={state_dtype}", f"training.seq_len={shape.seq_len}"]
        config = config_loader.load([f"--{setting}" for setting in settings]).config
        for layers in range(shape.architecture.num_layers, 0, -1):
            architecture = replace(shape.architecture, num_layers=layers)
            if costs.device_bytes(preflight.job_of(config, architecture, world.size, world.device)) <= limit:
                break
        row = attempt(lambda: measure_step(architecture, settings[:-1], shape.seq_len, world, repeats=2), world)  # noqa: B023
        rows.append({"moments": state_dtype, "layers": layers} | row)
    return rows


def measure_longest(shape, world) -> list[dict]:
    """Two layers with everything on the host hold on the device what 32 do, but for parameters and moments."""
    two = replace(shape.architecture, num_layers=2)
    rows, seq_len, started, last_s = [], shape.seq_len, time.perf_counter(), 0.0
    while True:
        if (
            time.perf_counter() - started + 2 * 4 * last_s > shape.budget_s
        ):  # two steps of twice the length, four times the work
            return [*rows, {"tokens": seq_len, "skipped": f"would take longer than --budget_s={shape.budget_s}"}]
        rows.append(
            {"tokens": seq_len} | attempt(lambda: measure_step(two, EVERYTHING, seq_len, world, repeats=1), world)  # noqa: B023
        )
        if "skipped" in rows[-1]:
            return rows
        last_s, seq_len = rows[-1]["seconds"], 2 * seq_len


# ---- the report


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows)])


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "n/a" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", choices=["kernels", "probe", "block", "model", "longest", "all"])
    parser.add_argument("--seq_len", type=int, default=131072)
    parser.add_argument("--budget_s", type=float, default=420, help="of the slice `longest`")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    large = llama3.FLAVORS["8B"]
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
        parser.add_argument(f"--{name}", type=int, default=getattr(large, name))
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")}
    arguments.architecture = replace(large, **sizes)
    return arguments


def main():
    shape, world = read_arguments(), distributed.start()
    device, dtype = world.device, assembly.compute_dtype(config_loader.load([]).config, world.device)
    slices = {
        "kernels": lambda: measure_kernels(shape, device, dtype),
        "probe": lambda: [attention.choose("auto", device=device, dtype=dtype, head_dim=shape.architecture.head_dim).record],
        "block": lambda: measure_block(shape, world),
        "model": lambda: measure_model(shape, world),
        "longest": lambda: measure_longest(shape, world),
    }
    facts = {"date": str(date.today()), "device": metrics.device_name(device), "torch": torch.__version__}
    print(f"{facts['date']}, {facts['device']}, torch {facts['torch']}: python benchmarks/gpu.py {' '.join(sys.argv[1:])}\n")
    results = {}
    for name in slices if shape.slice == "all" else [shape.slice]:
        results[name] = slices[name]()
        print(f"### {name}\n\n{table(results[name])}\n", flush=True)
    if shape.json:
        shape.json.parent.mkdir(parents=True, exist_ok=True)
        shape.json.write_text(json.dumps(facts | results, indent=1))
    distributed.stop()


if __name__ == "__main__":
    main()
