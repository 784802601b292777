"""Whether generated activity looks like data: six statistics of the one beside those of the other.

Both come as windows (windows, neurons, bins) of equally many bins, because intervals and correlations are cut off by a window's
end. A difference means something only beside the difference of as much real data, which is told with it: no model is expected
to come nearer.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from torchtitan_bio.science import drawing

AT_ONCE = 2**24  # counts; a longer recording is looked at in windows spread over all of it
POINTS = 2000  # drawn of a scatter
TURNS = 5
PER_NEURON = {
    "rate": "spikes a bin",
    "fano": "variance / mean of a bin's count",
    "autocorrelation": "of neighbouring bins",
    "correlation": "of two neurons in a bin",
}
DISTRIBUTIONS = {"interval": "bins between spikes", "population": "spikes of all neurons in a bin"}


@dataclass(frozen=True)
class Description:
    """Of some windows. Where a neuron is silent or never changes, or nothing has two spikes, what is undefined is NaN."""

    rate: np.ndarray
    fano: np.ndarray
    autocorrelation: np.ndarray
    """At lag 1, within windows."""
    correlation: np.ndarray
    """Of each pair i < j."""
    interval: np.ndarray
    """Share of the intervals between successive spikes of a neuron that are 0, 1, 2, ... bins; all neurons together."""
    population: np.ndarray
    """Share of the bins in which the neurons together have 0, 1, 2, ... spikes."""


def describe(windows) -> Description:
    num_windows, n, bins = windows.shape
    counts = windows.transpose(1, 0, 2).astype(np.float64)  # (neurons, windows, bins)
    rate = counts.mean((1, 2))
    deviation = counts - rate[:, None, None]
    variance = (deviation**2).mean((1, 2))
    neighbours = (deviation[:, :, 1:] * deviation[:, :, :-1]).mean((1, 2)) if bins > 1 else np.full(n, np.nan)
    flat = deviation.reshape(n, -1)
    covariance = (flat @ flat.T / flat.shape[1])[np.triu_indices(n, 1)]
    spread = np.sqrt(variance)
    return Description(
        rate=rate,
        fano=_ratio(variance, rate),
        autocorrelation=_ratio(neighbours, variance),
        correlation=_ratio(covariance, (spread[:, None] * spread)[np.triu_indices(n, 1)]),
        interval=_intervals(windows),
        population=_shares(np.bincount(windows.sum(1, dtype=np.int64).ravel())),
    )


def _ratio(above, below):
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _shares(numbers):
    return numbers / total if (total := numbers.sum()) else np.full(len(numbers), np.nan)


def _intervals(windows):
    """k spikes in a bin are k - 1 intervals of nothing; the next interval reaches to the next bin with a spike."""
    trains = windows.reshape(-1, windows.shape[2])
    train, bin = np.nonzero(trains)
    between = np.diff(bin)[np.diff(train) == 0]
    numbers = np.bincount(between, minlength=windows.shape[2])
    numbers[0] = (trains[train, bin].astype(np.int64) - 1).sum()
    return _shares(numbers)


def compare(samples, data) -> dict:
    """{statistic: {"samples", "data": means; "difference"; "floor": difference of as many real windows, or None}}.

    The difference is the mean absolute one over neurons or pairs, of those defined on both sides (None where there is none);
    of a distribution it is the total variation distance, from 0 (the same) to 1. For the floor as many windows as there are
    samples are set aside from the data, up to TURNS times others, and compared with the rest.
    """
    check(samples, data)
    ours, theirs = describe(samples), describe(data)
    real = [tuple(map(describe, turn)) for turn in set_aside(data, len(samples))]
    return {
        name: {
            "samples": _mean(name, ours),
            "data": _mean(name, theirs),
            "difference": difference(name, ours, theirs),
            "floor": _mean_of([difference(name, *turn) for turn in real]),
        }
        for name in (*PER_NEURON, *DISTRIBUTIONS)
    }


def check(samples, data):
    if samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"samples have {samples.shape[1]} neurons and windows of {samples.shape[2]} bins, the data {data.shape[1]} neurons "
            f"and windows of {data.shape[2]} bins; realism needs them alike"
        )


def set_aside(data, number: int):
    """(so many windows, evenly spread; the others), for up to TURNS disjoint sets; for none where fewer would remain."""
    num_turns = min(TURNS, len(data) // number)
    for turn in range(num_turns if num_turns > 1 else 0):
        chosen = np.zeros(len(data), bool)
        chosen[np.arange(number) * len(data) // number + turn * (len(data) // number) // num_turns] = True
        yield data[chosen], data[~chosen]


def difference(name: str, one: Description, other: Description) -> float | None:
    one, other = getattr(one, name), getattr(other, name)
    if name in DISTRIBUTIONS:
        both = np.zeros((2, max(len(one), len(other))))
        both[0, : len(one)], both[1, : len(other)] = one, other
        apart = float(np.abs(both[0] - both[1]).sum() / 2)
        return apart if np.isfinite(apart) else None
    apart = np.abs(one - other)
    apart = apart[np.isfinite(apart)]
    return float(apart.mean()) if len(apart) else None


def _mean_of(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean(name: str, of: Description) -> float | None:
    values = getattr(of, name)
    if name in DISTRIBUTIONS:
        return float(np.arange(len(values)) @ values) if np.isfinite(values).all() else None
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def windows_of(counts, bins: int) -> np.ndarray:
    """A recording (neurons, time) cut into windows of so many bins, (windows, neurons, bins); of a long one a part, spread."""
    n, number = counts.shape[0], counts.shape[1] // bins
    kept = min(number, max(1, AT_ONCE // (n * bins)))
    starts = np.arange(kept) * number // max(1, kept) * bins
    return (
        np.stack([counts[:, start : start + bins] for start in starts.tolist()]) if kept else np.empty((0, n, bins), np.uint8)
    )


def table(result: dict) -> list[str]:
    """The lines for a console."""
    lines = [f"{'realism':<18}{'samples':>10}{'data':>10}{'difference':>12}{'of real data':>14}"]
    for name, row in result.items():
        meaning = (PER_NEURON | DISTRIBUTIONS)[name]
        lines.append(
            f"  {name:<16}{_figure(row['samples']):>10}{_figure(row['data']):>10}{_figure(row['difference']):>12}"
            f"{_figure(row['floor']):>14}   {meaning}"
        )
    return lines


def _figure(value) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(samples, data, title: str = "") -> drawing.Figure:
    """Each statistic of the samples against that of the data: a point a neuron or pair, and two histograms.

    Where compare would tell the difference of as much real data, it is drawn too.
    """
    check(samples, data)
    theirs = describe(data)
    shown = [
        ("as much real data", drawing.SILVER, describe(control))
        for control, _ in itertools.islice(set_aside(data, len(samples)), 1)
    ]
    shown.append(("samples", drawing.BLUE, describe(samples)))
    figure = drawing.Figure(1180, 770, title)
    for number, name in enumerate((*PER_NEURON, *DISTRIBUTIONS)):
        left, top = 70 + 385 * (number % 3), 76 + 365 * (number // 3)
        box = (left, top, left + 300, top + 270)
        (_draw_scatter if name in PER_NEURON else _draw_shares)(figure, box, name, theirs, shown)
    return figure


def _draw_scatter(figure, box, name, theirs, shown):
    other = getattr(theirs, name)
    pairs = [(label, color, other, getattr(of, name)) for label, color, of in shown]
    pairs = [(*named, x[both], y[both]) for *named, x, y in pairs for both in [np.isfinite(x) & np.isfinite(y)]]
    if not any(len(x) for _, _, x, _ in pairs):
        _draw_nothing(figure, box, f"{name}: {PER_NEURON[name]}", theirs, shown)
        return
    span = drawing.limits(*(values for _, _, *both in pairs for values in both))
    axes = figure.axes(box, x=span, y=span, title=f"{name}: {PER_NEURON[name]}", x_label="data", y_label="samples")
    axes.line(span, span, drawing.GREY, width=1)
    for label, color, x, y in pairs:
        stride = max(1, len(x) // POINTS)
        axes.points(x[::stride], y[::stride], color, radius=3 if len(x) < 300 else 1.5, label=label)
    if name == "rate":
        axes.legend(top=False)


def _draw_shares(figure, box, name, theirs, shown):
    curves = [("data", drawing.INK, theirs), shown[-1]]
    shares = [getattr(of, name) for _, _, of in curves]
    # Up to the value that one bin or interval in a thousand passes
    end = 1 + max(int((np.cumsum(each) < 0.999).sum()) for each in shares)
    if not any(np.isfinite(each).all() for each in shares):
        _draw_nothing(figure, box, f"{name}: {DISTRIBUTIONS[name]}", theirs, shown)
        return
    x, y = (-0.5, end - 0.5), drawing.limits(*(each[:end] for each in shares), least=0)
    axes = figure.axes(box, x=x, y=y, title=f"{name}: {DISTRIBUTIONS[name]}", y_label="share")
    for (label, color, _), each in zip(curves, shares, strict=True):
        label += "" if np.isfinite(each).all() else ": none"
        axes.steps(np.arange(end + 1) - 0.5, np.pad(each[:end], (0, max(0, end - len(each)))), color, label=label)
    axes.legend()


def _draw_nothing(figure, box, title, theirs, shown):
    """An empty frame that says why it is."""
    silent = [where for where, of in (("data", theirs), ("samples", shown[-1][2])) if not of.rate.any()]
    words = f"no spikes in the {' and the '.join(silent)}" if silent else "nowhere defined"
    left, top, right, bottom = box
    figure.axes(box, x=(0, 1), y=(0, 1), title=title, x_ticks=[], y_ticks=[])
    figure.text(((left + right) / 2, (top + bottom) / 2), words, color=drawing.GREY, anchor="mm")
