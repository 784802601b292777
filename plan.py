"""What a run will cost before it costs it: memory, time, disk, epochs; whether it fits. Needs no accelerator, no network.

python plan.py --job.config_file train_configs/primate_8B.toml --gpus 8 --gpu h100
python plan.py --job.config_file train_configs/primate_8B.toml --gpus 4 --gpu gh200 --training.seq_len 262144

Exit status: 0 it fits, 3 it does not, 2 the configuration is wrong.
"""

import sys
from argparse import RawDescriptionHelpFormatter

from torchtitan_bio import command_line, config_loader
from torchtitan_bio.chips import CHIPS, Chip


def read_own_flags(argv: list[str]):
    """(the flags of this script, the rest, which is configuration)."""
    parser = command_line.Parser(
        prog="plan.py",
        description=__doc__,
        epilog="All other arguments are configuration, --section.key VALUE: python train.py --help explains each.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, help="all GPUs of the run; default: one node")
    parser.add_argument("--gpu", choices=CHIPS, default="h100", help="mi250x is one GCD of 64 GB (default: h100)")
    parser.add_argument("--host-memory-gib", type=float, help="host memory of a node (default: a usual node's)")
    parser.add_argument("--no-trace", action="store_true", help="formulas only: milliseconds instead of seconds")
    flags, rest = parser.parse_known_args(argv)
    if flags.gpus is not None and flags.gpus < 1:
        parser.error(f"--gpus={flags.gpus} must be at least 1")
    if flags.host_memory_gib is not None and flags.host_memory_gib <= 0:
        parser.error(f"--host-memory-gib={flags.host_memory_gib} must be positive")
    return flags, rest


if __name__ == "__main__":
    FLAGS, REST = read_own_flags(sys.argv[1:])
    LOADED = config_loader.load_or_exit(REST)  # before torch is imported: --help and typos answer at once

import importlib
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import preflight
from torchtitan_bio import (
    attention,
    context_parallel,
    costs,
    data,
    exits,
    live_memory,
    models,
    parallelize,
    recompute,
    remedies,
)
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.costs import GIB
from torchtitan_bio.data import recordings, sources

NO_SHARE = 1024
"""Ranks over which a model is sharded so finely that a shard weighs nothing."""


def main(loaded: config_loader.Loaded, flags) -> int:
    config, chip = loaded.config, CHIPS[flags.gpu]
    gpus = flags.gpus or chip.gpus_per_node
    host_gib = chip.host_gib if flags.host_memory_gib is None else flags.host_memory_gib / min(gpus, chip.gpus_per_node)
    architecture, _ = preflight.check(config, gpus, loaded.origin)
    if not costs.describes(architecture):
        raise ConfigError(f"model.name={config.model.name}: plan.py has no formulas for this family")
    job = preflight.job_of(config, architecture, gpus, torch.device("cuda"), int(chip.memory_gib * GIB))
    kernel, note = rated_kernel(config.model.attention, flags.gpu, chip)

    name = config.job.config_file or "the defaults"
    print(f"{name} on {gpus} x {flags.gpu}: {chip.memory_gib:g} GiB each, and {host_gib:g} GiB of host memory each")
    print(f"{costs.parameters(job):,} parameters ({config.model.name} {config.model.flavor})")
    print(f"a step is {job.sequences:,} sequences of {job.seq_len:,} tokens, {job.microbatches} forward passes of a rank\n")
    with exits.blaming_the_input():
        report_memory(job, chip)
        if not flags.no_trace:
            report_trace(config, architecture, job)
        report_host(job, host_gib)
        seconds = report_time(job, chip, kernel, note)
        report_run(config, job, seconds)
    return report_verdict(job, chip, host_gib, kernel)


def rated_kernel(name: str, gpu: str, chip: Chip) -> tuple[str, str]:
    """(the kernel whose published rate stands for the configured one, what to say of it)."""
    kernels = list(chip.attention)
    if name == "auto":
        return kernels[0], f"published rates of {kernels[0]} on {gpu}"
    if name in kernels:
        return name, f"published rates of {name} on {gpu}"
    return kernels[-1], f"{name} has no published rate on {gpu}; {kernels[-1]}'s stand in, and are likely too high"


# ---- memory ----


def report_memory(job: costs.Job, chip: Chip):
    peak = costs.peak(job)
    print(f"memory of a GPU at its fullest, in {peak.moment}")
    terms = peak.terms | {"context and fragmentation": costs.CONTEXT_BYTES}
    for term, size in terms.items():
        row(term, size / GIB, "GiB")
    row("together", costs.device_bytes(job) / GIB, "GiB", f"of {chip.memory_gib:g}")


def report_trace(config: Config, architecture, job: costs.Job):
    started = time.perf_counter()
    traced = traced_bytes(config, architecture, job)
    closed = costs.peak(job).bytes
    row("without context, by formula", closed / GIB, "GiB")
    row("the same, traced", traced / GIB, "GiB", f"{traced / closed - 1:+.1%}, in {time.perf_counter() - started:.0f} s")
    print()


def traced_bytes(config: Config, architecture, job: costs.Job) -> float:
    """What a step of the very model that would be trained holds at most, counted operation by operation on fake tensors.

    The first rank of a pretended process group runs alone. Adam's moments, which exist from the first update on, are added.
    On a CPU host memory is like any other: what waits in it is taken off, and shards that live there are made tiny.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sharing = (1, NO_SHARE) if job.offload_states else (job.replicate, job.shard * job.context)
    kernel = attention.choose("auto", device=torch.device("cpu"), dtype=torch.float32, head_dim=architecture.head_dim)
    dist.init_process_group("fake", rank=0, world_size=sharing[0] * sharing[1], store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", sharing, mesh_dim_names=("replicate", "shard"))
        model, on_host = model_on_meta(config, architecture, job, kernel, mesh)
        with FakeTensorMode(allow_non_fake_inputs=True), live_memory.fused_norms(), live_memory.LiveMemory() as memory:
            model.to_empty(device="cpu")
            rows = torch.zeros(job.local_batch_size, job.seq_len, dtype=torch.uint8)
            inputs = {"tokens": rows, "labels": rows.to(torch.int16), "cu_seqlens": None}
            if job.context > 1:
                inputs = context_parallel.shard(inputs, 0, job.context, job.context_method)
            for _ in range(min(2, job.microbatches)):  # gradients are there from the second on
                memory.peak = memory.live
                sum(model(inputs).values()).backward()
        moments = 0 if job.offload_states else costs.states(job)["optimizer"]
        return memory.peak + moments - sum(host.allocated_bytes for host in on_host)
    finally:
        dist.destroy_process_group()


def model_on_meta(config: Config, architecture, job: costs.Job, kernel, mesh):
    """(the model as training builds it, in a GPU's compute type and without memory; the host memory that it uses)."""
    attend, kept = kernel, None
    group = dist.new_group(range(job.context)) if job.context > 1 else None
    if group and job.context_method == "ring":
        attend = context_parallel.Ring(attend, group)
    if job.recompute == "keep_attention":
        attend = kept = recompute.KeptAttention(attend, job.keep_on)
    if group and job.context_method == "ulysses":
        attend = context_parallel.Ulysses(attend, group)
    inputs_on_host = recompute.HostMemory() if job.offload_inputs else None
    with torch.device("meta"):
        model = models.build(config.model.name, architecture, attend=attend, ffn_tiles=job.ffn_tiles)
    parallelize.freeze(model, config.model.freeze)
    parallelize.parallelize(
        model,
        mesh,
        param_dtype=torch.float32 if job.compute_bytes == 4 else torch.bfloat16,
        reduce_dtype=torch.float32 if job.reduce_bytes == 4 else torch.bfloat16,
        recompute=job.recompute,
        compile_blocks=False,
        reshard_after_forward=job.reshard,
        kept_attention=kept,
        inputs_on_host=inputs_on_host,
    )
    return model, [host for host in (inputs_on_host, kept and kept.host) if host]


def report_host(job: costs.Job, host_gib: float):
    print("host memory of a process")
    for term, size in {"process": costs.HOST_BYTES, **costs.offloaded(job)}.items():
        row(term, size / GIB, "GiB")
    row("together", costs.host_bytes(job) / GIB, "GiB", f"of {host_gib:g}\n")


# ---- time, disk, data ----


def report_time(job: costs.Job, chip: Chip, kernel: str, note: str) -> float:
    """The seconds of a step."""
    parts = costs.step_seconds(job, chip, kernel)
    seconds = sum(parts.values())
    print(f"time of a step ({note})")
    for part, value in parts.items():
        row(part, value, "s")
    mfu = costs.mfu(job, chip, seconds)
    speed = job.tokens * job.microbatches / seconds
    row("together", seconds, "s", f"{speed:,.0f} tokens/s a GPU, {speed * job.ranks:,.0f} in all")
    row("MFU", 100 * mfu, "%", f"HFU {mfu * costs.hfu_factor(job):.1%}; attention is {costs.attention_share(job):.0%} of it\n")
    return seconds


def report_run(config: Config, job: costs.Job, seconds: float):
    steps, section = config.training.steps, config.checkpoint
    print("the run")
    row("days", steps * seconds / 86400, "", f"for {steps:,} steps, {steps * job.sequences * job.seq_len / 1e9:,.2f} G tokens")
    folder = config_loader.run_folder(config)
    if section.enable:
        size = costs.checkpoint_bytes(job)
        saves = -(-steps // section.interval)
        kept = saves if section.keep_latest_k == "all" else min(saves, section.keep_latest_k + 1)
        free = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free
        row("a checkpoint", size / GIB, "GiB")
        room = f"for up to {kept} at a time; {free / GIB:,.1f} GiB are free under {folder} here"
        row("checkpoints", kept * size / GIB, "GiB", room if free >= kept * size else f"{room}: too little")
    report_data(config, job, steps * job.sequences)
    print()


def report_data(config: Config, job: costs.Job, samples: int):
    reason = why_not_at_hand(config)
    if reason:
        print(f"  {'data':<34} skipped: {reason}")
        return
    dataset = training_data(config)
    takers = job.replicate * job.shard
    tokens = len(dataset) * job.seq_len
    row("tokens an epoch", tokens, "", f"{tokens / takers:,.0f} for each of {takers} rank(s)", digits=0)
    row("rows an epoch", len(dataset.index), "", f"{len(dataset.index) / takers:,.1f} for each", digits=0)
    row("epochs", samples / len(dataset), "")


def training_data(config: Config):
    settings = {name: value for name, value in asdict(config.data).items() if name not in ("num_workers", "accept_changed")}
    build = importlib.import_module(data.FAMILIES[config.model.name]).build
    return build(**settings, seq_len=config.training.seq_len, seed=config.training.seed)


def why_not_at_hand(config: Config) -> str:
    """Why the data's index cannot be had without a network or a pass over the data; empty where it can."""
    section = config.data
    if section.source.startswith("ring-hmm") or sources.is_store(section.source):
        return ""
    try:
        splits = sources.find_files(section.source, section.split)
    except ValueError as error:
        return str(error).partition(" (")[0]
    names = [section.split] if section.split_by == "given" else sorted(splits, reverse=True)
    files = [file for name in names for file in splits.get(name, [])]
    if sum(file.stat().st_size for file in files) <= sources.IN_MEMORY_BYTES:
        return ""
    folder = Path(section.index_folder or sources.default_cache())
    index = folder / f"index-v{recordings.INDEX_VERSION}-{sources.key_of(files)}.parquet"
    return "" if index.exists() else f"{section.source} has no index in {folder} yet; the first run makes it"


# ---- the verdict ----


def report_verdict(job: costs.Job, chip: Chip, host_gib: float, kernel: str) -> int:
    problems = costs.check(job, chip.memory_gib, host_gib)
    if not problems:
        print("verdict: fits")
        return 0
    print("verdict: does not fit", *problems, sep="\n  ")
    remedy = remedies.remedy(job, chip, chip.memory_gib, host_gib, kernel)
    if remedy is None:
        print("no set of switches makes it fit: take more GPUs, or a shorter training.seq_len")
        return 3
    before, after = (costs.step_time(each, chip, kernel) for each in (job, remedy.job))
    print("what makes it fit at the least cost, and what each adds to a step:")
    for change, seconds in zip(remedy.changes, remedy.seconds, strict=True):
        shown = ", ".join(f"{key}={value}" for key, value in change.settings.items())
        print(f"  {seconds:+6.1f} s ({seconds / before:+.1%})  {shown}")
    print(f"  then {costs.device_bytes(remedy.job) / GIB:.1f} GiB, and {after:.1f} s a step instead of {before:.1f}:")
    print("  " + " ".join(f"--{key} {value}" for key, value in remedy.settings.items()))
    return 3


def row(label: str, value: float, unit: str, note: str = "", digits: int = 2):
    print(f"  {label:<34}{value:>18,.{digits}f} {unit:<4}{note}".rstrip(" "))


if __name__ == "__main__":
    sys.exit(exits.run(lambda: main(LOADED, FLAGS)))
