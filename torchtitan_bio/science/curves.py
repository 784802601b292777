"""Where in a window and in a bin a model is good, and whether its probabilities are: what stands behind the one score.

By context: every bin of every window, also of those that are context only, by its place in the window. Windows overlap by half,
so nearly the same bins are met with little context and with much: the curve says what context buys, not what lay where. By
neuron: scored counts by the neuron's place in its bin, which is how many neurons of that bin the model has seen. Calibration:
u = sum of q(k) over k < y, plus a random share of q(y), is uniform if the model's probabilities are right.
"""

from math import log

import numpy as np
import torch

from torchtitan_bio.data import keyed
from torchtitan_bio.data.batch import IGNORED
from torchtitan_bio.science.scores import LN_FACTORIAL, token_terms
from torchtitan_bio.science.units import Units, standard_error

PIT_CLASSES = 20
PIT_STREAM = 301  # names the random stream, beside those of data/
SINGLES = 32  # populations up to this size are shown neuron by neuron


def edges(most: int, singles: int = 4) -> np.ndarray:
    """0, 1, .., singles, then one and a half and twice as many, and so on; the last is `most`."""
    found = list(range(min(singles, most) + 1))
    while found[-1] < most:
        power = 2 ** int(np.log2(found[-1]))
        found.append(power * 3 // 2 if found[-1] == power and power > 1 else power * 2)
    return np.array([*found[:-1], most])


class Curves:
    """Sums over the windows of an aligned evaluation set, cell by cell of `units`, which add up over ranks."""

    def __init__(self, dataset, units: Units):
        self.dataset, self.units, num_cells = dataset, units, len(units.group)
        neurons = [units.populations[population][1] for population in units.population.tolist()]
        bins = np.minimum(dataset.windows.window_bins, dataset.index.t)[units.row] if num_cells else np.ones(1, int)
        self.bin_edges = edges(max(1, int(np.max(bins))))
        widest = max(neurons, default=1)
        self.neuron_edges = np.arange(widest + 1) if widest <= SINGLES else edges(widest)
        self.context = np.zeros((num_cells, len(self.bin_edges) - 1, 3))  # nats, bins, sum of ln y!
        self.context_spikes = [np.zeros((len(self.bin_edges) - 1, n)) for n in neurons]
        self.neurons = [np.zeros((4, n)) for n in neurons]  # nats, spikes, sum of ln y!, bins
        self.pit = np.zeros((num_cells, PIT_CLASSES))

    def add(self, logits: torch.Tensor, batch):
        """As SpikeScores.add."""
        labels, tokens = batch.inputs["labels"].cpu().numpy(), batch.inputs["tokens"].cpu().numpy()
        for origin, of_window, known, next_tokens in zip(batch.origins, logits, labels, tokens, strict=False):
            width = self.dataset.width(origin[0])
            scored = np.flatnonzero(known != IGNORED)
            first, bins = (int(scored[0]) + 1) // width, (int(scored[-1]) + 2) // width
            # The label at p is token p + 1; the last one of a full window is in no input.
            row = np.append(next_tokens, known[-1])[: bins * width].reshape(bins, width)
            counts = torch.from_numpy(row[:, 1:].astype(np.int64))
            places = torch.arange(bins * width).reshape(bins, width)[:, 1:] - 1
            terms = token_terms(of_window.detach(), places.flatten(), counts.flatten())
            shaped = {name: terms[name].reshape(bins, width - 1) for name in ("nll", "below")}
            self.add_window(origin, counts.numpy(), shaped["nll"], first, shaped["below"])

    def add_window(self, origin, counts, nll, first_scored: int, below=None):
        """One window: counts and their nats as (bins, neurons), scored from bin first_scored on.

        below: the probability of less than each count; without it nothing is said of calibration.
        """
        cell = self.units.cell(origin)
        bins, n = counts.shape
        place = np.searchsorted(self.bin_edges, np.arange(bins), side="right") - 1
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        ln_factorials = LN_FACTORIAL[counts]
        sums = np.stack([nll.sum(1), np.ones(bins), ln_factorials.sum(1)], axis=1)
        self.context[cell, place[starts]] += np.add.reduceat(sums, starts)
        self.context_spikes[cell][place[starts]] += np.add.reduceat(counts.astype(np.float64), starts)
        scored = slice(first_scored, None)
        self.neurons[cell] += [
            *(each[scored].sum(0) for each in (nll, counts, ln_factorials)),
            np.full(n, bins - first_scored),
        ]
        if below is not None:
            self._add_pit(cell, origin, nll[scored], below[scored], first_scored)

    def _add_pit(self, cell, origin, nll, below, first_scored):
        row, begin = origin
        start = (begin + first_scored) * nll.shape[1]
        drawn = keyed.uniform(nll.size, keyed.text_key(self.dataset.index.id[row]), PIT_STREAM, start=start)
        u = below + drawn.reshape(nll.shape) * np.exp(-nll)
        self.pit[cell] += np.bincount(np.clip(u * PIT_CLASSES, 0, PIT_CLASSES - 1).astype(int).ravel(), minlength=PIT_CLASSES)

    def result(self, sum_array=lambda array: array) -> dict:
        """{"all": the curves, and where there are several groups the name of each: its own}; every rank must call this."""
        parts = [self.context, self.pit, *self.context_spikes, *self.neurons]
        ends = np.cumsum([part.size for part in parts])[:-1]
        flat = np.split(sum_array(np.concatenate([part.ravel() for part in parts])), ends)
        context, pit, *rest = [values.reshape(part.shape) for values, part in zip(flat, parts, strict=True)]
        num_cells = len(self.units.group)
        spikes, neurons = rest[:num_cells], rest[num_cells:]
        context_null, neuron_null = self._nulls(context, spikes, neurons)
        group_of = {"all": np.arange(num_cells)}
        if len(self.units.groups) > 1:
            group_of |= {name: np.flatnonzero(self.units.group == number) for number, name in enumerate(self.units.groups)}
        result = {}
        for name, cells in group_of.items():
            cells = cells[context[cells, :, 1].sum(1) > 0]
            result[name] = {
                "context": self._by_context(cells, context, spikes, context_null),
                "neuron": self._by_neuron(cells, neurons, neuron_null),
                "pit": _shares(pit[cells].sum(0)),
            }
        return result

    def _nulls(self, context, spikes, neurons):
        """Nats under each neuron's Poisson of its session's scored mean: (cells, classes), and of each cell (n,)."""
        context_null, neuron_null = np.zeros(context.shape[:2]), [None] * len(neurons)
        for population in range(len(self.units.populations)):
            cells = np.flatnonzero(self.units.population == population).tolist()
            total = sum((neurons[cell] for cell in cells), np.zeros((4, self.units.populations[population][1])))
            mean = total[1] / np.maximum(total[3], 1)
            ln_mean = np.log(np.where(mean > 0, mean, 1))
            for cell in cells:
                _, bins, ln_factorials = context[cell].T
                context_null[cell] = bins * mean.sum() - spikes[cell] @ ln_mean + ln_factorials
                _, of_neuron, ln_factorial, times = neurons[cell]
                neuron_null[cell] = times * mean - of_neuron * ln_mean + ln_factorial
        return context_null, neuron_null

    def _by_context(self, cells, context, spikes, null):
        """A point a class of bins: its first bin, the one after its last, and its scores."""
        nats, bins = context[cells, :, 0], context[cells, :, 1]
        num_spikes = np.array([spikes[cell].sum(1) for cell in cells]).reshape(bins.shape)
        n = np.array([self.units.populations[self.units.population[cell]][1] for cell in cells]).reshape(-1, 1)
        seen = np.flatnonzero(bins.sum(0))
        above, below = (null[cells] - nats)[:, seen], num_spikes[:, seen] * log(2)
        _, clusters = self.units.clusters(cells) if len(cells) else ("", cells)
        return {
            "from_bin": self.bin_edges[:-1][seen].tolist(),
            "to_bin": self.bin_edges[1:][seen].tolist(),
            "counts": (bins * n).sum(0)[seen].astype(int).tolist(),
            "nll": _ratios(nats.sum(0)[seen], (bins * n).sum(0)[seen]),
            "bits_per_spike": _ratios(above.sum(0), below.sum(0)),
            "standard_error": [standard_error(above[:, place], below[:, place], clusters) for place in range(len(seen))],
            "below_longest": [
                _difference(above[:, [-1, place]], below[:, [-1, place]], clusters) for place in range(len(seen))
            ],
        }

    def _by_neuron(self, cells, neurons, null):
        num_classes = len(self.neuron_edges) - 1
        sums = np.zeros((4, num_classes))  # nats, null's nats, spikes, counts
        for cell in cells:
            nats, spikes, _, times = neurons[cell]
            place = np.searchsorted(self.neuron_edges, np.arange(len(nats)), side="right") - 1
            for total, values in zip(sums, (nats, null[cell], spikes, times), strict=True):
                total += np.bincount(place, values, minlength=num_classes)
        seen = np.flatnonzero(sums[3])
        nats, null_nats, spikes, counts = sums[:, seen]
        return {
            "from_neuron": self.neuron_edges[:-1][seen].tolist(),
            "to_neuron": self.neuron_edges[1:][seen].tolist(),
            "counts": counts.astype(int).tolist(),
            "spikes": spikes.astype(int).tolist(),
            "nll": _ratios(nats, counts),
            "null_nll": _ratios(null_nats, counts),
            "bits_per_spike": _ratios(null_nats - nats, spikes * log(2)),
        }


def _shares(times) -> dict | None:
    """The histogram of u, and how far its distribution is from uniform at most (0: calibrated)."""
    if not times.sum():
        return None
    shares = times / times.sum()
    uniform = np.arange(1, PIT_CLASSES + 1) / PIT_CLASSES
    return {"shares": shares.tolist(), "distance": float(np.abs(np.cumsum(shares) - uniform).max()), "counts": int(times.sum())}


def _ratios(above, below) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(above, below, strict=True)]


def _difference(above, below, clusters) -> dict | None:
    """How much the first ratio of sums is above the second, cell by cell of the same data, with its standard error."""
    totals = below.sum(0)
    if not totals.all():
        return None
    ratio = above.sum(0) / totals
    spread = ((above - ratio * below) / totals) @ [1.0, -1.0]
    error = standard_error(spread, np.full(len(spread), 1 / len(spread)), clusters)
    return {"bits_per_spike": float(ratio[0] - ratio[1]), "standard_error": error}
