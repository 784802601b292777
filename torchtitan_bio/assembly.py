"""The parts of a run, each built as its configuration says: ranks, data, model, checkpoints, log.

What train.py's main() puts together in order. A family of models enters by the tables of models/ and data/ alone.
"""

import contextlib
import importlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from torchtitan_bio import (
    attention,
    checkpoint,
    config_loader,
    context_parallel,
    data,
    distributed,
    metrics,
    models,
    parallelize,
    recompute,
    resume,
    stop,
)
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.data import loader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type in which blocks compute on this device."""
    wanted = config.training.mixed_precision_param
    return DTYPES[wanted if wanted != "auto" else "float32" if device.type == "cpu" else "bfloat16"]


def join(config: Config, folder: Path):
    """The world of ranks, laid out as the configuration says."""
    return distributed.start(
        shard_degree=config.parallelism.data_parallel_shard_degree,
        replicate_degree=config.parallelism.data_parallel_replicate_degree,
        context_degree=config.parallelism.context_parallel_degree,
        init_timeout_s=config.comm.init_timeout_seconds,
        flight_folder=folder / "stacks",
    )


def build_data(config: Config, architecture, world, say, stops: stop.Stops | None = None):
    """The training data and the held-out data (None without validation), both None where stops.why says why.

    An index that is not there yet is made by rank 0, or where nodes do not share its folder by the first rank of each.
    """
    settings = asdict(config.data)
    for name in ("num_workers", "accept_changed"):
        settings.pop(name)
    build = importlib.import_module(data.FAMILIES[config.model.name]).build
    common = settings | {"seq_len": config.training.seq_len, "seed": config.training.seed}
    held_out_settings = common | {
        "source": config.validation.source or config.data.source,
        "split": config.validation.split,
        "mode": "aligned",
        "num_neurons": "all",
        "source_weights": {},
    }
    if config.validation.source not in ("", config.data.source):  # its sources have other names
        held_out_settings |= {"include_sources": [], "exclude_sources": []}
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    heed = {"heed": stops.heed} if stops else {}
    for now in range(3):
        with world.together("reading the data"), contextlib.suppress(stop.Stopped):
            if turn == now:
                train_data = build(**common, **heed)
                held_out = build(**held_out_settings, **heed, overlap=True) if config.validation.enable else None
        if stops and stops.poll(world):
            return None, None
    if train_data.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"model.overrides.vocab_size={architecture.vocab_size} is smaller than the data's, {train_data.vocab_size}"
        )
    if len(train_data) < world.data_size:
        raise ConfigError(
            f"{config.data.source} has {len(train_data)} training windows of training.seq_len={config.training.seq_len} for "
            f"{world.data_size} ranks; take fewer ranks, a shorter seq_len or more data"
        )
    for line in train_data.report():
        say(line)
    for line in held_out.report() if held_out else []:
        say(f"held-out {line}")
    return train_data, held_out


def read_from(step: int, train_data, config: Config, global_batch_size: int, world, tell=loader.say_nothing):
    """This rank's microbatches of each step to come. tell: see loader.read."""
    return loader.build(
        train_data,
        start_step=step,
        num_steps=config.training.steps,
        global_batch_size=global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=world.data_rank,
        world_size=world.data_size,
        num_workers=config.data.num_workers,
        timeout_s=config.comm.train_timeout_seconds,
        tell=tell,
    )


@dataclass(frozen=True)
class Built:
    model: torch.nn.Module
    """Sharded, with its initial weights, which are the same for every number of ranks."""
    kernel: attention.Kernel
    host_memories: list[recompute.HostMemory]
    """In which tensors wait from forward to backward."""


def build_model(config: Config, architecture, job, world, say) -> Built:
    param_dtype = compute_dtype(config, world.device)
    section, parallelism = config.activation_checkpoint, config.parallelism
    is_ring = world.context_size > 1 and parallelism.context_parallel_method == "ring"
    attend = kernel = attention.choose(
        config.model.attention,
        device=world.device,
        dtype=param_dtype,
        head_dim=architecture.head_dim,
        with_halves=is_ring or section.mode == "keep_attention",
    )
    say(f"attention: {kernel.name} ({kernel.why})")
    context = world.sequence["context"].get_group()
    if is_ring:
        attend = context_parallel.Ring(attend, context)
    kept = recompute.KeptAttention(attend, section.keep_on) if section.mode == "keep_attention" else None
    attend = kept or attend
    if world.context_size > 1 and not is_ring:
        attend = context_parallel.Ulysses(attend, context)  # what is kept are whole rows of some heads
    inputs_on_host = recompute.HostMemory() if section.offload_inputs else None
    with torch.device("meta"):
        tiles = {"ffn_tiles": job.ffn_tiles} if job else {}
        model = models.build(config.model.name, architecture, attend=attend, **tiles)
    frozen = parallelize.freeze(model, config.model.freeze)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"model: {config.model.name} {config.model.flavor}, {total:,} parameters, {trained:,} trained"
        + (f", {len(frozen)} tensors frozen" if frozen else "")
    )
    parallelize.parallelize(
        model,
        world.mesh,
        param_dtype=param_dtype,
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        recompute=section.mode,
        compile_blocks=config.compile.enable,
        reshard_after_forward=parallelism.fsdp_reshard_after_forward == "always",
        kept_attention=kept,
        inputs_on_host=inputs_on_host,
        offload_states=parallelism.offload_states,
    )
    parallelize.materialize(model, world.device, config.training.seed, offload_states=parallelism.offload_states)
    return Built(model, kernel, [host for host in (inputs_on_host, kept and kept.host) if host])


def open_checkpoints(config: Config, folder: Path, world, say) -> checkpoint.Checkpointer:
    return checkpoint.Checkpointer(
        folder / "checkpoint",
        world=world,
        keep_latest_k=config.checkpoint.keep_latest_k,
        asynchronous=config.checkpoint.async_mode == "async",
        on_error=config.checkpoint.on_save_error,
        say=say,
    )


def restore(config, checkpoints, model, adamw, identity, state_of_run, world, say) -> tuple[int, int]:
    """(the step to go on from, steps skipped in a row until there): of the newest valid checkpoint, or of fresh weights."""
    section, training = config.checkpoint, config.training
    found = checkpoints.latest() if section.enable else None
    if section.enable and not (found and found[1]["step"] == training.steps):
        step = found[1]["step"] if found else 0
        saves_ahead = -(-training.steps // section.interval) - step // section.interval
        moment_bytes = 2 if config.optimizer.state_dtype == "bfloat16" else 4
        checkpoints.preflight(checkpoint.num_bytes(model, moment_bytes), saves_ahead)
    if found:
        path, state = found
        now = state_of_run(state["step"], skipped_in_a_row=0)
        resume.check(path, state, now, steps=training.steps, accept_changed=config.data.accept_changed, say=say)
        checkpoints.load(path, model, adamw, identity)
        return state["step"], state["skipped_in_a_row"]
    if section.init_from:
        report = checkpoint.init_from(
            section.init_from,
            model,
            rename=section.init_rename,
            allow_missing=section.init_allow_missing,
            world=world,
            model_json=identity,
        )
        for line in report:
            say(line)
    return 0, 0


def open_run_folder(folder: Path, config: Config, world, step: int, global_batch_size: int, say):
    """Open the log where `step` left it, and write down what this run was asked to do. Rank 0 alone writes.

    Nothing is touched before all that could refuse the run has agreed to it; a finished run keeps its record.
    """
    log = metrics.Metrics(
        folder,
        enabled=world.rank == 0,
        resume_step=step,
        unwritten=metrics.unwritten(folder / "checkpoint" / f"step-{step:08d}") if world.rank == 0 else (),
        steps=config.training.steps,
        tokens_per_step=global_batch_size * config.training.seq_len,
        log_freq=config.metrics.log_freq,
        tensorboard=config.metrics.enable_tensorboard,
        device=world.device,
        ranks=world.size,
        say=say,
    )
    if world.rank == 0 and step < config.training.steps:
        written = folder / "config.toml.new"
        written.write_text(config_loader.dump(config))
        written.replace(folder / "config.toml")
    return log


def open_samples(folder: Path, config: Config, model, held_out, world, say):
    """What makes pictures of generated activity while the model learns; None where none are asked for."""
    if held_out is None or config.validation.generate_every == "never":
        return None
    return named(held_out.sampler)(
        folder,
        held_out,
        model,
        dtype=compute_dtype(config, world.device),
        device=world.device,
        is_writer=world.rank == 0,
        tensorboard=config.metrics.enable_tensorboard,
        say=say,
    )


def named(path: str):
    """The object that "package.module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
