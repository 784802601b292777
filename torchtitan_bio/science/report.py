"""A run, or several side by side, as one page that a browser shows without a network and a printer prints.

python -m torchtitan_bio.science.report RUN [RUN...] [--out FILE]

train.py leaves one as report.html in the folder of a run that is finished. Made again after evaluate.py, or after generate.py
with its --out in the run folder, it shows what those have left too.
"""

import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import torchtitan_bio
from torchtitan_bio import command_line, config_loader, exits, metrics
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.data import sources
from torchtitan_bio.science import realism, report_run, report_scores
from torchtitan_bio.science import report_parts as parts
from torchtitan_bio.science.disclosure import public_config
from torchtitan_bio.science.evaluation import figure
from torchtitan_bio.science.report_run import Run

PICTURES_BYTES = 1_000_000  # on a page, before base64 makes them a third larger
SAMPLES_SHOWN = 4
ROWS_SHOWN = 30


def write(folder, say=print):
    """report.html in a run folder."""
    write_page([folder], Path(folder) / "report.html", say)


def write_page(folders, path: Path, say=print):
    """As a whole or not at all."""
    runs = [read(Path(folder)) for folder in folders]
    text = page(runs)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    for run in runs:
        for line in run.notes:
            say(f"report: {run.name}: {line}")
    say(f"report: {path}")


def read(folder: Path) -> Run:
    """A run without those of its records that this version cannot show: they are among its notes."""
    run = report_run.read(folder)
    for name, record, nothing, show in (
        ("evaluation.json", "evaluation", None, report_scores.of_evaluations),
        ("data.json", "data", {}, data),
        ("generated.json", "generated", [], tables_of_realism),
    ):
        try:
            show([(run.name, run)])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            note = f"{name} is not of this version: {type(error).__name__}: {error}"
            run = replace(run, **{record: nothing}, notes=[*run.notes, note])
    return run


def page(runs: list[Run]) -> str:
    names = [run.name for run in runs]
    named = [
        (name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})", run)
        for place, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    title = named[0][0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(name for name, _ in named)}"
    sections = {
        "short": ("In short", in_short(named)),
        "learning": ("Learning", report_scores.draw_learning(named)),
        "scores": ("Held-out scores", report_scores.of_validations(named)),
        "baselines": ("What a score has to beat", report_scores.of_baselines(named)),
        "evaluation": ("Evaluation", report_scores.of_evaluations(named)),
        "activity": ("Activity, recorded and made up", activity(named)),
        "course": ("How training went", course(named)),
        "data": ("Data", data(named)),
        "settings": ("Settings", settings(named)),
    }
    shown = {key: (head, content) for key, (head, content) in sections.items() if content}
    made = f"page made by torchtitan_bio {torchtitan_bio.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    return parts.page(
        f"{title} - report",
        parts.tag("h1", title),
        parts.tag("p", made, class_="small"),
        parts.tag("nav", *(parts.tag("a", head, href=f"#{key}") for key, (head, _) in shown.items())),
        *(parts.section(key, head, content) for key, (head, content) in shown.items()),
    )


# ---- in short


def in_short(named):
    content = []
    for name, run in named:
        if run.exit.get("reason") == "failed":
            content.append(parts.note(f"{name} failed {failure(run.exit)}", is_bad=True))
        content += [parts.note(f"{name}: {line}") for line in run.notes]
        if run.rungs and (part := run.last.get("subset", "all")) != "all":
            words = f"{name} was scored on {part} (validation.max_windows), and its baselines on all that is held out."
            content.append(parts.note(words))
    if len({run.last.get("held_out") for _, run in named if run.last}) > 1:
        content.append(
            parts.note("The runs were scored on different held-out data: their scores do not say which model is better.")
        )
    if len(named) == 1:
        content.append(parts.cards(headlines(named[0][1])))
    of_each = [facts(run) for _, run in named]
    labels = dict.fromkeys(label for found in of_each for label in found)
    rows = [[label, *(found.get(label, "") for found in of_each)] for label in labels]
    head = ["", *(name for name, _ in named)] if len(named) > 1 else []
    return parts.join(*content, parts.table(head, rows, words=range(1 + len(named))))


def headlines(run: Run):
    """(a number in large, what it is)."""
    last, done = run.last or {}, num_steps(run)
    value = last.get("bits_per_spike")
    if value is not None:
        yield f"{value:.3f}", f"bits/spike on held-out activity after {last['step']:,} steps{subset(last)}"
        if run.rungs:
            name, best = max(run.rungs, key=lambda rung: rung[1])
            yield f"{value - best:+.3f}", f"bits/spike against the best baseline, {name}"
        if captured(run) is not None:
            yield f"{captured(run):.0%}", "of what any model could gain over histograms"
    yield f"{done:,}", f"steps of {run.config['training']['steps']:,}" if run.config else "steps"
    if done:
        yield readable(run.steps["tokens"][-1]), "tokens read in training"


def facts(run: Run) -> dict[str, str]:
    """What there is to say of a run in a line each."""
    last, config, steps, found = run.last or {}, run.config, run.steps, {"ended": ended(run)}
    value = last.get("bits_per_spike")
    if value is not None:
        found["held-out score"] = f"{value:.3f} bits/spike after step {last['step']:,}{subset(last)}"
    if value is not None and run.rungs:
        name, best = max(run.rungs, key=lambda rung: rung[1])
        side = "above" if value > best else "below"
        found["best baseline"] = f"{best:.3f} bits/spike, {name}; the model is {abs(value - best):.3f} {side}"
    if run.ideal:
        share = "" if captured(run) is None else f"; {captured(run):.1%} of the gain over histograms is captured"
        found["best possible score"] = f"{run.ideal['bits_per_spike']:.3f} bits/spike, ideal observer{share}"
    if run.model:
        number = run.model["parameters"]
        found["model"] = f"{run.model['family']} {run.model['flavor']}" + (f", {number:,} parameters" if number else "")
    elif config:
        found["model"] = f"{config['model']['name']} {config['model']['flavor']}"
    if config:
        found["data"] = config["data"]["source"]
        found["window"] = f"{config['training']['seq_len']:,} tokens"
    if num_steps(run):
        found["read in training"] = f"{readable(steps['tokens'][-1])} tokens"
        found["speed"] = f"{readable(np.nanmedian(steps['tokens_per_s']))} tokens/s (median)"
        found["time in steps"] = metrics.clock_time(np.nansum(steps["step_s"]))
    if run.starts:
        found["devices"] = f"{run.starts[-1].get('ranks', '?')} x {run.starts[-1].get('device', '?')}"
    return found


def subset(validation: dict) -> str:
    """What is to be said where not all windows were scored."""
    part = validation.get("subset", "all")
    return "" if part == "all" else f", on {part}"


def captured(run: Run) -> float | None:
    """The share of what the ideal observer gains over histograms."""
    if not run.ideal or run.last["hist_nll"] <= run.ideal["nll"]:
        return None
    return (run.last["hist_nll"] - run.last["nll"]) / (run.last["hist_nll"] - run.ideal["nll"])


def ended(run: Run) -> str:
    reason, step = run.exit.get("reason"), run.exit.get("step")
    if reason is None:
        return "nothing says how"
    words = {"preempted": "told to stop; it can go on", "running": "running, or cut off without a word"}.get(reason, reason)
    return words + (f" ({run.exit['why']})" if "why" in run.exit else "") + (f", step {step:,}" if step is not None else "")


def failure(record: dict) -> str:
    where = "before its first step" if record.get("step") is None else f"at step {record['step']:,}"
    error = record.get("error", "no error is on record")
    return f"{where}, rank {record.get('rank', '?')} in its phase {record.get('phase', '?')}: {error}"


def num_steps(run: Run) -> int:
    return int(run.steps["step"][-1]) if len(run.steps["step"]) else 0


def readable(number: float) -> str:
    """12,345 in full, and 1.23 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


# ---- activity


def activity(named):
    """Pictures and tables of generated activity, the most telling first as long as there is room."""
    room, content = PICTURES_BYTES // len(named), []
    for name, run in named:
        left, out = room, []
        pictures = [each for of in run.generated for each in of.pictures]
        shown = {}
        for path in [*run.samples[-1:], *pictures, *run.samples[:1], *run.samples[1:-1]]:
            if path in shown or (path in run.samples and sum(each in run.samples for each in shown) == SAMPLES_SHOWN):
                continue
            png = path.read_bytes()
            if len(png) <= left:
                shown[path], left = png, left - len(png)
            else:
                out.append(path.name)
        samples = [path for path in run.samples if path in shown]
        if samples:
            content.append(parts.tag("h3", f"{name}: one prompt, gone on from while it trained"))
            words = (
                "The model goes on from the same held-out bins at each of these steps, with the same chance: what differs is "
                "what it has learnt. Beside it is what the neurons did."
            )
            content.append(parts.tag("p", words))
        for path in samples:
            step = f"step {int(path.stem.removeprefix('step-')):,}"
            content.append(parts.picture(shown[path], f"{name}, {step}", f"rasters at {step}"))
        for of in run.generated:
            content.append(parts.tag("h3", f"{name}: {of.name}, by generate.py"))
            content += [parts.picture(shown[path], "", path.stem) for path in of.pictures if path in shown]
            content.append(of_realism(of.record.get("realism")))
        if out:
            content.append(parts.tag("p", f"Left out of this page for their size: {', '.join(out)}.", class_="small"))
    return parts.join(*content)


def tables_of_realism(named):
    return [of_realism(of.record.get("realism")) for _, run in named for of in run.generated]


def of_realism(compared: dict | None):
    if not compared:
        return ""
    meanings = realism.PER_NEURON | realism.DISTRIBUTIONS
    rows = [
        [name, *(figure(row[key]) for key in ("samples", "data", "difference", "floor")), meanings.get(name, "")]
        for name, row in compared.items()
    ]
    head = ["realism", "samples", "data", "difference", "of real data", ""]
    caption = "Means, and the mean difference over neurons or pairs; of distributions the share that would have to move. "
    caption += "Beside it the difference between two parts of the real data, below which no model is expected to come."
    return parts.table(head, rows, words=(0, 5), caption=caption)


# ---- how training went


def course(named):
    labels = {
        "steps done": lambda run: f"{num_steps(run):,}",
        "steps skipped": lambda run: f"{len(run.skipped):,}",
        "starts on record": lambda run: f"{len(run.starts):,}",
        "speed, median": lambda run: f"{np.nanmedian(run.steps['tokens_per_s']):,.0f} tokens/s",
        "a step, median": lambda run: f"{np.nanmedian(run.steps['step_s']):.3g} s",
        "waiting for data": lambda run: f"{np.nansum(run.steps['data_wait_s']) / np.nansum(run.steps['step_s']):.1%} of it",
        "of the devices' peak (MFU), median": lambda run: (
            f"{np.nanmedian(run.steps['mfu']):.1%}" if np.isfinite(run.steps["mfu"]).any() else "not known of this device"
        ),
        "most memory": lambda run: f"{np.nanmax(run.steps['peak_memory_gib']):.2f} GiB a process",
        "in steps": lambda run: metrics.clock_time(np.nansum(run.steps["step_s"])),
        "in validation": lambda run: metrics.clock_time(sum(each.get("seconds", 0) for each in run.validations)),
    }
    content = []
    trained = [(name, run) for name, run in named if num_steps(run)]
    if trained:
        rows = [[label, *(tell(run) for _, run in trained)] for label, tell in labels.items()]
        content.append(parts.table(["", *(name for name, _ in trained)], rows))
    charts = [
        (report_scores.chart_of_steps(trained, *curve, **axis, width=parts.NARROW), words)
        for *curve, axis, words in (
            ("tokens_per_s", "tokens/s", {"least": 0}, "Speed of all devices together, without validation and saving."),
            ("grad_norm", "norm", {"log": True}, "The gradient's norm, before it is scaled down to training.max_norm."),
        )
    ]
    drawn = [chart.svg(words, words) for chart, words in charts if chart]
    content.append(parts.tag("div", *drawn, class_="pair") if drawn else "")
    for name, run in named:
        rows = [
            [
                f"{start['step']:,}",
                start.get("attempt", ""),
                start.get("ranks", ""),
                start.get("device", ""),
                (start.get("attention") or {}).get("name", ""),
                start.get("torchtitan_bio", ""),
                start.get("torch", ""),
            ]
            for start in run.starts
        ]
        head = ["after step", "attempt", "processes", "device", "attention", "torchtitan_bio", "torch"]
        content.append(parts.table(head, rows[:ROWS_SHOWN], words=(3, 4, 5, 6), caption=f"{name}: starts"))
        for record in (run.exit.get("previous"), run.exit if run.exit.get("reason") == "failed" else None):
            content.append(
                parts.tag("p", f"{name}, attempt {record.get('attempt', '?')}, failed {failure(record)}") if record else ""
            )
        rows = [[f"{step:,}", "; ".join(run.skipped_rows.get(step, []))] for step in run.skipped[:ROWS_SHOWN].tolist()]
        caption = f"{name}: {len(run.skipped):,} steps skipped, their loss or gradient not being finite"
        content.append(parts.table(["step", "recordings"], rows, words=(1,), caption=caption))
    return parts.join(*content)


# ---- what was run


def data(named):
    content = []
    for name, run in named:
        for part, title in (("train", "trained on"), ("held_out", "held out")):
            if of := run.data.get(part):
                content.append(_data_table(f"{name} {title}", of))
    return parts.join(*content)


def _data_table(title: str, of: dict):
    columns = ("recordings", "neurons", "counts", "tokens", "subjects", "sessions", "clipped")
    rows = []
    for row in of["sources"][:ROWS_SHOWN]:
        low, high = row["neurons"]
        cells = row | {"neurons": low if low == high else f"{low:,} to {high:,}"}
        rows.append(
            [row["source_dataset"] or "(no name)", *(f"{v:,}" if isinstance(v := cells[key], int) else v for key in columns)]
        )
    width = of.get("bin_width_s")
    caption = f"{title}: {of['source']}, split {of['split']} by {of['split_by']}"
    caption += f", bins of {width * 1000:g} ms" if isinstance(width, int | float) else ""
    lost = {"malformed recordings": of["malformed"], "recordings too wide": of["too_wide"], "files": of["files_left_out"]}
    caption += "".join(f"; {number:,} {what} left out" for what, number in lost.items() if number)
    caption += f"; the {ROWS_SHOWN} largest of {of['num_sources']:,} sources" if of["num_sources"] > ROWS_SHOWN else ""
    return parts.table(["", *columns], rows, caption=caption)


def settings(named):
    """Those that differ between runs or from the defaults, then all."""
    defaults = flat(public_config(asdict(Config())))
    known = [(name, flat(run.config)) for name, run in named if run.config]
    if not known:
        return ""
    keys = list(dict.fromkeys(key for _, values in known for key in values))
    content, names = [], [name for name, _ in known]

    def rows_of(chosen, of):
        return [[key, *(values.get(key, "") for _, values in of)] for key in chosen]

    words = range(len(known) + 2)
    if len(known) > 1:
        differing = [key for key in keys if len({values.get(key) for _, values in known}) > 1]
        content.append(parts.tag("h3", "What differs between the runs"))
        content.append(
            parts.table(["", *names], rows_of(differing, known), words=words)
            or parts.tag("p", "No setting: the runs were asked for alike.")
        )
    changed = [key for key in keys if any(values.get(key) != defaults.get(key) for _, values in known)]
    with_defaults = [*known, ("default", defaults)]
    content.append(parts.tag("h3", "What differs from the defaults"))
    content.append(parts.table(["", *names, "default"], rows_of(changed, with_defaults), words=words))
    everything = parts.table(["", *names], rows_of(keys, known), words=words)
    content.append(parts.tag("details", parts.tag("summary", f"All {len(keys)} settings"), everything))
    return parts.join(*content)


def flat(config: dict) -> dict[str, str]:
    return {f"{name}.{key}": config_loader.toml(value) for name, part in config.items() for key, value in part.items()}


def main():
    parser = command_line.Parser(
        prog="python -m torchtitan_bio.science.report", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="a run folder")
    parser.add_argument("--out", help="the page (default: report.html in the run folder; of several runs comparison.html here)")
    flags = parser.parse_args()
    own = Path(flags.run[0]) / "report.html" if len(flags.run) == 1 else Path("comparison.html")
    path = Path(flags.out) if flags.out else own
    with exits.blaming_the_input():
        if path.is_dir():
            raise ConfigError(f"--out={path} is a folder; name a file in it, such as {path / own.name}")
        if flags.out or path.parent.is_dir():  # a run that is not there is told as such
            sources.make_folder(path.parent)
        write_page(flags.run, path)


if __name__ == "__main__":
    sys.exit(exits.run(main, "this command"))
