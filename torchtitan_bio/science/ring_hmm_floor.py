"""The best score that any model can reach on ring-HMM data, and how near a model comes.

The ideal observer knows the population and the walk, and sees what a model sees: the window from its first bin, and the earlier
neurons of the same bin. It filters forward, neuron by neuron. A model below it by more than chance has seen its own answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_COUNTS = 2**20  # filtered at once; each needs the probabilities of 8 counts


def predictive(counts, emission, p) -> np.ndarray:
    """P(count | all before it in its window), (windows, bins, neurons, levels), by forward filtering.

    `counts` is (windows, bins, neurons); `emission` is P(count | state) as (states, neurons, levels); the walk on the ring of
    states stays with 1 - 2p, steps either way with p, and is uniform at a window's start.
    """
    num_windows, bins, neurons = counts.shape
    states, _, levels = emission.shape
    result = np.empty((num_windows, bins, neurons, levels))
    belief = np.full((num_windows, states), 1 / states)
    for bin in range(bins):
        belief = (1 - 2 * p) * belief + p * (np.roll(belief, 1, axis=1) + np.roll(belief, -1, axis=1))
        for neuron in range(neurons):
            result[:, bin, neuron] = belief @ emission[:, neuron]
            belief = belief * emission[:, neuron].T[counts[:, bin, neuron]]
            belief /= belief.sum(axis=1, keepdims=True)
    return result


def window_nll(dataset, numbers=None) -> list[tuple[tuple[int, int], float, int]]:
    """(origin, nats of the scored counts, their number) of each window (or of the windows `numbers`) of a ring-HMM evaluation
    set, for the ideal observer. SpikeScores(keep_windows=True) lists the same for a model.
    """
    return [
        (window.origin, float(window.nll[window.first_scored :].sum()), window.nll[window.first_scored :].size)
        for window in observe(dataset, numbers)
    ]


@dataclass(frozen=True)
class Observed:
    """What the ideal observer makes of one window."""

    origin: tuple[int, int]
    counts: np.ndarray
    """(bins, neurons)."""
    nll: np.ndarray
    """Nats of each, -ln P(count | all before it in the window)."""
    first_scored: int
    """The bin from which on counts are scored; those before are context."""


def observe(dataset, numbers=None) -> Iterator[Observed]:
    """Each window (or the windows `numbers`) of a ring-HMM evaluation set, by recording where populations differ."""
    groups = {}
    for i in range(len(dataset)) if numbers is None else numbers:
        row, _ = dataset.origin(i)
        groups.setdefault(None if dataset.store.shared else row, []).append(i)
    for members in groups.values():
        row, _ = dataset.origin(members[0])
        emission = dataset.store.distribution(dataset.store.rates(int(dataset.index.offset[row]), int(dataset.index.n[row])))
        block = max(1, BLOCK_COUNTS // dataset.seq_len)
        for first in range(0, len(members), block):
            yield from _filter([dataset.sample(i) for i in members[first : first + block]], emission, dataset.store.p)


def _filter(samples, emission, p):
    _, neurons, levels = emission.shape
    bins = (len(samples[0].tokens) - 1) // (neurons + 1)
    tokens = np.stack([sample.tokens[: bins * (neurons + 1)] for sample in samples])
    # What follows a short window's end reads as large counts; nothing before it depends on them, and they are cut off.
    counts = np.minimum(tokens.reshape(len(samples), bins, neurons + 1)[:, :, 1:], levels - 1).astype(np.int64)
    nll = -np.log(np.take_along_axis(predictive(counts, emission, p), counts[..., None], axis=3)[..., 0])
    for sample, its_counts, its_nll in zip(samples, counts, nll, strict=True):
        first, end = (position // (neurons + 1) for position in sample.labels)
        yield Observed(sample.origin, its_counts[:end], its_nll[:end], first)


@dataclass(frozen=True)
class Gap:
    """A model's nats a count above the ideal observer's, mean(ln p_true - ln q), with its standard error by window."""

    gap: float
    standard_error: float
    nll: float
    floor: float

    @property
    def is_leak(self) -> bool:
        """Whether the model is better than the best by more than chance: it has seen what it should predict."""
        return self.gap < -3 * self.standard_error

    def captured(self, hist_nll: float) -> float | None:
        """The share of what there is to gain over the per-neuron histogram.

        None where that is not above the floor: it knows the held-out counts, and of short recordings it knows too much.
        """
        if hist_nll <= self.floor:
            return None
        return (hist_nll - self.nll) / (hist_nll - self.floor)


def gap(model, floor) -> Gap:
    """Compare two lists of (origin, nats, number of counts) of the same windows, in any order."""
    ideal = {tuple(origin): (nats, number) for origin, nats, number in floor}
    if sorted(ideal) != sorted(tuple(origin) for origin, _, _ in model):
        raise ValueError(f"the model's {len(model)} windows are not the ideal observer's {len(ideal)}")
    table = np.array([(nats, number, *ideal[tuple(origin)]) for origin, nats, number in model], dtype=np.float64)
    nats, number, ideal_nats, ideal_number = table.T
    if (number != ideal_number).any():
        raise ValueError("a window has other counts scored by the model than by the ideal observer")
    mean = (nats - ideal_nats).sum() / number.sum()
    # A ratio of sums, since windows differ in how many counts they score
    spread = nats - ideal_nats - mean * number
    standard_error = np.sqrt((spread**2).sum() * len(spread) / max(1, len(spread) - 1)) / number.sum()
    return Gap(*map(float, (mean, standard_error, nats.sum() / number.sum(), ideal_nats.sum() / number.sum())))
