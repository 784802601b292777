"""Refuse what cannot run before it starts: what is known from a configuration, a number of processes and one device.

WORLD_SIZE=8 python preflight.py --job.config_file train_configs/primate_8B.toml

No process group, no network, no memory taken; data is looked at where that takes moments. train.sh asks this before torchrun,
train.py and plan.py ask it themselves.
Exit status: 0 it can start, and the one line on stdout is its run folder; 2 something is to be mended.
"""

import sys

from torchtitan_bio import config_loader

if __name__ == "__main__":
    LOADED = config_loader.load_or_exit(sys.argv[1:])  # before torch is imported: --help and typos answer at once

import importlib
import importlib.util
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from torchtitan_bio import (
    assembly,
    checkpoint,
    context_parallel,
    costs,
    data,
    distributed,
    exits,
    metrics,
    models,
    parallelize,
    recompute,
)
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.data import recordings, sources


def main(loaded: config_loader.Loaded):
    config = loaded.config
    size, device = int(os.environ.get("WORLD_SIZE", 1)), distributed.own_device()
    architecture, _ = check(config, size, loaded.origin)
    problems, found, find = [], [], importlib.import_module(data.FAMILIES[config.model.name]).find
    with exits.collecting(problems):
        refuse_folder(config, architecture)
    with exits.collecting(problems):
        found.append(find(config.data.source, config.data.split, config.data.split_by))
    if config.validation.enable:
        with exits.collecting(problems):
            source = config.validation.source or config.data.source
            found.append(find(source, config.validation.split, config.data.split_by))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if all(is_read_in_moments(each, config.data.index_folder) for each in found):
        refuse_data(config, architecture, size)
    # Where a job is submitted there may be no accelerator, or another: each rank asks again for its own.
    is_here = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) == 1 and (device.type == "cuda" or "SLURM_JOB_ID" not in os.environ)
    if is_here:
        refuse_too_large(config, job_of(config, architecture, size, device), device)
    print(config_loader.run_folder(config))


def check(config: Config, world_size: int, origin: dict[str, str] | None = None):
    """The architecture and the global batch of a run that can work on so many ranks; every problem at once otherwise.

    origin, as Loaded has it, tells in which file and line each was written.
    """
    training, parallelism, problems = config.training, config.parallelism, []
    architecture = None
    with exits.collecting(problems):
        architecture = models.resolve(config.model.name, config.model.flavor, config.model.overrides)
    with exits.collecting(problems, "parallelism: "):
        distributed.degrees(
            world_size,
            parallelism.data_parallel_shard_degree,
            parallelism.data_parallel_replicate_degree,
            parallelism.context_parallel_degree,
        )
    if architecture and parallelism.context_parallel_degree > 1:
        with exits.collecting(problems, "parallelism: "):
            context_parallel.check(
                parallelism.context_parallel_method,
                parallelism.context_parallel_degree,
                seq_len=training.seq_len,
                num_kv_heads=architecture.num_kv_heads,
            )
    at_once = training.local_batch_size * max(1, world_size // parallelism.context_parallel_degree)
    global_batch_size = at_once if training.global_batch_size == "auto" else training.global_batch_size
    if global_batch_size % at_once:
        below = global_batch_size - global_batch_size % at_once
        problems.append(
            f"training.global_batch_size={global_batch_size} is not a multiple of local_batch_size * ranks = "
            f"{training.local_batch_size} * {at_once // training.local_batch_size}; nearest valid values are "
            f"{below or at_once} and {below + at_once}"
        )
    if config.data.mode == "legacy" and world_size > parallelism.context_parallel_degree:
        problems.append(f"data.mode=legacy is defined on one rank, not {world_size}; use stream")
    if config.data.num_workers and not importlib.util.find_spec("torchdata"):
        problems.append(f"data.num_workers={config.data.num_workers} needs torchdata: pip install torchdata, or set it to 0")
    tiles, num_tokens = config.activation_checkpoint.ffn_tiles, training.local_batch_size * training.seq_len
    num_tokens //= parallelism.context_parallel_degree
    if tiles != "auto" and tiles > num_tokens:
        problems.append(f"activation_checkpoint.ffn_tiles={tiles} is more than the {num_tokens} tokens that a rank holds")
    init_from, own = config.checkpoint.init_from, config_loader.run_folder(config) / "checkpoint"
    if init_from and not own.is_dir() and not Path(init_from).is_dir():
        problems.append(f"checkpoint.init_from={init_from} is not a folder")
    if not config.checkpoint.enable and any(re.fullmatch(r"step-\d{8}", path.name) for path in own.glob("step-*")):
        problems.append(
            f"checkpoint.enable=false, but {own} holds checkpoints; resume from them, or take another job.dump_folder"
        )
    if problems:
        raise ConfigError(*(with_origin(problem, origin or {}) for problem in problems))
    return architecture, global_batch_size


def with_origin(problem: str, origin: dict[str, str]) -> str:
    """A problem that begins with a key, behind the place where that key was set."""
    place = origin.get(re.match(r"[\w.]*", problem)[0], config_loader.DEFAULT)
    return problem if place == config_loader.DEFAULT else f"{place}: {problem}"


def job_of(config: Config, architecture, world_size: int, device: torch.device, device_bytes: int | None = None):
    """What costs.py must know of a checked run on so many devices like this one; None for a family without formulas."""
    if not costs.describes(architecture):
        return None
    training, section, parallelism = config.training, config.activation_checkpoint, config.parallelism
    replicate, shard = distributed.degrees(
        world_size,
        parallelism.data_parallel_shard_degree,
        parallelism.data_parallel_replicate_degree,
        parallelism.context_parallel_degree,
    )
    tiles, param_dtype = section.ffn_tiles, assembly.compute_dtype(config, device)
    if tiles == "auto":
        tiles = recompute.choose_tiles(
            training.local_batch_size * training.seq_len // parallelism.context_parallel_degree,
            architecture.dim,
            architecture.ffn_dim,
            param_dtype.itemsize,
            (device_bytes or metrics.device_memory_bytes(device)) // 16,
        )
    return costs.job(
        architecture,
        training,
        config.optimizer,
        parallelism,
        section,
        replicate=replicate,
        shard=shard,
        param_dtype="float32" if param_dtype == torch.float32 else "bfloat16",
        ffn_tiles=tiles,
        trained_share=trained_share(config, architecture),
        async_save=config.checkpoint.enable and config.checkpoint.async_mode == "async",
    )


def refuse_folder(config: Config, architecture):
    """ConfigError where the run cannot write its folder, or the disk cannot hold the checkpoints that are to come."""
    section, folder, problems = config.checkpoint, config_loader.run_folder(config) / "checkpoint", []
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"{folder} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    step, steps = checkpoint.newest_step(folder), config.training.steps
    if section.enable and step < steps:
        with exits.collecting(problems):
            with torch.device("meta"):
                model = models.build(config.model.name, architecture)
            parallelize.freeze(model, config.model.freeze)
            size = checkpoint.num_bytes(model, 2 if config.optimizer.state_dtype == "bfloat16" else 4)
            saves_ahead = -(-steps // section.interval) - step // section.interval
            checkpoint.refuse_full_disk(folder, size, saves_ahead, section.keep_latest_k)
    if problems:
        raise ConfigError(*problems)


def is_read_in_moments(found, index_folder: str) -> bool:
    """Whether what `find` found needs no index (a generator), has it already, or is too small for making it to take time."""
    if not isinstance(found, list) or sources.total_size(found) <= sources.IN_MEMORY_BYTES:
        return True
    return recordings.Recordings(found, index_folder).index_path.exists()


def refuse_data(config: Config, architecture, world_size: int):
    """ConfigError, as the run itself would have it, where the data cannot be read or has fewer windows than there are ranks."""
    data_size = world_size // config.parallelism.context_parallel_degree
    alone = SimpleNamespace(rank=0, local_rank=0, data_size=data_size, together=nullcontext)
    with exits.blaming_the_input():
        assembly.build_data(config, architecture, alone, say=lambda line: None)


def trained_share(config: Config, architecture) -> float:
    """Of the parameters, what model.freeze leaves."""
    if not config.model.freeze:
        return 1.0
    with torch.device("meta"), exits.blaming_the_input():
        model = models.build(config.model.name, architecture)
        parallelize.freeze(model, config.model.freeze)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def refuse_too_large(config: Config, job, device: torch.device) -> list[str]:
    """ConfigError for what this device, or its share of the host, cannot hold; warnings where job.must_fit is false."""
    if job is None:
        return []
    share_gib = metrics.host_memory_bytes() / costs.GIB / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu":
        needed_gib = (costs.peak(job).bytes + sum(costs.offloaded(job).values())) / costs.GIB  # the host is the device
        problems = [f"a process needs {needed_gib:.1f} GiB and its share is {share_gib:.1f}"] if needed_gib > share_gib else []
    else:
        problems = costs.check(job, metrics.device_memory_bytes(device) / costs.GIB, share_gib)
    if problems and config.job.must_fit:
        raise ConfigError(*problems, "plan.py says what would make it fit; job.must_fit=false tries it as it is")
    return problems


if __name__ == "__main__":
    sys.exit(exits.run(lambda: main(LOADED)))
