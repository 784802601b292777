"""The part of a report that is about scores: curves of training, held-out scores, baselines, and what an evaluation found."""

import numpy as np

from torchtitan_bio.science import drawing
from torchtitan_bio.science import report_parts as parts
from torchtitan_bio.science.evaluation import figure
from torchtitan_bio.science.report_run import Run
from torchtitan_bio.science.score_plots import LEAST_SHOWN

COLUMNS, STRETCHES = 320, 80  # of a curve of every step: the band behind it, and the means that are drawn as a line
SKIPS_SHOWN, GROUPS_SHOWN = 50, 40
LEVELS_ROOM, A_LETTER = 215, 7.2  # beside a chart, for the names of baselines: usually, and more for longer ones
UNIT = "bits/spike"
ROUNDING = 5e-4

MEANINGS = {
    "bits_per_spike": (
        "bits/spike",
        "what the model knows beyond each neuron's own mean rate (the Poisson null), for every spike: 0 is the null, higher is "
        "better",
    ),
    "bits_per_spike_hist": ("bits/spike over histograms", "the same, beyond the histogram of each neuron's own counts"),
    "bits_per_spike_rate": (
        "bits/spike of expected counts",
        "a Poisson with the model's expected count instead of its probabilities, beyond the Poisson null (NLB's formula)",
    ),
    "bits_per_count": ("bits/count", "to code what one neuron does in one bin: lower is better"),
    "nll": ("nats/count", "the same in natural units (1 nat is 1.443 bits)"),
    "null_nll": ("nats/count, Poisson null", "for one who knows each neuron's held-out mean rate and nothing else"),
    "hist_nll": ("nats/count, histograms", "for one who knows the histogram of each neuron's held-out counts"),
    "nll_all": ("nats/token", "of counts and of the separators between bins, as the training loss"),
    "nll_bos": ("nats/separator", "near 0 once the model knows where a bin ends"),
    "leak": ("nats/count lost", "probability given to separators where none can be: near 0 once the model knows that"),
}
WHAT_IS_SCORED = (
    "Every held-out count is predicted from the bins before it in its window and from the neurons before it in its own bin. "
    "The sum over a bin is a joint likelihood; the term of a single count is no forecast of that neuron."
)


def style(number: int) -> tuple[str, str]:
    """The colour and dash of a run, on all charts."""
    return drawing.PALETTE[number % len(drawing.PALETTE)], parts.DASHES[number % len(parts.DASHES)]


def measured(value, error) -> str:
    return f"{figure(value)} ± {error:.3f}" if error is not None else figure(value)


# ---- curves of training


def draw_learning(named: list[tuple[str, Run]]):
    charts = [_draw_scores(runs) for runs in by_data(named)]
    head = parts.tag("h3", "Bits per spike on held-out activity") if charts else ""
    return parts.join(head, *charts, _draw_loss(named))


def by_data(named) -> list[list[tuple[int, str, Run]]]:
    """(number, name, run) of the runs that have a score, together where they were scored on the same held-out data."""
    together = {}
    for number, (name, run) in enumerate(named):
        if (run.last or {}).get("bits_per_spike") is not None:
            together.setdefault(run.last.get("held_out"), []).append((number, name, run))
    return list(together.values())


def shared_rungs(runs) -> dict[str, float]:
    """The baselines of all the runs that have any, or none where those differ: runs may have been trained on other data."""
    known = [dict(run.rungs) for *_, run in runs if run.rungs]
    is_shared = all(  # but for the last digits, which another number of threads changes
        rungs.keys() == known[0].keys() and all(abs(rungs[name] - known[0][name]) < ROUNDING for name in rungs)
        for rungs in known
    )
    return known[0] if known and is_shared else {}


def _draw_scores(runs):
    """Bits/spike at each validation, among baselines and below the best possible score."""
    levels = shared_rungs(runs)
    best = dict([("ideal observer", run.ideal["bits_per_spike"]) for *_, run in runs if run.ideal])
    curves = [
        [(each["step"], each["bits_per_spike"]) for each in run.validations if each.get("bits_per_spike") is not None]
        for *_, run in runs
    ]
    shown = [value for curve in curves for _, value in curve] + list((levels | best).values()) + [0.0]
    # The scores of a model that has learnt little are shown all the same where there are no others.
    least = LEAST_SHOWN if any(value >= LEAST_SHOWN for curve in curves for _, value in curve) else -np.inf
    room = max(LEVELS_ROOM, *(20 + A_LETTER * len(name) for name in (levels | best or [""])))
    chart = parts.Chart(
        x=(0, max(1, *(curve[-1][0] for curve in curves))),
        y=drawing.limits([value for value in shown if value >= least]),
        x_label="training step",
        y_label=UNIT,
        height=360,
        **({"right": int(room), "width": parts.WIDE + int(room) - LEVELS_ROOM} if levels or best else {}),
    )
    for name, value in levels.items():
        if value >= least:
            chart.level(value, name)
    for name, value in best.items():
        chart.level(value, name, drawing.INK, dash="")
    below = [f"{name} {value:.2f}" for name, value in levels.items() if value < least]
    for (number, name, _), curve in zip(runs, curves, strict=True):
        color, dash = style(number)
        titles = [f"{name}, step {step:,}: {value:.4f} bits/spike" for step, value in curve]
        below += [f"{name} {value:.1f} at step {step:,}" for step, value in curve if value < least]
        steps, values = zip(*((step, value if value >= least else np.nan) for step, value in curve), strict=True)
        chart.line(steps, values, color, dash=dash, name=name)
        chart.points(steps, values, color, titles=titles)
    caption = "Lines across are baselines on the same held-out data. " if levels else ""
    caption += "No model can stay above the ideal observer, which knows how the data is made. " if best else ""
    caption += f"Below the frame: {'; '.join(below[:6])}{', ...' if len(below) > 6 else ''}." if below else ""
    return chart.svg("bits per spike by step", caption)


def same(values):
    """What all of them are; None where they differ or there are none."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _draw_loss(named):
    if not (chart := chart_of_steps(named, "loss", "nats/token", log=True)):
        return ""
    caption = (
        "Loss on training data, on a logarithmic axis. The line is the mean over a stretch of steps; the band behind it "
        "reaches from the lowest step to the highest."
    )
    if len(named) == 1:
        caption += " Dotted upright: the run went on from a checkpoint." if len(named[0][1].starts) > 1 else ""
        caption += " Orange, upright: a step that was skipped." if len(named[0][1].skipped) else ""
    return parts.join(parts.tag("h3", "Training loss"), chart.svg("training loss by step", caption))


def chart_of_steps(named, column: str, unit: str, *, log=False, least=None, width=parts.WIDE) -> parts.Chart | None:
    """Every step of every run: a band from lowest to highest, and means. None where there is nothing to draw."""
    curves = []
    for number, (name, run) in enumerate(named):
        values = run.steps[column]
        values = np.where(values > 0, values, np.nan) if log else values
        if np.isfinite(values).any():
            curves.append((number, name, run.steps["step"], values))
    if not curves:
        return None
    everything = np.concatenate([values[np.isfinite(values)] for *_, values in curves])
    y = (everything.min() / 1.1, everything.max() * 1.1) if log else drawing.limits(everything, least=least)
    most = max(1, *(steps[-1] for _, _, steps, _ in curves))
    chart = parts.Chart(x=(0, float(most)), y=y, x_label="training step", y_label=unit, log_y=log, width=width)
    for number, name, steps, values in curves:
        color, dash = style(number)
        if len(steps) > STRETCHES:
            at, low, high, _ = parts.thin(steps, values, COLUMNS)
            chart.band(at, low, high, color)
        at, _, _, mean = parts.thin(steps, values, STRETCHES)
        chart.line(at, mean, color, dash=dash if len(named) > 1 else "", name=name if len(named) > 1 else "")
    if len(named) == 1:
        run = named[0][1]
        for start in run.starts[1:]:
            chart.mark(start["step"], f"went on from step {start['step']:,}")
        for step in run.skipped[:SKIPS_SHOWN].tolist():
            chart.mark(step, f"step {step:,} was skipped", drawing.ORANGE, dash="4 2")
    return chart


# ---- the last validation


def of_validations(named):
    known = [(name, run.last) for name, run in named if run.last]
    if not known:
        return parts.tag("p", "No validation is on record, so nothing is known of held-out activity.")
    rows = []
    for key, (label, meaning) in MEANINGS.items():
        values = [last.get(key) for _, last in known]
        if any(value is not None for value in values):
            rows.append([label, *map(figure, values), parts.tag("span", meaning, class_="small")])
    rows += [[f"{key} scored", *(f"{last[key]:,}" for _, last in known), ""] for key in ("spikes", "counts")]
    rows.append(["windows scored", *(f"{last['windows']:,} ({last.get('subset', 'all')})" for _, last in known), ""])
    head = ["", *(f"{name}, step {last['step']:,}" for name, last in known), ""]
    tables = [
        _table_of_groups(f"{name}, by source_dataset", last["sources"], {}) for name, last in known if last.get("sources")
    ]
    return parts.join(parts.tag("p", WHAT_IS_SCORED), parts.table(head, rows, words=(0, len(known) + 1)), *tables)


def of_baselines(named):
    """Models among the baselines, the best one on top; a table for each held-out data."""
    tables = []
    for runs in by_data(named):
        for part in [runs] if shared_rungs(runs) else [[each] for each in runs]:
            models = [(name, run.last["bits_per_spike"], True) for _, name, run in part]
            rungs = [(*rung, False) for rung in next((run.rungs for *_, run in part if run.rungs), [])]
            ideal = next((run.ideal["bits_per_spike"] for *_, run in part if run.ideal), None)
            rungs += [] if ideal is None else [("ideal observer: the best possible", ideal, False)]
            if rungs:
                tables.append(_table_of_rungs(models, rungs))
    words = (
        "Bits/spike of models after their last validation, and of classical models that were fitted to training data and "
        "scored on the same held-out recordings."
    )
    return parts.join(parts.tag("p", words), *tables) if tables else ""


def _table_of_rungs(models, rungs):
    rows = sorted([*models, *rungs], key=lambda row: -row[1])
    name, first, _ = models[0]
    cells = [[other, f"{value:.3f}", "" if other == name else f"{first - value:+.3f}"] for other, value, _ in rows]
    own = [place for place, (*_, is_model) in enumerate(rows) if is_model]
    return parts.table(["", UNIT, f"{name} is above by"], cells, own=own)


def _table_of_groups(caption: str, groups: dict, ladders: dict):
    """A row a group, those with most spikes first."""
    shown = sorted(groups.items(), key=lambda each: -each[1].get("spikes", 0))[:GROUPS_SHOWN]
    rows = []
    for name, of in shown:
        errors = of.get("standard_errors", {})
        values = [
            measured(of.get(key), errors.get(key)) for key in ("bits_per_spike", "bits_per_spike_hist", "bits_per_spike_rate")
        ]
        is_same = name in ladders and not ladders[name].get("counts_left_out")  # baselines on all that the model is scored on
        best = max(ladders[name]["rungs"], key=lambda rung: rung["bits_per_spike"]) if is_same else None
        words = f"{best['bits_per_spike']:.3f}, {best['name']}" if best else ""
        totals = [f"{of[key]:,}" if key in of else "" for key in ("spikes", "counts")]
        rows.append([name or "(no name)", *values, *([words] if ladders else []), *totals])
    if len(groups) > len(shown):
        caption += f": the {len(shown)} of {len(groups)} with most spikes"
    head = ["", UNIT, "over histograms", "of expected counts", *(["best baseline"] if ladders else []), "spikes", "counts"]
    return parts.table(head, rows, caption=caption)


# ---- evaluate.py


def of_evaluations(named):
    """What evaluation.json holds, each curve of all runs on the same axes."""
    known = [(number, name, run.evaluation) for number, (name, run) in enumerate(named) if run.evaluation]
    if not known:
        return ""
    words = (
        "Scores of whole held-out recordings by evaluate.py, with standard errors over recordings or stretches of them "
        "(value ± error). Bars on the charts are two standard errors."
    )
    charts = [draw(known) for draw in (_draw_context, _draw_forecast, _draw_neurons, _draw_checkpoints, _draw_calibration)]
    return parts.join(
        parts.tag("p", words),
        *(_of_evaluation(name, evaluation) for _, name, evaluation in known),
        parts.tag("div", *(chart for chart in charts if chart), class_="pair"),
    )


def _of_evaluation(name, evaluation):
    last = evaluation["checkpoints"][-1]
    step = "a checkpoint" if last["step"] is None else f"step {last['step']:,}"
    of, windows = evaluation["data"], evaluation["windows"]
    groups = {"all counts": last["scores"]}
    if last.get("groups"):
        groups |= {f"mean of {len(last['groups'])} groups": last["macro"]} | last["groups"]
    ladders = {"all counts" if key == "all" else key: ladder for key, ladder in evaluation["baselines"].items()}
    caption = f"{name}, {step}, on {of['source'] or 'data'}, split {of['split']}, windows: {windows}"
    content = [_table_of_groups(caption, groups, ladders)]
    if "all counts" in ladders:
        rungs = sorted(ladders["all counts"]["rungs"], key=lambda rung: -rung["bits_per_spike"])
        rows = [
            [
                rung["name"],
                measured(rung["bits_per_spike"], rung["standard_error"]),
                measured(rung["model_ahead"], rung["model_ahead_standard_error"]),
            ]
            for rung in rungs
        ]
        if ladders["all counts"].get("counts_left_out"):
            rows.append([f"{name}, on the same recordings", measured(*ladders["all counts"]["model"].values()), ""])
        content.append(parts.table(["baseline", UNIT, f"{name} is above by"], rows))
    content.append(_table_of_forecast(name, last["forecast"]) if "forecast" in last else "")
    if ideal := last.get("ideal"):
        gap = f"{ideal['gap']:.4f} ± {ideal['standard_error']:.4f} nats/count above the ideal observer's {ideal['floor']:.4f}"
        share = "" if ideal["captured"] is None else f"; {ideal['captured']:.1%} of the gain over histograms is captured"
        content.append(parts.tag("p", f"{name} is {gap}{share}."))
        if ideal["is_leak"]:
            content.append(parts.note(f"{name} is better than the best possible: it sees what it should predict", is_bad=True))
    content += [parts.note(warning) for warning in evaluation["warnings"]]
    return parts.join(*content)


def _table_of_forecast(name, found):
    """The whole horizon, the best on top."""
    rows = [(name, found["together"], None)]
    if same := found.get("on_the_same_recordings"):
        rows.append((f"{name}, on the same recordings", same["together"], None))
    rows += [(other, of["together"], of["model_ahead"]["together"]) for other, of in found.get("baselines", {}).items()]
    rows += [("ideal observer: the best possible", found["ideal"]["together"], None)] if "ideal" in found else []
    rows.sort(key=lambda row: -np.inf if row[1]["fp_bits_per_spike"] is None else -row[1]["fp_bits_per_spike"])
    cells = [[other, *("" if part is None else measured(*part.values()) for part in parts_of)] for other, *parts_of in rows]
    caption = (
        f"{name}, forecast of {found['horizon']} bins after each of {found['prompts']} contexts: the model goes on by itself, "
        f"and the mean of {found['rollouts']} rollouts is the rate of a Poisson"
    )
    return parts.table(["", UNIT, f"{name} is above by"], cells, caption=caption)


def _draw_forecast(known):
    curves = []
    for number, name, evaluation in known:
        if found := evaluation["checkpoints"][-1].get("forecast"):
            values, errors = found["fp_bits_per_spike"], found["standard_error"]
            ideal = found["ideal"]["fp_bits_per_spike"] if "ideal" in found else None
            curves.append((number, name, list(range(1, len(values) + 1)), values, errors, ideal))
    chart = _chart_of(curves, "bins ahead") if curves else None
    words = "Forecast: the score of expected counts by how far ahead they lie."
    return chart and chart.svg("forecast by horizon", words + _not_shown(curves, chart))


def _draw_context(known):
    """Bits/spike by the bins before, on a logarithmic axis."""
    curves = []
    for number, name, evaluation in known:
        last = evaluation["checkpoints"][-1]
        curve = last["curves"]["all"]["context"]
        # A class of bins [a, b) has between a and b - 1 bins before it; + 1 puts the first bin on a logarithmic axis.
        middle = [(a + b - 1) / 2 + 1 for a, b in zip(curve["from_bin"], curve["to_bin"], strict=True)]
        ideal = last["ideal"]["curves"]["all"]["context"]["bits_per_spike"] if "ideal" in last else None
        curves.append((number, name, middle, curve["bits_per_spike"], curve["standard_error"], ideal))
    widths = same([evaluation["data"].get("bin_width_s") for *_, evaluation in known])
    unit = f" (a bin is {widths * 1000:g} ms)" if isinstance(widths, int | float) else ""
    label = f"bins from the window's start, the first being 1{unit}"
    chart = _chart_of(curves, label, log_x=True)
    words = "What context buys: the score by how much of the recording came before."
    return chart and chart.svg("bits per spike by context", words + _not_shown(curves, chart))


def _draw_neurons(known):
    curves = []
    for number, name, evaluation in known:
        curve = evaluation["checkpoints"][-1]["curves"]["all"]["neuron"]
        middle = [(a + b - 1) / 2 for a, b in zip(curve["from_neuron"], curve["to_neuron"], strict=True)]
        curves.append((number, name, middle, curve["bits_per_spike"], None, None))
    chart = _chart_of(curves, "neurons of the same bin seen before", lines=False)
    words = "By the neuron's place in its bin; each place is another neuron."
    return chart and chart.svg("bits per spike by neuron", words + _not_shown(curves, chart))


def _draw_checkpoints(known):
    curves = []
    for number, name, evaluation in known:
        records = [each for each in evaluation["checkpoints"] if each["step"] is not None]
        values = [each["scores"]["bits_per_spike"] for each in records]
        errors = [each["scores"]["standard_errors"]["bits_per_spike"] for each in records]
        if len(records) > 1:
            curves.append((number, name, [each["step"] for each in records], values, errors, None))
    chart = _chart_of(curves, "training step") if curves else None
    words = "The checkpoints that were evaluated."
    return chart and chart.svg("bits per spike by checkpoint", words + _not_shown(curves, chart))


def _not_shown(curves, chart) -> str:
    """What a caption must say of curves as _chart_of has them: of values below the frame, and of places that have none."""
    values = [(name, *pair) for _, name, x, y, *_ in curves for pair in zip(x, y, strict=True)]
    below = [f"{name} {value:.1f} at {x:,.4g}" for name, x, value in values if value is not None and value < chart.y[0]]
    silent = [f"{name} at {x:,.4g}" for name, x, value in values if value is None]
    return "".join(
        f" {what}: {'; '.join(some[:6])}{f' and {len(some) - 6} more' if len(some) > 6 else ''}."
        for what, some in (("Below the frame", below), ("Without a spike, and so without a score", silent))
        if some
    )


def _chart_of(curves, x_label: str, *, log_x=False, lines=True):
    """Curves (number, name, x, values, errors or None, ideal or None) of bits/spike; None without a value."""
    reach, places = [0.0], []
    for _, _, x, values, errors, ideal in curves:
        places += x
        for value, error in zip(values, errors or [None] * len(values), strict=True):
            reach += [] if value is None else [value - 2 * (error or 0), value + 2 * (error or 0)]
        reach += [value for value in ideal or [] if value is not None]
    if len(reach) == 1:
        return None
    x = (min(places) * 0.9, max(max(places) * 1.1, 2)) if log_x else (min(0, *places) - 0.5, max(places) * 1.02 + 0.5)
    octaves = [2.0**power for power in range(24) if x[0] <= 2**power <= x[1]]
    chart = parts.Chart(
        x=x,
        y=drawing.limits(np.maximum(reach, LEAST_SHOWN if max(reach[1:]) > LEAST_SHOWN else -np.inf)),
        x_label=x_label,
        y_label=UNIT,
        log_x=log_x,
        width=parts.NARROW,
        x_ticks=octaves[:: 1 + len(octaves) // 7] if log_x else None,
    )
    for number, name, at, values, errors, ideal in curves:
        color, dash = style(number)
        values = [np.nan if value is None else value for value in values]
        if ideal:
            chart.line(at, [np.nan if v is None else v for v in ideal], drawing.INK, dash="2 3", name=f"{name}: ideal observer")
        if lines:
            chart.line(at, values, color, dash=dash, name=name)
        bars = [2 * error if error else None for error in errors] if errors else None
        titles = [f"{name}: {value:.4f} bits/spike" for value in values]
        chart.points(at, values, color, errors=bars, titles=titles, radius=4, name="" if lines else name)
    return chart


def _draw_calibration(known):
    curves = [(number, name, each["checkpoints"][-1]["curves"]["all"]["pit"]) for number, name, each in known]
    curves = [(number, name, pit) for number, name, pit in curves if pit]
    if not curves:
        return None
    densities = [np.array(pit["shares"]) * len(pit["shares"]) for *_, pit in curves]
    chart = parts.Chart(
        x=(0, 1),
        y=(0, max(1.5, 1.1 * max(each.max() for each in densities))),
        x_label="u: probability of less, and a random share of its own",
        y_label="density",
        width=parts.NARROW,
    )
    chart.line((0, 1), (1, 1), drawing.GREY, dash="4 3", name="calibrated")
    for (number, name, pit), density in zip(curves, densities, strict=True):
        edges = np.linspace(0, 1, len(density) + 1)
        color, dash = style(number)
        label = f"{name}: at most {pit['distance']:.4f} away"
        chart.line(np.repeat(edges, 2)[1:-1], np.repeat(density, 2), color, dash=dash, name=label)
    return chart.svg("calibration", "Calibration: where probabilities are right, the histogram of u is flat.")
