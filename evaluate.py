"""What a trained model's held-out score is, beside baselines and, where it is known, the best possible one.

python evaluate.py --checkpoint outputs/quickstart
torchrun --nproc_per_node 8 evaluate.py --checkpoint outputs/primate_8B --data eminorhan/neural-pile-primate --by source_dataset
python evaluate.py --checkpoint outputs/ring_hmm --all-checkpoints --data ring-hmm:n=8,K=16,p=0.1,bins=32
python evaluate.py --checkpoint outputs/quickstart --rollouts 32       # and how far ahead it knows the future

Leaves evaluation.json and pictures. Exit status: 0 done, 2 something is to be mended in what was asked, 1 any other failure.
"""

import sys
from argparse import RawDescriptionHelpFormatter

from torchtitan_bio import command_line, config_loader
from torchtitan_bio.science.units import GROUPINGS


def read_own_flags(argv: list[str]):
    """(the flags of this script, the rest, which is configuration)."""
    parser = command_line.Parser(
        prog="evaluate.py",
        description=__doc__,
        epilog="All other arguments are configuration, --section.key VALUE: python train.py --help explains each. Without "
        "--job.config_file it is the run's own, but for [parallelism], which is of the processes that evaluate.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a run folder, a step folder, or a folder of Hugging Face's")
    parser.add_argument("--all-checkpoints", action="store_true", help="of a run folder: every one, as a learning curve")
    parser.add_argument("--data", help="as data.source in a config (default: what the run holds out)")
    parser.add_argument("--split", help="of the data (default: the run's, else test)")
    parser.add_argument("--by", choices=GROUPINGS, default=GROUPINGS[0], help="scores for each of these, too")
    parser.add_argument("--windows", type=int, help="score so many, chosen by hash (default: every held-out count once)")
    parser.add_argument("--batch", type=int, help="windows a process reads at once (default: as in training)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out what is fitted to the training split")
    ahead = parser.add_argument_group("forecasts: the model goes on by itself (off by default, because it takes long)")
    ahead.add_argument("--rollouts", type=int, help="of each prompt, whose mean is the forecast; 32 is a start")
    ahead.add_argument("--horizon", type=int, help="bins to forecast (default: half a window, 25 at most)")
    ahead.add_argument(
        "--context", type=int, help="bins seen before (default: half a window, or what the horizon leaves of it)"
    )
    ahead.add_argument("--prompts", type=int, help="windows to forecast in, by hash (default: 64)")
    parser.add_argument("--out", help="a folder for what is left (default: evaluation in the run folder)")
    flags, rest = parser.parse_known_args(argv)
    for name in ("windows", "batch", "rollouts", "horizon", "context", "prompts"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name}={getattr(flags, name)} must be at least 1")
    for name in ("horizon", "context", "prompts"):
        if getattr(flags, name) is not None and flags.rollouts is None:
            parser.error(f"--{name} is of a forecast; give --rollouts too, 32 for a start")
    return flags, rest


if __name__ == "__main__":
    FLAGS, REST = read_own_flags(sys.argv[1:])
    LOADED = config_loader.load_or_exit(REST)  # before torch is imported: --help and typos answer at once

import dataclasses
import gc
import importlib
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import preflight
import train
from torchtitan_bio import assembly, attention, context_parallel, data, distributed, exits, models
from torchtitan_bio.checkpoint import commit
from torchtitan_bio.config import Checkpoint, Config, ConfigError, Data
from torchtitan_bio.data import loader, ring_hmm, sources
from torchtitan_bio.science import baselines, contamination, evaluation, forecast, sampling, score_plots, trained

OF_THE_RUN = ("data", "training", "validation")
OF_THIS_PROCESS = ("measured", "numbers", "forecast_nats")  # entries of a record that are not written


def main(loaded: config_loader.Loaded, flags):
    with exits.blaming_the_input():
        found = trained.find(flags.checkpoint)
        config = settle(loaded, found, flags)
        folder = out_folder(found, flags)
        steps = steps_of(found, flags)
        size, parallelism = int(os.environ.get("WORLD_SIZE", 1)), config.parallelism
        architecture, _ = preflight.check(config, size, loaded.origin)
    world = distributed.start(
        shard_degree=parallelism.data_parallel_shard_degree,
        replicate_degree=parallelism.data_parallel_replicate_degree,
        context_degree=parallelism.context_parallel_degree,
        init_timeout_s=config.comm.init_timeout_seconds,
    )
    say = distributed.print_on_rank_0(world)
    with exits.blaming_the_input():
        with world.together("making the folder of results"):
            if world.rank == 0:
                sources.make_folder(folder, "--out names another folder")
        dtype = assembly.compute_dtype(config, world.device)
        attend = choose_attention(config, architecture.head_dim, world, dtype, say)
        held_out = build_held_out(config, world)
        for line in held_out.report():
            say(f"held-out {line}")
        if held_out.vocab_size > architecture.vocab_size:
            raise ConfigError(
                f"the model knows {architecture.vocab_size} tokens, and {config.data.source} {held_out.vocab_size}"
            )
        if found.seq_len and config.training.seq_len > found.seq_len:
            say(
                f"warning: windows of {config.training.seq_len:,} tokens, and the model was trained on {found.seq_len:,}: it "
                "has never met the positions beyond"
            )
        places = choose_places(held_out, flags) if flags.rollouts else None
    records, refused = [], []
    for step in steps:
        try:
            with exits.blaming_the_input():
                model, line = trained.load(replace(found, path=step), world=world, param_dtype=dtype, attend=attend)
        except ConfigError as why:  # on all ranks alike
            if not flags.all_checkpoints:
                raise
            refused.append(str(why))
            continue
        say(line)
        records.append(measure(model, line, held_out, config, flags, world))
        if places:
            records[-1] |= look_ahead(model, held_out, places, flags, world, dtype, say)
        del model
        gc.collect()
    distributed.stop()
    if not records:
        raise ConfigError(f"no checkpoint of {found.path} can be read", *refused)
    if world.rank == 0:
        finish(folder, records, refused, held_out, places, found, config, flags)


def settle(loaded: config_loader.Loaded, found, flags) -> Config:
    """The run's own configuration, or that of the TOML given, under the command line; the model is the checkpoint's."""
    config = loaded.config
    of_command_line = {key for key, origin in loaded.origin.items() if origin.endswith(config_loader.COMMAND_LINE)}
    if found.config and not config.job.config_file:
        sections = {}
        for name in OF_THE_RUN:
            section = getattr(config, name)
            kept = {key: value for key, value in found.config[name].items() if f"{name}.{key}" not in of_command_line}
            unknown = kept.keys() - {field.name for field in dataclasses.fields(section)}
            if unknown:
                raise ConfigError(
                    f"{found.path} is of another version: {name}.{min(unknown)} is no setting now; give --job.config_file"
                )
            sections[name] = replace(section, **kept)
        config = replace(config, **sections)
    elif not config.job.config_file and found.seq_len and "training.seq_len" not in of_command_line:
        config = replace(config, training=replace(config.training, seq_len=found.seq_len))
    if not (found.config or config.job.config_file or flags.data or "data.source" in of_command_line):
        raise ConfigError(f"nothing says what {found.path} was trained on: give --data")
    own, validation = config.validation.source or config.data.source, replace(config.validation, source="")
    if flags.split:
        validation = replace(validation, split=flags.split)
    section = replace(config.data, source=own)
    if flags.data or own != config.data.source:  # of other data than was trained on, whose sources have other names
        keys = [key for key in asdict(section) if f"data.{key}" in of_command_line and key != "source"]
        given = {key: getattr(config.data, key) for key in [*keys, "index_folder", "max_malformed_rows"]}
        section = Data(source=flags.data or own, **given)
    flavor = next(iter(importlib.import_module(models.FAMILIES[found.family]).FLAVORS))  # any: all its numbers are replaced
    return replace(
        config,
        model=replace(config.model, name=found.family, flavor=flavor, overrides=asdict(found.architecture), freeze=[]),
        data=replace(section, mode="aligned", num_workers=0),
        training=replace(config.training, global_batch_size="auto", local_batch_size=flags.batch or batch_of(config)),
        validation=validation,
        checkpoint=Checkpoint(),
    )


def batch_of(config: Config) -> int:
    size = config.validation.local_batch_size
    return config.training.local_batch_size if size == "auto" else size


def out_folder(found, flags) -> Path:
    """Where the results go."""
    if flags.out:
        folder = Path(flags.out)
    elif (run := next((path for path in (found.path, *found.path.parents) if (path / "config.toml").is_file()), None)) is None:
        raise ConfigError(f"{found.path} lies in no run folder: --out says where the results go")
    else:
        folder = run / "evaluation"
    return folder


def steps_of(found, flags) -> list[Path]:
    """What is evaluated, in order: folders of one step, or the one whose newest is meant."""
    if not flags.all_checkpoints:
        return [found.path]
    names = commit.names_like(found.path, commit.STEP)
    if not names:
        raise ConfigError(f"--all-checkpoints needs a run folder; {found.path} is one checkpoint")
    return [found.path / name for name in reversed(names)]


def build_held_out(config: Config, world):
    """The finite set in which each held-out count is scored once.

    An index that is missing is made by rank 0, or where nodes do not share its folder by the first rank of each.
    """
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    for now in range(3):
        with world.together("reading the data"):
            if turn == now:
                held_out = build(config, split=config.validation.split, mode="aligned", overlap=True)
    return held_out


def build(config: Config, **changes):
    """The data set that [data] describes, changed; all neurons of it."""
    settings = asdict(config.data) | {"num_neurons": "all", "source_weights": {}} | changes
    for name in ("num_workers", "accept_changed"):
        settings.pop(name)
    module = importlib.import_module(data.FAMILIES[config.model.name])
    return module.build(**settings, seq_len=config.training.seq_len, seed=config.training.seed)


def measure(model, line: str, held_out, config: Config, flags, world) -> dict:
    """Everything about one checkpoint but baselines, as JSON, and two entries that stay here: "measured" and "numbers"."""
    started = time.perf_counter()
    numbers = None if flags.windows is None else loader.subset(len(held_out), flags.windows)
    scorer = evaluation.Scorer(held_out, flags.by)
    measured = train.validate(
        model,
        held_out,
        world,
        scorer,
        local_batch_size=config.training.local_batch_size,
        max_windows="all" if flags.windows is None else flags.windows,
        context_method=config.parallelism.context_parallel_method,
    )
    step = commit.STEP.search(line)
    record = {"step": int(step[1]) if step else None, "loaded": line, **measured.record()}
    if isinstance(held_out.store, ring_hmm.RingHMM):
        window_nll = [window for of_rank in world.exchange(scorer.scores.window_nll) for window in of_rank]
        if world.rank == 0:
            record["ideal"] = evaluation.against_ideal(held_out, numbers, flags.by, measured, window_nll)
    record |= {"seconds": time.perf_counter() - started, "measured": measured, "numbers": numbers}
    if world.rank == 0:
        print(*evaluation.table(record), *(evaluation.ideal_lines(record["ideal"]) if "ideal" in record else []), sep="\n")
    return record


def choose_places(held_out, flags) -> forecast.Places:
    """What is forecast."""
    prompts = flags.prompts or forecast.PROMPTS
    return forecast.choose(held_out, prompts=prompts, horizon=flags.horizon, context=flags.context, by=flags.by)


def look_ahead(model, held_out, places: forecast.Places, flags, world, dtype, say) -> dict:
    """The forecast as JSON, and its nats, "forecast_nats", which stay here."""
    kernel = sampling.choose_kernel(world.device, dtype, model.architecture.head_dim)
    sampler = sampling.Sampler(model=model.eval(), kernel=kernel, dtype=dtype, device=world.device)
    tell = baselines.every_ten_seconds(say, "forecast: prompt {}")
    rates = forecast.predict(sampler, places, rollouts=flags.rollouts, world=world, prompts_at_once=flags.batch, tell=tell)
    nats = forecast.nats_at(places, rates)
    best = forecast.exact(held_out, places)
    record = forecast.record(
        places, nats, rollouts=flags.rollouts, ideal=None if best is None else forecast.nats_at(places, best)
    )
    say(forecast.line(record))
    return {"forecast": record, "forecast_nats": nats}


def choose_attention(config: Config, head_dim: int, world, dtype, say):
    """The kernel, around which ranks that share a sequence meet."""
    is_ring = world.context_size > 1 and config.parallelism.context_parallel_method == "ring"
    kernel = attention.choose(config.model.attention, device=world.device, dtype=dtype, head_dim=head_dim, with_halves=is_ring)
    say(f"attention: {kernel.name} ({kernel.why})")
    if world.context_size == 1:
        return kernel
    group = world.sequence["context"].get_group()
    return context_parallel.Ring(kernel, group) if is_ring else context_parallel.Ulysses(kernel, group)


def finish(folder: Path, records: list[dict], refused: list[str], held_out, places, found, config: Config, flags):
    """What one process does alone: baselines, warnings, files."""
    measured, numbers = records[-1]["measured"], records[-1]["numbers"]
    ladders, left_out, training = {}, {}, None
    if not flags.no_baselines and (training := fitted_on(config)):
        print("baselines: fitting them to the training split")
        left_out = baselines.match(training, held_out)[1]
        ladders = evaluation.against_baselines(held_out, numbers, measured, baselines.score(training, held_out))
        for line in evaluation.ladder_lines(ladders["all"]) if ladders else []:
            print(line)
        rates = forecast.simple(training, held_out, places) if places else {}
        for each in records if rates else []:
            each["forecast"]["baselines"] = forecast.against(places, each["forecast_nats"], rates)
            if same := forecast.on_the_same(places, each["forecast_nats"], rates):
                each["forecast"]["on_the_same_recordings"] = same
    if places:
        print(*forecast.table(records[-1]["forecast"]), sep="\n")
    warnings = [f"not evaluated: {why}" for why in refused]
    warnings += [f"not scored: {name}: {why}" for name, why in held_out.not_scored]
    if places and places.left_out:
        warnings.append(
            f"not forecast: {number_of(places.left_out, 'recording')} whose windows do not hold context and {places.horizon:,} "
            f"bins, {places.left_out[0]} among them"
        )
    warnings += [
        f"baselines leave out {number_of(names, 'held-out recording')}: {reason}" for reason, names in left_out.items()
    ]
    warnings += contamination.warnings(trained_on(found, config, training), held_out)
    for line in warnings:
        print(f"warning: {line}")
    write(
        folder,
        {
            "asked": vars(flags),
            "data": held_out.summary(),
            "seq_len": config.training.seq_len,
            "windows": "all" if numbers is None else f"{len(numbers)} of {len(held_out)}, by hash",
            "by": flags.by,
            "warnings": warnings,
            "baselines": ladders,
            "baselines_left_out": left_out,
            "checkpoints": [{key: each[key] for key in each if key not in OF_THIS_PROCESS} for each in records],
        },
    )
    print(f"written: {folder}")


def number_of(names: list[str], what: str) -> str:
    return f"{len(names):,} {what}{'s' if len(names) != 1 else ''}"


def fitted_on(config: Config):
    """The training split of the held-out data; None where there is none, and then it is said why."""
    if config.validation.split == "train":
        print("no baselines: they would be fitted to the very counts that are scored")
        return None
    try:
        return build(config, split="train", mode="stream")
    except ValueError as why:
        print(f"no baselines: {why}")
        return None


def write(folder: Path, result: dict):
    """evaluation.json and its pictures, in place of those of an evaluation before."""
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / "evaluation.json.new"
    partial_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(folder / "evaluation.json")
    for name, figure in score_plots.draw_all(result).items():
        (folder / name).unlink(missing_ok=True)
        if figure:
            figure.save(folder / name)


def trained_on(found, config: Config, training):
    """The data that the model was trained on, or None where that is not known or not there."""
    if found.config is None:
        return None
    section = found.config["data"]
    same = ("source", "split_by", "include_sources", "exclude_sources")
    if training and section["split"] == "train" and all(section[key] == getattr(config.data, key) for key in same):
        return training
    try:
        names = ("source", "split", "split_by", "include_sources", "exclude_sources", "max_malformed_rows", "index_folder")
        return build(config, mode="stream", **{name: section[name] for name in names})
    except ValueError as why:
        print(f"the model's training data is not here: {why}")
        return None


if __name__ == "__main__":
    sys.exit(exits.run(lambda: main(LOADED, FLAGS), "this command"))
