"""Seconds, tokens/s, MFU and memory of a training step, one row a variant, all in one process and one table.

    python benchmarks/train_step.py --flavor 8B --layers 4 --seq_len 131072 \\
        "attention=flash recompute=full" "attention=cudnn recompute=full" "attention=cudnn recompute=full compile=true"

A variant is words of key=value: attention, recompute (none, full), compile (true, false), reshard (always, never). The model
has `layers` blocks of the flavor; MFU counts causal attention as half, and the peak is the vendor's dense bf16 rate.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from torchtitan_bio import assembly, config_loader, distributed, metrics, models, optimizer
from torchtitan_bio.data.batch import Batch
from torchtitan_bio.models import llama3

KEYS = {
    "attention": "model.attention",
    "recompute": "activation_checkpoint.mode",
    "compile": "compile.enable",
    "reshard": "parallelism.fsdp_reshard_after_forward",
}


def random_batch(local_batch_size: int, seq_len: int) -> Batch:
    tokens = torch.randint(0, 256, (local_batch_size, seq_len + 1), dtype=torch.uint8)
    inputs = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].to(torch.int16), "cu_seqlens": None}
    return Batch(inputs, {"next_token": local_batch_size * seq_len})


def measure(variant: str, arguments, architecture, world) -> dict:
    settings = [word.split("=") for word in variant.split()]
    argv = [text for key, value in settings for text in (f"--{KEYS[key]}", value)]
    config = config_loader.load(argv).config
    said = []
    model = assembly.build_model(config, architecture, None, world, said.append).model
    adamw = optimizer.build(model, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    batch = random_batch(arguments.local_batch_size, arguments.seq_len)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.warmup + arguments.steps):
        started = time.perf_counter()
        train.train_step(model, adamw, [batch], world, max_norm=1.0)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[arguments.warmup :])
    tokens = arguments.local_batch_size * arguments.seq_len
    flops = tokens * llama3.flops_per_token(architecture, arguments.seq_len)
    peak = metrics.peak_flops(metrics.device_name(world.device))
    return {
        "variant": variant,
        "kernel": said[0].split()[1],
        "seconds": median,
        "fastest": min(seconds[arguments.warmup :]),
        "tokens_per_s": tokens / median,
        "mfu": metrics.mfu(flops, median, peak),
        "memory_gib": metrics.peak_memory_gib(world.device),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--flavor", default="250M")
    parser.add_argument("--layers", type=int, help="default: the flavor's")
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--local_batch_size", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    world = distributed.start()
    architecture = models.resolve("llama3", arguments.flavor, {})
    if arguments.layers:
        architecture = replace(architecture, num_layers=arguments.layers)
    print(
        f"{metrics.device_name(world.device)}, torch {torch.__version__}: {arguments.flavor}, {architecture.num_layers} layers,"
    )
    print(
        f"{arguments.local_batch_size} x {arguments.seq_len} tokens; median of {arguments.steps} steps after {arguments.warmup}"
    )
    first = None
    for variant in arguments.variants:
        try:
            row = measure(variant, arguments, architecture, world)
        except torch.OutOfMemoryError:
            print(f"{variant:<44} out of memory", flush=True)
            row = None
        if row:
            first = first or row
            mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
            print(
                f"{variant:<44} {row['kernel']:<10} {row['seconds']:8.3f} s (fastest {row['fastest']:.3f})  "
                f"{row['tokens_per_s']:10,.0f} tokens/s  MFU {mfu:>6}  {row['memory_gib']:6.1f} GiB  "
                f"x{first['seconds'] / row['seconds']:.2f}",
                flush=True,
            )
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    distributed.stop()


if __name__ == "__main__":
    main()
