"""One evaluation: what is summed while a model reads the held-out windows, and what is made of the sums.

Standard errors are of a ratio of sums over recordings, or over stretches of consecutive windows where a group has few
recordings (units.py). The oracle null is taken as given.
"""

from dataclasses import dataclass
from itertools import zip_longest
from math import log

from torchtitan_bio.science import baselines, ring_hmm_floor, units
from torchtitan_bio.science.curves import Curves
from torchtitan_bio.science.scores import CellSums, SpikeScores

GROUPS_SHOWN = 40
UNIT = "bits_per_spike"
COLUMN = 17  # characters, of a score with its error; where one wants more, its column is wider


class Scorer:
    """For train.validate: the scores with their errors, and the curves."""

    def __init__(self, dataset, by: str = "source_dataset"):
        self.units = units.by_recording(dataset, by)
        self.scores = SpikeScores(dataset, self.units, keep_windows=True)
        self.curves = Curves(dataset, self.units)

    def add(self, logits, batch):
        self.scores.add(logits, batch)
        self.curves.add(logits, batch)

    def result(self, sum_array) -> "Measured":
        return Measured(self.scores.summed(sum_array), self.curves.result(sum_array))


@dataclass(frozen=True)
class Measured:
    cells: CellSums
    curves: dict
    """Of all, and of each group where there are several."""

    def record(self) -> dict:
        """Scores and curves as JSON, by group."""
        scores = self.cells.scores(with_errors=True)
        macro, groups = scores.pop("macro", None), scores.pop("sources", {})
        return {"scores": scores} | ({"macro": macro, "groups": groups} if groups else {}) | {"curves": self.curves}


def against_ideal(dataset, numbers, by: str, measured: Measured, window_nll) -> dict:
    """How near the model is to the best possible score of ring-HMM data, window by window, and where that is by context.

    numbers: the windows that were scored. window_nll: of SpikeScores, from all ranks.
    """
    curves = Curves(dataset, units.by_recording(dataset, by))
    floor = []
    for window in ring_hmm_floor.observe(dataset, numbers):
        scored = window.nll[window.first_scored :]
        floor.append((window.origin, float(scored.sum()), scored.size))
        curves.add_window(window.origin, window.counts, window.nll, window.first_scored)
    found = ring_hmm_floor.gap(window_nll, floor)
    scores = measured.cells.scores(with_errors=False)
    null, spikes = scores["null_nll"] * scores["counts"], scores["spikes"] * log(2)
    return {
        "floor": found.floor,
        "gap": found.gap,
        "standard_error": found.standard_error,
        "captured": found.captured(scores["hist_nll"]),
        "bits_per_spike": (null - found.floor * scores["counts"]) / spikes if spikes else None,
        "is_leak": found.is_leak,
        "curves": {name: {part: value[part] for part in ("context", "neuron")} for name, value in curves.result().items()},
    }


def against_baselines(dataset, numbers, measured: Measured, scored: baselines.Scored) -> dict:
    """The model and the baselines on the same bins: those of the recordings that baselines could be fitted for.

    numbers: the windows that were scored. {"all": ladder, and the name of each group where there are several: its own}; a group
    without a spike in those recordings has none. A ladder's "counts_left_out" are of the group's other recordings: its "model"
    is the model's score of the group only where there are none.
    """
    scored_counts = {name: scores["counts"] for name, scores in by_group(measured.cells).items()}
    found = scored.on(measured.cells.units, scored_bins(dataset, numbers))
    own = {name: bits_per_spike(cells) for name, cells in found.items()}
    ahead = {name: bits_per_spike(measured.cells.over(cells)) for name, cells in found.items()}
    return {
        group: {
            "model": {name: model[name] for name in (UNIT, "standard_error")},
            "rungs": [_rung(name, own[name][group], ahead[name][group]) for name in found],
            "counts_left_out": scored_counts[group] - model["counts"],
        }
        for group, model in ahead.get(baselines.NULL, {}).items()  # ahead of the null is what the model has itself
        if model[UNIT] is not None
    }


def _rung(name, own, ahead):
    own = {key: own[key] for key in (UNIT, "standard_error")}
    return {"name": name, **own, "model_ahead": ahead[UNIT], "model_ahead_standard_error": ahead["standard_error"]}


def scored_bins(dataset, numbers) -> list[tuple]:
    """(origin, first, end) of each window (or of the windows `numbers`): the bins of its recording that it scores."""
    found = []
    for i in range(len(dataset)) if numbers is None else numbers:
        window = dataset.windows.window(i)
        row, begin = window.origin
        first, end = (begin + position // dataset.width(row) for position in window.labels)
        found.append((window.origin, first, end))
    return found


def bits_per_spike(cells: CellSums) -> dict:
    """Bits/spike with the standard error and the number of counts, of "all" and of each group where there are several."""
    return {
        name: {UNIT: each[UNIT], "standard_error": each["standard_errors"][UNIT], "counts": each["counts"]}
        for name, each in by_group(cells).items()
    }


def by_group(cells: CellSums) -> dict[str, dict]:
    """Scores of "all" and of each group where there are several."""
    scores = cells.scores(with_errors=True)
    return {"all": scores, **scores.get("sources", {})}


# ---- the console


def table(record: dict) -> list[str]:
    """Scores of all, of the mean, of each group."""
    head = ("bits/spike", "over histogram", "of rates", "bits/count", "nats/count", "spikes")
    rows = {"all counts": record["scores"]}
    if "groups" in record:
        shown = sorted(record["groups"].items(), key=lambda each: -each[1]["spikes"])[:GROUPS_SHOWN]
        rows |= {f"mean of {len(record['groups'])} groups": record["macro"], **dict(shown)}
    cells = [("held-out", head)]
    for name, scores in rows.items():
        name = name or "(no name)"
        errors = scores.get("standard_errors", {})
        columns = [
            with_error(scores[key], errors.get(key))
            for key in ("bits_per_spike", "bits_per_spike_hist", "bits_per_spike_rate", "bits_per_count", "nll")
        ]
        columns.append(f"{scores['spikes']:,}" if "spikes" in scores else "")
        cells.append((f"  {name if len(name) <= 32 else f'...{name[-29:]}'}", columns))
    lines = ["", *in_columns(cells, 34)]
    if len(record.get("groups", {})) > GROUPS_SHOWN:
        lines.append(f"  ... those with most spikes; all {len(record['groups'])} are in evaluation.json")
    scores = record["scores"]
    if scores["standard_errors"]["number"] > 1:
        lines.append(f"  standard errors over {scores['standard_errors']['number']} {scores['standard_errors']['over']}")
    lines.append(
        f"  all labels {figure(scores['nll_all'])} nats, separators {figure(scores['nll_bos'])}, "
        f"given to the separator inside bins {figure(scores['leak'])}"
    )
    pit = record["curves"]["all"]["pit"]
    if pit:
        lines.append(f"  calibration: the distribution of u is at most {pit['distance']:.4f} from uniform (0: calibrated)")
    return lines


def ideal_lines(ideal: dict) -> list[str]:
    """The gap to the best possible score."""
    gap, error = (ideal[name] / ideal["floor"] for name in ("gap", "standard_error"))
    lines = [
        "",
        f"ideal observer of these windows: {ideal['floor']:.4f} nats/count, {figure(ideal['bits_per_spike'])} bits/spike",
        f"  the model is {ideal['gap']:.4f} +- {ideal['standard_error']:.4f} nats/count above, {gap:.2%} +- {error:.2%}",
    ]
    if ideal["captured"] is not None and ideal["captured"] < 0:
        lines.append("  it has captured nothing: each neuron's own histogram is better")
    elif ideal["captured"] is not None:
        lines.append(f"  it has captured {ideal['captured']:.1%} of what there is to gain over the histogram")
    if ideal["is_leak"]:
        lines.append("LEAK: a model that is better than the best possible one sees what it should predict (mask, label shift)")
    return lines


def ladder_lines(ladder: dict) -> list[str]:
    """The model among the baselines, the best one last, with how far it is ahead of each."""
    name = "this model, on the same recordings" if ladder["counts_left_out"] else "this model"
    cells = [("held-out bits/spike", ["", "model ahead by"])]
    for rung in sorted([*ladder["rungs"], {"name": name, **ladder["model"]}], key=lambda rung: rung[UNIT]):
        ahead = with_error(rung["model_ahead"], rung["model_ahead_standard_error"]) if "model_ahead" in rung else ""
        cells.append((f"  {rung['name']}", [with_error(rung[UNIT], rung["standard_error"]), ahead]))
    return ["", *in_columns(cells, 46)]


def in_columns(rows: list[tuple[str, list[str]]], name_width: int) -> list[str]:
    """A line for each (name, cells), the cells to the right of columns that hold the widest of them."""
    columns = zip_longest(*(cells for _, cells in rows), fillvalue="")
    widths = [max(COLUMN, *map(len, column)) for column in columns]
    return [
        (f"{name:<{name_width}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=False))).rstrip()
        for name, cells in rows
    ]


def with_error(value, error) -> str:
    return figure(value) + (f" +- {error:.3f}" if error is not None else "")


def figure(value) -> str:
    return "-" if value is None else f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
