"""Train a model. Read this first: main() builds everything in order, train_step() is the mathematics.

python train.py --job.config_file train_configs/quickstart.toml --training.steps 100
torchrun --nproc_per_node 8 train.py --job.config_file train_configs/primate_8B.toml
"""

import sys

from torchtitan_bio import config_loader

if __name__ == "__main__":
    LOADED = config_loader.load_or_exit(sys.argv[1:])  # before torch is imported: --help and typos answer at once

import gc
import hashlib
import importlib
import importlib.util
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from torchtitan_bio import attention, checkpoint, data, distributed, metrics, models, optimizer, parallelize, profiling
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.data import loader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(loaded: config_loader.Loaded):
    """One run, from its configuration to its last checkpoint and score."""
    config, training = loaded.config, loaded.config.training
    architecture, global_batch_size = check(config, int(os.environ.get("WORLD_SIZE", 1)))
    world = distributed.start(
        shard_degree=config.parallelism.data_parallel_shard_degree,
        replicate_degree=config.parallelism.data_parallel_replicate_degree,
        init_timeout_s=config.comm.init_timeout_seconds,
    )
    say = print_on_rank_0(world)
    folder = config_loader.run_folder(config)
    open_run_folder(folder, config, world)
    say(f"{config.job.description or folder.name}: {world.size} rank(s) on {metrics.device_name(world.device)}")
    for warning in loaded.warnings:
        say(f"warning: {warning}")

    with blaming_the_input():
        train_data, held_out = build_data(config, architecture, world, say)
        model = build_model(config, architecture, world, say)
        adamw = optimizer.build(model, **asdict(config.optimizer))
        checkpoints = checkpoint.Checkpointer(
            folder / "checkpoint",
            world=world,
            keep_latest_k=config.checkpoint.keep_latest_k,
            asynchronous=config.checkpoint.async_mode == "async",
            say=say,
        )
        identity = {"family": config.model.name, "flavor": config.model.flavor, "architecture": asdict(architecture)}
        step = restore(config, checkpoints, model, adamw, identity, train_data, global_batch_size, world, say)
        log = metrics.Metrics(
            folder,
            enabled=world.rank == 0,
            resume_step=step,
            steps=training.steps,
            tokens_per_step=global_batch_size * training.seq_len,
            log_freq=config.metrics.log_freq,
            tensorboard=config.metrics.enable_tensorboard,
            device=world.device,
            hfu_factor=4 / 3 if config.activation_checkpoint.mode == "full" else 1.0,
        )
    batches = loader.build(
        train_data,
        start_step=step,
        num_steps=training.steps,
        global_batch_size=global_batch_size,
        local_batch_size=training.local_batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.data.num_workers,
        timeout_s=config.comm.train_timeout_seconds,
    )
    if step == training.steps:
        say(f"{folder} is finished: all {step} steps are done")
    if step == 0:
        score(0, config, model, held_out, world, log)
    skipped_in_a_row = 0
    gc.collect()
    gc.disable()  # collected below, on all ranks at once: one rank that pauses stalls the others
    with profiling.trace(folder / "profile", rank=world.rank, start_step=step, **asdict(config.profiling)) as profiler:
        while step < training.steps:
            log.start_step()
            microbatches = next(batches)
            log.data_ready()
            lr = config.optimizer.lr * optimizer.lr_factor(step, steps=training.steps, **asdict(config.lr_scheduler))
            optimizer.set_lr(adamw, lr)
            loss, grad_norm, taken = train_step(model, adamw, microbatches, world, training.max_norm)
            step += 1
            flops = count_flops(config.model.name, architecture, microbatches)
            log.train(step, loss, grad_norm, lr, flops=flops, skipped=not taken)
            skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
            if not taken:
                report_skip(step, loss, grad_norm, microbatches, train_data, world, say)
            if skipped_in_a_row > training.max_skipped_steps:
                raise FloatingPointError(
                    f"{skipped_in_a_row} steps in a row were skipped, more than training.max_skipped_steps = "
                    f"{training.max_skipped_steps}; stopped at step {step}, the last checkpoint is untouched"
                )
            if log.steps_here == 1:
                distributed.set_timeout(world, config.comm.train_timeout_seconds)
            if step % training.gc_freq == 0:
                gc.collect()
            profiler.step()
            if step == training.steps or step % config.validation.freq == 0:
                score(step, config, model, held_out, world, log)
            if config.checkpoint.enable and (step == training.steps or step % config.checkpoint.interval == 0):
                state = train_state(config, step, global_batch_size, train_data)
                checkpoints.save(step, model, adamw, train_state=state, model_json=identity)
    gc.enable()
    checkpoints.wait()
    log.close()
    if config.validation.enable and config.validation.baselines and world.rank == 0:
        print_ladder(folder, train_data, held_out, log.headline)
    say(f"run folder: {folder}")


def train_step(model, adamw, microbatches, world, max_norm: float) -> tuple[float, float, bool]:
    """One optimizer step: the loss, the gradient's norm, and whether the step was taken.

    Ranks hold uneven numbers of targets, so a mean of means would be wrong: sums are divided by counts over all ranks and
    microbatches. A loss or gradient that is not finite is seen by all ranks alike, and all leave their weights as they are.
    """
    counts = world.sum(add_counts(microbatches))
    adamw.zero_grad()
    total = torch.zeros((), device=world.device)
    for batch in microbatches:
        sums = model(to_device(batch.inputs, world.device))
        loss = sum(term_sum / max(counts[term], 1) for term, term_sum in sums.items())
        (loss * world.size).backward()  # FSDP averages gradients over the ranks: undo it
        total += loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    loss, grad_norm = world.sum_on_device(total).item(), grad_norm.item()
    taken = math.isfinite(loss) and math.isfinite(grad_norm)
    if taken:
        adamw.step()
    return loss, grad_norm, taken


@torch.no_grad()
def validate(model, dataset, world, scores, *, local_batch_size: int, max_windows: int | str = "all") -> dict:
    """What `scores` makes of the exact finite set, or of a fixed subset of it: the same on any number of ranks."""
    subset = None if max_windows == "all" else loader.subset(len(dataset), max_windows)
    model.eval()
    for batch in loader.finite(
        dataset, local_batch_size=local_batch_size, rank=world.rank, world_size=world.size, subset=subset
    ):
        scores.add(model.logits(to_device(batch.inputs, world.device)), batch)
    model.train()
    return scores.result(world.sum_array)


def add_counts(microbatches) -> dict[str, int]:
    totals = {}
    for batch in microbatches:
        for term, count in batch.counts.items():
            totals[term] = totals.get(term, 0) + count
    return totals


def to_device(inputs: dict, device: torch.device) -> dict:
    """Tensors on the device; document boundaries stay on the CPU, where choosing a kernel reads them without waiting."""
    return {
        name: value if value is None or name == "cu_seqlens" else value.to(device, non_blocking=True)
        for name, value in inputs.items()
    }


def named(path: str):
    """The object that "package.module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def check(config: Config, world_size: int):
    """The architecture and the global batch of a run that can work on so many ranks; every problem at once otherwise."""
    training, problems, architecture = config.training, [], None
    try:
        architecture = models.resolve(config.model.name, config.model.flavor, config.model.overrides)
    except ValueError as error:
        problems += str(error).split("\n")
    try:
        distributed.degrees(
            world_size,
            config.parallelism.data_parallel_shard_degree,
            config.parallelism.data_parallel_replicate_degree,
        )
    except ValueError as error:
        problems.append(f"parallelism: {error}")
    at_once = training.local_batch_size * world_size
    global_batch_size = at_once if training.global_batch_size == "auto" else training.global_batch_size
    if global_batch_size % at_once:
        below = global_batch_size - global_batch_size % at_once
        problems.append(
            f"training.global_batch_size={global_batch_size} is not a multiple of local_batch_size * ranks = "
            f"{training.local_batch_size} * {world_size}; nearest valid values are {below or at_once} and {below + at_once}"
        )
    if config.data.mode == "legacy" and world_size > 1:
        problems.append(f"data.mode=legacy is defined on one rank, not {world_size}; use stream")
    if config.data.num_workers and not importlib.util.find_spec("torchdata"):
        problems.append(f"data.num_workers={config.data.num_workers} needs torchdata: pip install torchdata, or set it to 0")
    init_from, own = config.checkpoint.init_from, config_loader.run_folder(config) / "checkpoint"
    if init_from and not own.is_dir() and not Path(init_from).is_dir():
        problems.append(f"checkpoint.init_from={init_from} is not a folder")
    if problems:
        raise ConfigError(*problems)
    return architecture, global_batch_size


def open_run_folder(folder: Path, config: Config, world):
    """Rank 0 makes the run folder and writes the resolved configuration into it."""
    with world.together(f"writing {folder}/config.toml"):
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(config_loader.dump(config))


def build_data(config: Config, architecture, world, say):
    """The training data and the held-out data (None without validation). Rank 0 makes the index, the others read it."""
    settings = asdict(config.data)
    for name in ("num_workers", "accept_changed"):
        settings.pop(name)
    family = data.FAMILIES[config.model.name]
    build = importlib.import_module(family).build
    common = settings | {"seq_len": config.training.seq_len, "seed": config.training.seed}
    held_out_settings = common | {
        "source": config.validation.source or config.data.source,
        "split": config.validation.split,
        "mode": "aligned",
        "num_neurons": "all",
        "source_weights": {},
    }
    for turn in (world.rank == 0, world.rank != 0):
        with world.together("reading the data"):
            if turn:
                train_data = build(**common)
                held_out = build(**held_out_settings, overlap=True) if config.validation.enable else None
    if train_data.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"model.overrides.vocab_size={architecture.vocab_size} is smaller than the data's, {train_data.vocab_size}"
        )
    for line in train_data.report():
        say(line)
    for line in held_out.report() if held_out else []:
        say(f"held-out {line}")
    return train_data, held_out


def build_model(config: Config, architecture, world, say):
    """The sharded model with its initial weights, which are the same for every number of ranks."""
    param_dtype = config.training.mixed_precision_param
    if param_dtype == "auto":
        param_dtype = "float32" if world.device.type == "cpu" else "bfloat16"
    kernel = attention.choose(
        config.model.attention, device=world.device, dtype=DTYPES[param_dtype], head_dim=architecture.head_dim
    )
    say(f"attention: {kernel.name} ({kernel.why})")
    with torch.device("meta"):
        model = models.build(config.model.name, architecture, attend=kernel)
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
        param_dtype=DTYPES[param_dtype],
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        recompute=config.activation_checkpoint.mode,
        compile_blocks=config.compile.enable,
        reshard_after_forward=config.parallelism.fsdp_reshard_after_forward == "always",
    )
    parallelize.materialize(model, world.device, config.training.seed)
    return model


def restore(config, checkpoints, model, adamw, identity, train_data, global_batch_size, world, say) -> int:
    """The step to go on from: of the newest valid checkpoint, or 0 with fresh or borrowed weights."""
    if not config.checkpoint.enable:
        found = None
    else:
        found = checkpoints.latest()
        checkpoints.preflight(checkpoint.num_bytes(model))
    if found:
        path, state = found
        check_same_run(path, state, config, global_batch_size, train_data.fingerprint, say)
        checkpoints.load(path, model, adamw, identity)
        return state["step"]
    if config.checkpoint.init_from:
        source, section = config.checkpoint.init_from, config.checkpoint
        for line in checkpoint.init_from(
            source,
            model,
            rename=section.init_rename,
            allow_missing=section.init_allow_missing,
            world=world,
            model_json=identity,
        ):
            say(line)
    return 0


def check_same_run(path: Path, state: dict, config: Config, global_batch_size: int, fingerprint: dict, say):
    """Refuse to go on with other data, another batch, or fewer steps than are done."""
    problems = []
    if state["step"] > config.training.steps:
        problems.append(f"training.steps={config.training.steps}, but {path} is already at step {state['step']}")
    if state["global_batch_size"] != global_batch_size:
        problems.append(
            f"global_batch_size is {global_batch_size} here and {state['global_batch_size']} in {path}: samples would repeat "
            f"or be skipped; set training.global_batch_size={state['global_batch_size']}, or start another run folder"
        )
    old, keys = state["fingerprint"], sorted(state["fingerprint"].keys() | fingerprint.keys())
    changes = [f"{key}: {old.get(key)} -> {fingerprint.get(key)}" for key in keys if old.get(key) != fingerprint.get(key)]
    difference = f"the data is not that of {path}: {'; '.join(changes)}"
    if changes and config.data.accept_changed:
        say(f"warning: {difference} (data.accept_changed)")
    elif changes:
        problems.append(f"{difference}; mend it, start another run folder, or set data.accept_changed=true")
    if problems:
        raise ConfigError(*problems)


def train_state(config: Config, step: int, global_batch_size: int, train_data) -> dict:
    """All that a run needs, beside weights and moments, to go on as if it had never stopped: one integer and what it means."""
    return {
        "step": step,
        "next_sample": step * global_batch_size,
        "global_batch_size": global_batch_size,
        "tokens": step * global_batch_size * config.training.seq_len,
        "fingerprint": train_data.fingerprint,
        "config_sha256": hashlib.sha256(config_loader.dump(config).encode()).hexdigest(),
    }


def score(step: int, config: Config, model, held_out, world, log):
    """Validate, where that is asked for, and write it down."""
    if held_out is None:
        return
    section = config.validation
    size = config.training.local_batch_size if section.local_batch_size == "auto" else section.local_batch_size
    started = time.perf_counter()
    scorer = named(held_out.scorer)(held_out)
    scores = validate(model, held_out, world, scorer, local_batch_size=size, max_windows=section.max_windows)
    subset = "all" if scores["windows"] == len(held_out) else f"{scores['windows']} of {len(held_out)} windows, by hash"
    scores |= {"subset": subset, "seconds": time.perf_counter() - started}
    log.validation(step, scores, headline=held_out.headline)


def count_flops(family: str, architecture, microbatches) -> float:
    """FLOPs of this rank's part of a step: each document costs what its own length costs."""
    per_token = importlib.import_module(models.FAMILIES[family]).flops_per_token
    total = 0.0
    for batch in microbatches:
        num_rows, seq_len = batch.inputs["tokens"].shape
        bounds = batch.inputs["cu_seqlens"]
        lengths = [seq_len] * num_rows if bounds is None else bounds.diff().tolist()
        total += sum(length * per_token(architecture, length) for length in lengths)
    return total


def report_skip(step, loss, grad_norm, microbatches, train_data, world, say):
    """Name the rows of a step that no rank took."""
    rows = world.gather([train_data.describe(origin) for batch in microbatches for origin in batch.origins])
    if world.rank == 0:
        names = list(dict.fromkeys(row for of_rank in rows for row in of_rank))
        shown = "; ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        say(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; its rows: {shown}")


def print_ladder(folder: Path, train_data, held_out, headline):
    """The model's held-out score among the baselines, which are fitted once and kept beside the run."""
    path = folder / "ladder.json"
    if not path.exists():
        path.write_text(json.dumps(named(train_data.baselines)(train_data, held_out)))
    name, value = headline
    if value is None:
        return print(f"the held-out data has no {name}: no ladder")
    print(f"\nheld-out {name.replace('_per_', '/')}")
    for label, number in sorted([*json.loads(path.read_text()), ["this model", value]], key=lambda rung: rung[1]):
        print(f"  {label:<44}{number:8.3f}")


def print_on_rank_0(world):
    def say(line: str):
        if world.rank == 0:
            print(line, flush=True)

    return say


@contextmanager
def blaming_the_input():
    """While a run is built, what is refused is something that its user can mend."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(error) from error


def exit_code(loaded: config_loader.Loaded) -> int:
    """Run. 2 for what a user can mend in the configuration or the data; a traceback, and 1, for everything else."""
    try:
        main(loaded)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("this run cannot work:", *error.problems, sep="\n  ", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(LOADED))
