"""Train a model. Read this first: main() builds everything in order, train_step() is the mathematics.

python train.py --job.config_file train_configs/quickstart.toml --training.steps 100
torchrun --nproc_per_node 8 train.py --job.config_file train_configs/primate_8B.toml
"""

import sys

from torchtitan_bio import config_loader, stop  # stop, because it asks who started this process while it is sure to be there

if __name__ == "__main__":
    LOADED = config_loader.load_or_exit(sys.argv[1:])  # before torch is imported: --help and typos answer at once

import contextlib
import gc
import math
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import preflight
import torchtitan_bio
from torchtitan_bio import (
    assembly,
    attempt,
    context_parallel,
    distributed,
    exits,
    metrics,
    optimizer,
    profiling,
    resume,
    work,
)
from torchtitan_bio.config import Config
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
    with stops.alone():
        world = assembly.join(config, folder)
    say = distributed.print_on_rank_0(world)
    say(f"{config.job.description or folder.name}: {world.size} rank(s) on {metrics.device_name(world.device)}")
    for warning in [*loaded.warnings, *too_large]:
        say(f"warning: {warning}")

    with exits.blaming_the_input():
        waits_s, stale_s = config.comm.init_timeout_seconds, 2 * config.comm.train_timeout_seconds
        this = attempt.begin(folder, world, limit_s=waits_s, stale_s=stale_s, say=say)
    with this, contextlib.ExitStack() as at_the_end:
        enter = this.watch.enter
        enter("reading the data", patient=True)
        with exits.blaming_the_input():
            train_data, held_out = assembly.build_data(config, architecture, world, say, stops)
        if stops.why:  # making an index can take an hour
            return this.leave(None, stops.why, is_saved=config.checkpoint.enable)
        enter("building the model")
        with exits.blaming_the_input():
            with world.together("building the model"):
                built = assembly.build_model(config, architecture, job, world, say)
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
            checkpoints = assembly.open_checkpoints(config, folder, world, say)
            step, skipped_in_a_row = assembly.restore(config, checkpoints, model, adamw, identity, state_of_run, world, say)
            with world.together(f"writing into {folder}"):
                log = assembly.open_run_folder(folder, config, world, step, global_batch_size, say)
                at_the_end.callback(log.close)
            samples = assembly.open_samples(folder, config, model, held_out, world, say)
        batches = assembly.read_from(step, train_data, config, global_batch_size, world, this.watch.tell)
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
                    named = documents | log.documents()
                    checkpoints.save(step, model, adamw, state, identity, documents=named, is_last=is_last)
                    stops.save_s = checkpoints.last_save_s
        gc.enable()
        enter("save", patient=True)
        checkpoints.wait()
        log.close()
        if stops.why and not config.checkpoint.enable:
            say("warning: checkpoint.enable=false, so nothing is saved")
        this.leave(step, stops.why, is_saved=config.checkpoint.enable)
    stops.end()
    if world.rank == 0 and not stops.why:
        look_back(folder, config, train_data, held_out, log.last_validation, say)


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
    tell=loader.say_nothing,
) -> dict | None:
    """What `scores` makes of the exact finite set, or of a fixed subset of it: the same on any number of ranks.

    None once is_to_stop(), asked of all ranks together before each batch, says so. tell: see loader.read.
    """
    subset = None if max_windows == "all" else loader.subset(len(dataset), max_windows)
    model.eval()
    for batch in loader.finite(
        dataset, local_batch_size=local_batch_size, rank=world.data_rank, world_size=world.data_size, subset=subset, tell=tell
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
    scorer = assembly.named(held_out.scorer)(held_out)
    scores = validate(
        model,
        held_out,
        world,
        scorer,
        local_batch_size=size,
        max_windows=section.max_windows,
        context_method=config.parallelism.context_parallel_method,
        is_to_stop=is_to_stop,
        tell=this.watch.tell,
    )
    if scores is None:
        return
    is_whole = section.max_windows == "all" or section.max_windows >= len(held_out)
    subset = "all" if is_whole else f"{section.max_windows} of {len(held_out)} windows, by hash"
    seconds = time.perf_counter() - started
    scores |= {"subset": subset, "held_out": resume.sha256(held_out.fingerprint), "seconds": seconds}
    log.validation(step, scores, headline=held_out.headline)


def look_back(folder: Path, config: Config, train_data, held_out, last_validation, say):
    """Baselines, where they are asked for, and a page about the finished run."""
    if held_out is not None and config.validation.baselines:
        with warning_of("no ladder of this run", say):
            assembly.named(train_data.ladder)(folder / "ladder.json", train_data, held_out, last_validation)
    with warning_of("no report of this run", say):
        assembly.named(train_data.run_report)(folder, say)


@contextlib.contextmanager
def warning_of(loss: str, say):
    """Whatever goes wrong in here is a warning: the run is done."""
    try:
        yield
    except Exception as error:
        say(f"warning: {loss}: {type(error).__name__}: {error}")


def report_skip(step, loss, grad_norm, microbatches, train_data, world, log, say):
    """Name the rows of a step that no rank took."""
    rows = world.exchange([train_data.describe(origin) for batch in microbatches for origin in batch.origins])
    names = list(dict.fromkeys(row for of_rank in rows for row in of_rank))
    log.skip(step, names)
    shown = "; ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    say(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; its rows: {shown}")


if __name__ == "__main__":
    sys.exit(exits.run(lambda: main(LOADED)))
