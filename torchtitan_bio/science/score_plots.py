"""The pictures of an evaluation, from its JSON: what context buys, neurons, calibration, groups, learning."""

import math

import numpy as np

from torchtitan_bio.science import drawing
from torchtitan_bio.science.curves import PIT_CLASSES
from torchtitan_bio.science.forecast import how

UNIT = "bits/spike above each neuron's own Poisson"
GROUPS_SHOWN = 30
ROW = 26  # pixels of a group
LEAST_SHOWN = -1.0  # bits/spike of an untrained model are a hundred times lower, and would hide what follows


def draw_all(result: dict) -> dict[str, drawing.Figure | None]:
    """{file name: picture} of what evaluate.py found, the curves being those of the last checkpoint; None: nothing to draw."""
    last, checkpoints = result["checkpoints"][-1], result["checkpoints"]
    has_spikes = last["scores"]["bits_per_spike"] is not None
    has_forecast = "forecast" in last and last["forecast"]["together"]["fp_bits_per_spike"] is not None
    return {
        "context.png": draw_context(result) if has_spikes else None,
        "neurons.png": draw_neurons(result) if has_spikes else None,
        "calibration.png": draw_calibration(last["curves"]["all"]["pit"]),
        "groups.png": draw_groups(result) if has_spikes and "groups" in last else None,
        "forecast.png": draw_forecast(result) if has_forecast else None,
        "learning.png": draw_learning(result) if has_spikes and len(checkpoints) > 1 else None,
    }


def draw_context(result: dict) -> drawing.Figure:
    """Bits/spike by the bins that precede in the window, with two standard errors."""
    last = result["checkpoints"][-1]
    curve = last["curves"]["all"]["context"]
    # A class of bins [a, b) has between a and b - 1 bins before it; + 1 puts the first bin, without any, on a logarithmic axis.
    middle = [(a + b - 1) / 2 + 1 for a, b in _classes(curve, "bin")]
    values, errors = curve["bits_per_spike"], [error or 0.0 for error in curve["standard_error"]]
    low, high = ([None if v is None else v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
    ideal = last["ideal"]["curves"]["all"]["context"]["bits_per_spike"] if "ideal" in last else []
    levels = _levels(result)
    figure = drawing.Figure(760, 470, "what context buys" + _why_no_levels(result))
    axes = figure.axes(
        (76, 66, 740, 404),
        x=(min(middle) * 0.9, max(middle[-1] * 1.1, 2)),
        y=drawing.limits(_floats(low), _floats(high), _floats(ideal), list(levels.values()), [0.0]),
        x_label="bins from the window's start, the first being 1" + _bin_width(result),
        y_label=UNIT,
        log_x=True,
        x_ticks=_octaves(middle[-1]),
    )
    for (name, value), color in zip(levels.items(), (drawing.GREY, drawing.ORANGE), strict=False):
        axes.level(value, color, width=1.5, label=name)
    if ideal:
        axes.line(middle, _floats(ideal), drawing.GREEN, label="ideal observer")
    for x, below, above in zip(middle, _floats(low), _floats(high), strict=True):
        axes.line((x, x), (below, above), drawing.BLUE, width=1)
    axes.line(middle, _floats(values), drawing.BLUE, label="this model")
    axes.points(middle, _floats(values), drawing.BLUE)
    axes.legend(above=True)
    return figure


def draw_neurons(result: dict) -> drawing.Figure:
    """Bits/spike by a neuron's place in the bin: before it the model has seen so many of the same bin."""
    last = result["checkpoints"][-1]
    curve = last["curves"]["all"]["neuron"]
    middle = [(a + b - 1) / 2 for a, b in _classes(curve, "neuron")]
    values = _floats(curve["bits_per_spike"])
    ideal = _floats(last["ideal"]["curves"]["all"]["neuron"]["bits_per_spike"]) if "ideal" in last else []
    figure = drawing.Figure(760, 430, "by the neuron's place in its bin")
    axes = figure.axes(
        (76, 66, 740, 364),
        x=(-0.5, max(middle) + 0.5),
        x_ticks=_whole_numbers(max(middle)),
        y=drawing.limits(values, ideal, [0.0]),
        x_label="neurons of the same bin that were seen before",
        y_label=UNIT,
    )
    axes.level(0.0)
    if len(ideal):
        axes.points(middle, ideal, drawing.GREEN, radius=4, label="ideal observer")
    for x, value in zip(middle, values, strict=True):  # no line from one to the next: they are different neurons
        axes.line((x, x), (0.0, value), drawing.BLUE, width=1)
    axes.points(middle, values, drawing.BLUE, radius=4, label="this model")
    if len(ideal):
        axes.legend(above=True)
    return figure


def draw_calibration(pit: dict) -> drawing.Figure:
    """The histogram of u, flat where probabilities are right."""
    shares = np.array(pit["shares"]) * PIT_CLASSES
    figure = drawing.Figure(560, 420, f"calibration of {pit['counts']:,} counts")
    axes = figure.axes(
        (76, 66, 540, 354),
        x=(0, 1),
        y=(0, max(1.5, float(shares.max()) * 1.1)),
        x_label="u: probability of less than the count, plus a random share of its own",
        y_label="density (1: calibrated)",
    )
    axes.level(1.0, drawing.ORANGE, width=1.5, label="calibrated")
    axes.steps(
        np.linspace(0, 1, PIT_CLASSES + 1), shares, drawing.BLUE, label=f"this model (at most {pit['distance']:.4f} away)"
    )
    axes.legend(above=True)
    return figure


def draw_forecast(result: dict) -> drawing.Figure:
    """Bits/spike of rates by how many bins ahead they lie, beside those of baselines, with two standard errors.

    All curves are of the same contexts: where baselines leave some out, those that they have.
    """
    found = result["checkpoints"][-1]["forecast"]
    same = found.get("on_the_same_recordings")
    model = f"this model, in the {same['prompts']} of these with training data" if same else "this model"
    curves = {model: same or found, **found.get("baselines", {})}
    if "ideal" in found and not same:
        curves["best possible"] = found["ideal"]
    colors = {"mean rate": drawing.GREY, "recent rate": drawing.ORANGE, "best possible": drawing.GREEN}
    colors[model] = drawing.BLUE  # drawn last
    bins = np.arange(1, found["horizon"] + 1)
    values = {name: _floats(curve["fp_bits_per_spike"]) for name, curve in curves.items()}
    reach = 2 * np.nan_to_num(_floats(curves[model]["standard_error"]))
    low, high = values[model] - reach, values[model] + reach
    least = LEAST_SHOWN if np.fmax.reduce(values[model]) > LEAST_SHOWN else -math.inf
    figure = drawing.Figure(760, 440, f"forecast: {how(found)}")
    axes = figure.axes(
        (76, 66, 740, 374),
        x=(0.5, found["horizon"] + 0.5),
        x_ticks=[tick for tick in _whole_numbers(found["horizon"]) if tick],
        y=drawing.limits(*(np.maximum(each, least) for each in (low, high, *values.values())), [0.0]),
        x_label="bins ahead" + _bin_width(result),
        y_label=UNIT,
    )
    axes.level(0.0)
    for bin, below, above in zip(bins, low, high, strict=True):
        axes.line((bin, bin), (below, above), drawing.BLUE, width=1)
    for name in sorted(curves, key=list(colors).index):
        axes.line(bins, values[name], colors[name], label=name)
    axes.points(bins, values[model], drawing.BLUE)
    axes.legend(above=True)
    return figure


def _bin_width(result: dict) -> str:
    width_s = result["data"].get("bin_width_s")
    return f" (a bin is {width_s:g} s)" if isinstance(width_s, float | int) else ""


def draw_groups(result: dict) -> drawing.Figure:
    """A bar a group, the largest groups where there are many, with two standard errors, and its best baseline if that is of
    the same counts."""
    groups, ladders = result["checkpoints"][-1]["groups"], result["baselines"]
    known = [name for name in groups if groups[name]["bits_per_spike"] is not None]
    shown = sorted(known, key=lambda name: -groups[name]["spikes"])[:GROUPS_SHOWN]
    whole = [name for name in shown if name in ladders and not ladders[name]["counts_left_out"]]
    best = {name: max(rung["bits_per_spike"] for rung in ladders[name]["rungs"]) for name in whole}
    values = [groups[name]["bits_per_spike"] for name in shown]
    errors = [groups[name]["standard_errors"]["bits_per_spike"] or 0.0 for name in shown]
    reach = [value + side * 2 * error for value, error in zip(values, errors, strict=True) for side in (-1, 1)]
    x = drawing.limits(reach, list(best.values()), [0.0])
    bottom = 62 + ROW * len(shown)
    figure = drawing.Figure(860, bottom + 62, f"{len(shown)} of {len(groups)} by {result['by']}, those with most spikes first")
    left, right = 280, 840
    axes = figure.axes((left, 62, right, bottom), x=x, y=(len(shown), 0), x_label=UNIT, y_ticks=[])

    def pixel(value):
        return left + (right - left) * (value - x[0]) / (x[1] - x[0])

    for number, (name, value, error) in enumerate(zip(shown, values, errors, strict=True)):
        top = 62 + ROW * number
        label = name or "(no name)"
        figure.text((left - 8, top + ROW / 2), label if len(label) < 36 else f"...{label[-33:]}", anchor="rm")
        begin, end = sorted((pixel(0), pixel(value)))
        figure.rectangle((begin, top + 6, end, top + ROW - 6), drawing.BLUE)
        figure.polyline(
            [(pixel(value - 2 * error), top + ROW / 2), (pixel(value + 2 * error), top + ROW / 2)], drawing.INK, 1.5
        )
        if name in best:
            figure.polyline([(pixel(best[name]), top + 3), (pixel(best[name]), top + ROW - 3)], drawing.ORANGE, 3)
    axes.labels += [("this model", drawing.BLUE), *([("best baseline", drawing.ORANGE)] if best else [])]
    axes.legend(above=True)
    return figure


def draw_learning(result: dict) -> drawing.Figure:
    """Bits/spike of every checkpoint, above the baselines and, where it is known, below the best possible score."""
    records = [each for each in result["checkpoints"] if each["scores"]["bits_per_spike"] is not None]
    steps, values = [each["step"] for each in records], [each["scores"]["bits_per_spike"] for each in records]
    errors = [2 * (each["scores"]["standard_errors"]["bits_per_spike"] or 0.0) for each in records]
    levels = _levels(result)
    ideal = {"ideal observer": records[-1]["ideal"]["bits_per_spike"]} if "ideal" in records[-1] else {}
    reach = [value + side * error for value, error in zip(values, errors, strict=True) for side in (-1, 1)]
    figure = drawing.Figure(760, 440, "learning" + _why_no_levels(result))
    axes = figure.axes(
        (76, 66, 740, 374),
        x=(0, max(steps) * 1.03),
        x_ticks=_whole_numbers(max(steps)),
        y=drawing.limits(np.maximum(reach, LEAST_SHOWN), list(levels.values()), list(ideal.values()), [0.0]),
        x_label="step",
        y_label=UNIT,
    )
    colors = [*([drawing.GREEN] if ideal else []), drawing.GREY, drawing.ORANGE]
    for (name, value), color in zip((ideal | levels).items(), colors, strict=False):
        axes.level(value, color, width=1.5, label=name)
    for step, value, error in zip(steps, values, errors, strict=True):
        axes.line((step, step), (value - error, value + error), drawing.BLUE, width=1)
    axes.line(steps, values, drawing.BLUE, label="this model")
    axes.points(steps, values, drawing.BLUE)
    axes.legend(above=True)
    return figure


def _levels(result: dict) -> dict[str, float]:
    """Baselines that are drawn as lines across: the histogram and the best. None where they are of fewer counts than the
    curve, which may cost more or less than the others."""
    if "all" not in result["baselines"] or result["baselines"]["all"]["counts_left_out"]:
        return {}
    rungs = {rung["name"]: rung["bits_per_spike"] for rung in result["baselines"]["all"]["rungs"]}
    best = max(rungs, key=rungs.get)
    return {name: rungs[name] for name in dict.fromkeys(("per-neuron histogram", best)) if name in rungs}


def _why_no_levels(result: dict) -> str:
    """To go on with in a title."""
    left_out = result["baselines"].get("all", {}).get("counts_left_out")
    return f" (no baselines: they leave out {left_out:,} of these counts)" if left_out else ""


def _classes(curve: dict, what: str):
    return zip(curve[f"from_{what}"], curve[f"to_{what}"], strict=True)


def _whole_numbers(most: float) -> list[float]:
    return [tick for tick in drawing.round_numbers(0, most, 10) if tick == int(tick)]


def _octaves(most: float) -> list[float]:
    """1, 2, 4, ..; every second or fourth of many."""
    powers = list(range(math.floor(math.log2(max(most, 2))) + 1))
    return [2.0**power for power in powers[:: 1 + len(powers) // 10]]


def _floats(values) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)
