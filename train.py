"""Train a model. Read this first: main() builds everything in order, train_step() is the mathematics.

python train.py --job.config_file train_configs/quickstart.toml --training.steps 100
torchrun --nproc_per_node 8 train.py --job.config_file train_configs/primate_8B.toml
"""

import sys

from torchtitan_bio import config_loader

if __name__ == "__main__":
    LOADED = config_loader.load_or_exit(sys.argv[1:])  # before torch is imported: --help and typos answer at once

import contextlib
import gc
import importlib
import importlib.util
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import preflight
import torchtitan_bio
from torchtitan_bio import (
    attempt,
    attention,
    checkpoint,
    context_parallel,
    data,
    distributed,
    exits,
    metrics,
    models,
    optimizer,
    parallelize,
    profiling,
    recompute,
    resume,
    stop,
    work,
)
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.data import loader


def main(loaded: config_loader.Loaded):
    """One run, from its configuration to its last checkpoint and score."""
    config, training = loaded.config, loaded.config.training
    folder = config_loader.run_folder(config)
    stops = stop.Stops(folder, config.job.max_wall_s)  # from here on a signal is a wish
    size, device = int(os.environ.get("WORLD_SIZE", 1)), distributed.own_device()
    architecture, global_batch_size = preflight.check(config, size, loaded.origin)
    job = preflight.job_of(config, architecture, size, device)
    too_large = preflight.refuse_too_large(config, job, device)
    preflight.refuse_folder(config, architecture)
    world = join(config, folder)
    say = print_on_rank_0(world)
    say(f"{config.job.description or folder.name}: {world.size} rank(s) on {metrics.device_name(world.device)}")
    for warning in [*loaded.warnings, *too_large]:
        say(f"warning: {warning}")

    with exits.blaming_the_input():
        waits_s, stale_s = config.comm.init_timeout_seconds, 2 * config.comm.train_timeout_seconds
        this = attempt.begin(folder, world, limit_s=waits_s, stale_s=stale_s, say=say)
    with this:
        enter = this.watch.enter
        enter("reading the data", patient=True)
        with exits.blaming_the_input():
            train_data, held_out = build_data(config, architecture, world, say, stops)
        if stops.why:  # making an index can take an hour
            return this.leave(None, stops.why, is_saved=config.checkpoint.enable)
        enter("building the model")
        with exits.blaming_the_input():
            with world.together("building the model"):
                built = build_model(config, architecture, job, world, say)
                model = built.model
                adamw = optimizer.build(model, **asdict(config.optimizer))
            documents = {"data.json": {"train": train_data.summary(), "held_out": held_out.summary() if held_out else None}}
            identity = {"family": config.model.name, "flavor": config.model.flavor, "architecture": asdict(architecture)}
            state_of_run = partial(
                resume.train_state,
                global_batch_size=global_batch_size,
                seq_len=training.seq_len,
                fingerprint=train_data.fingerprint,
                config=asdict(config),
            )
            enter("loading a checkpoint", patient=True)
            checkpoints = open_checkpoints(config, folder, world, say)
            step, skipped_in_a_row = restore(config, checkpoints, model, adamw, identity, state_of_run, world, say)
            with world.together(f"writing into {folder}"):
                log = open_run_folder(folder, config, world, step, global_batch_size, say)
            samples = open_samples(folder, config, model, held_out, world, say)
        batches = read_from(step, train_data, config, global_batch_size, world)
        if step == training.steps:
            say(f"{folder} is finished: all {step} steps are done")
        else:
            this.runs(step)
            versions = {"torch": torch.__version__, "torchtitan_bio": torchtitan_bio.__version__}
            log.start(step, ranks=world.size, **versions, attention=built.kernel.record, attempt=attempt.number())
        # The score may be missing: of a run trained without validation, of one that was told to stop while it validated.
        is_known = held_out is not None and log.has_validation(step, resume.sha256(held_out.fingerprint))
        if (step == training.steps or step % config.validation.freq == 0) and not world.exchange(is_known)[0]:
            score(step, config, model, held_out, world, log, this, stops)
        stops.poll(world)
        gc.collect()
        gc.disable()  # collected below, on all ranks at once: one rank that pauses stalls the others
        with profiling.trace(folder / "profile", rank=world.rank, start_step=step, **asdict(config.profiling)) as profiler:
            while step < training.steps and not stops.why:
                enter("data", step + 1)
                log.start_step()
                microbatches = next(batches)
                log.data_ready()
                lr = config.optimizer.lr * optimizer.lr_factor(step, steps=training.steps, **asdict(config.lr_scheduler))
                optimizer.set_lr(adamw, lr)
                method = config.parallelism.context_parallel_method
                loss, grad_norm, taken = train_step(model, adamw, microbatches, world, training.max_norm, method, enter)
                step += 1
                totals = world.sum(work.count(config.model.name, architecture, job, microbatches, world) | stops.wishes())
                stops.hear(totals)  # the same on all ranks: they leave together
                moved_bytes = sum(host.moved_bytes for host in built.host_memories) if built.host_memories else None
                log.train(step, loss, grad_norm, lr, **work.mean(totals, world), moved_bytes=moved_bytes, skipped=not taken)
                skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
                if not taken:
                    report_skip(step, loss, grad_norm, microbatches, train_data, world, log, say)
                if skipped_in_a_row > training.max_skipped_steps:
                    checkpoints.wait()
                    raise FloatingPointError(f"{skipped_in_a_row} steps in a row were skipped; {training.max_skipped_steps=}")
                if log.steps_here == 1:
                    say(metrics.peak_memory_line(world.device, work.predict_peak(job, is_first=step == 1)))
                    distributed.set_timeout(world, config.comm.train_timeout_seconds)
                    this.watch.limit_s = config.comm.train_timeout_seconds
                if step % training.gc_freq == 0:
                    gc.collect()
                profiler.step()
                is_done = step == training.steps
                if not stops.why and (is_done or step % config.validation.freq == 0):
                    score(step, config, model, held_out, world, log, this, stops)
                if samples and not stops.why and (is_done or step % config.validation.generate_every == 0):
                    enter("sampling", patient=True)
                    samples.take(step)
                    stops.poll(world)
                is_last = is_done or stops.why is not None  # of this start: its save must succeed
                if config.checkpoint.enable and (is_last or step % config.checkpoint.interval == 0):
                    enter("save", patient=True)
                    this.check_lock()
                    state = state_of_run(step, skipped_in_a_row=skipped_in_a_row)
                    checkpoints.save(step, model, adamw, state, identity, documents=documents, is_last=is_last)
                    stops.save_s = checkpoints.last_save_s
        gc.enable()
        enter("save", patient=True)
        checkpoints.wait()
        log.close()
        if config.validation.enable and config.validation.baselines and world.rank == 0 and not stops.why:
            this.watch.rest()
            named(train_data.ladder)(folder / "ladder.json", train_data, held_out, log.last_validation)
        if stops.why and not config.checkpoint.enable:
            say("warning: checkpoint.enable=false, so nothing is saved")
        this.leave(step, stops.why, is_saved=config.checkpoint.enable)
    if world.rank == 0 and not stops.why:
        report(folder, train_data, say)


def join(config: Config, folder: Path):
    """The world of ranks, laid out as the configuration says."""
    return distributed.start(
        shard_degree=config.parallelism.data_parallel_shard_degree,
        replicate_degree=config.parallelism.data_parallel_replicate_degree,
        context_degree=config.parallelism.context_parallel_degree,
        init_timeout_s=config.comm.init_timeout_seconds,
        flight_folder=folder / "stacks",
    )


def train_step(
    model, adamw, microbatches, world, max_norm: float, context_method: str = "ulysses", enter=lambda phase: None
) -> tuple[float, float, bool]:
    """One optimizer step: the loss, the gradient's norm, and whether the step was taken.

    Ranks hold uneven numbers of targets, so a mean of means would be wrong: sums are divided by counts over all ranks and
    microbatches. A loss or gradient that is not finite is seen by all ranks alike, and all leave their weights as they are.
    enter: is told each phase.
    """
    enter("forward")
    counts = world.sum_of_data(add_counts(microbatches))
    adamw.zero_grad()
    total = torch.zeros((), device=world.device)
    for number, batch in enumerate(microbatches, start=1):
        enter("forward")
        model.set_requires_all_reduce(number == len(microbatches))  # replicas meet once a step
        sums = model(to_device(batch.inputs, world, context_method))
        loss = sum(term_sum / max(counts[term], 1) for term, term_sum in sums.items())
        enter("backward")
        (loss * world.size).backward()  # FSDP averages gradients over the ranks: undo it
        total += loss.detach()
    enter("optimizer")
    grad_norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    loss, grad_norm = world.sum_on_device(total).item(), grad_norm.item()
    taken = math.isfinite(loss) and math.isfinite(grad_norm)
    if taken:
        adamw.step()
    return loss, grad_norm, taken


@torch.no_grad()
def validate(
    model,
    dataset,
    world,
    scores,
    *,
    local_batch_size: int,
    max_windows: int | str = "all",
    context_method: str = "ulysses",
    is_to_stop=lambda: False,
) -> dict | None:
    """What `scores` makes of the exact finite set, or of a fixed subset of it: the same on any number of ranks.

    None once is_to_stop(), asked of all ranks together before each batch, says so.
    """
    subset = None if max_windows == "all" else loader.subset(len(dataset), max_windows)
    model.eval()
    for batch in loader.finite(
        dataset, local_batch_size=local_batch_size, rank=world.data_rank, world_size=world.data_size, subset=subset
    ):
        if is_to_stop():
            model.train()
            return None
        logits = model.logits(to_device(batch.inputs, world, context_method))
        if world.context_size > 1:
            logits = context_parallel.gather_sequence(logits, world.sequence["context"].get_group(), context_method)
        if world.context_rank == 0:  # the others of its sequence have the same logits
            scores.add(logits, batch)
    model.train()
    return scores.result(world.sum_array)


def add_counts(microbatches) -> dict[str, int]:
    totals = {}
    for batch in microbatches:
        for term, count in batch.counts.items():
            totals[term] = totals.get(term, 0) + count
    return totals


def to_device(inputs: dict, world, context_method: str) -> dict:
    """This rank's part of the tensors, on its device.

    Document boundaries stay on the CPU, where choosing a kernel reads them without waiting; as an array, since FSDP would move
    any tensor that it finds among the inputs.
    """
    if world.context_size > 1:
        inputs = context_parallel.shard(inputs, world.context_rank, world.context_size, context_method)
    return {
        name: value if value is None else value.numpy() if name == "cu_seqlens" else value.to(world.device, non_blocking=True)
        for name, value in inputs.items()
    }


def named(path: str):
    """The object that "package.module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def open_run_folder(folder: Path, config: Config, world, step: int, global_batch_size: int, say):
    """Open the log where `step` left it, and write down what this run was asked to do. Rank 0 alone writes.

    Nothing is touched before all that could refuse the run has agreed to it; a finished run keeps its record.
    """
    log = metrics.Metrics(
        folder,
        enabled=world.rank == 0,
        resume_step=step,
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


def read_from(step: int, train_data, config: Config, global_batch_size: int, world):
    """This rank's microbatches of each step to come."""
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
    )


@dataclass(frozen=True)
class Built:
    model: torch.nn.Module
    """Sharded, with its initial weights, which are the same for every number of ranks."""
    kernel: attention.Kernel
    host_memories: list[recompute.HostMemory]
    """In which tensors wait from forward to backward."""


def build_model(config: Config, architecture, job, world, say) -> Built:
    param_dtype = preflight.compute_dtype(config, world.device)
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
        reduce_dtype=preflight.DTYPES[config.training.mixed_precision_reduce],
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


def score(step: int, config: Config, model, held_out, world, log, this: attempt.Attempt, stops: stop.Stops):
    """Validate, where that is asked for, and write it down. Half a score is none: a run that is told to stop leaves it out."""
    if held_out is None:
        return
    section = config.validation
    size = config.training.local_batch_size if section.local_batch_size == "auto" else section.local_batch_size

    def is_to_stop() -> bool:
        this.watch.enter("validation", step)
        return stops.poll(world)

    started = time.perf_counter()
    scorer = named(held_out.scorer)(held_out)
    scores = validate(
        model,
        held_out,
        world,
        scorer,
        local_batch_size=size,
        max_windows=section.max_windows,
        context_method=config.parallelism.context_parallel_method,
        is_to_stop=is_to_stop,
    )
    if scores is None:
        return
    is_whole = section.max_windows == "all" or section.max_windows >= len(held_out)
    subset = "all" if is_whole else f"{section.max_windows} of {len(held_out)} windows, by hash"
    seconds = time.perf_counter() - started
    scores |= {"subset": subset, "held_out": resume.sha256(held_out.fingerprint), "seconds": seconds}
    log.validation(step, scores, headline=held_out.headline)


def open_samples(folder: Path, config: Config, model, held_out, world, say):
    """What makes pictures of generated activity while the model learns; None where none are asked for."""
    if held_out is None or config.validation.generate_every == "never":
        return None
    return named(held_out.sampler)(
        folder,
        held_out,
        model,
        dtype=preflight.compute_dtype(config, world.device),
        device=world.device,
        is_writer=world.rank == 0,
        tensorboard=config.metrics.enable_tensorboard,
        say=say,
    )


def report(folder: Path, train_data, say):
    """A page about the finished run. Whatever goes wrong with it is a warning: the run is done."""
    try:
        named(train_data.run_report)(folder, say)
    except Exception as error:
        say(f"warning: no report of this run: {type(error).__name__}: {error}")


def report_skip(step, loss, grad_norm, microbatches, train_data, world, log, say):
    """Name the rows of a step that no rank took."""
    rows = world.exchange([train_data.describe(origin) for batch in microbatches for origin in batch.origins])
    names = list(dict.fromkeys(row for of_rank in rows for row in of_rank))
    log.skip(step, names)
    shown = "; ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    say(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; its rows: {shown}")


def print_on_rank_0(world):
    def say(line: str):
        if world.rank == 0:
            print(line, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(exits.run(lambda: main(LOADED)))
