"""How well a model predicts held-out spike counts, in numbers that mean the same for every recording.

Nats a token hide everything: the separator is nearly free, and the number of neurons sets its share. So a count is scored by
q(k), its probability given that the token is a count, and beside it stand two nulls that know each neuron's own held-out
counts: Poisson with its mean (the null of the Neural Latents Benchmark, oracle included) and its histogram. A model of the
token stream conditions on the earlier neurons of the same bin: the sum over a bin is its joint likelihood, and a single term
is no forecast.
"""

from dataclasses import dataclass, replace
from math import lgamma, log

import numpy as np
import torch
from torch.nn.functional import softplus

from torchtitan_bio.data.batch import IGNORED
from torchtitan_bio.science.units import Units, by_session, standard_error

SEPARATOR = 255
NUM_COUNTS = 255  # 0 .. 254
CHUNK_TOKENS = 2**14  # logits of so many tokens are worked on at once: 16 MB in fp32
LN_FACTORIAL = np.array([lgamma(count + 1) for count in range(NUM_COUNTS)])
SUMS = ("tokens", "nll_all", "separators", "nll_bos", "counts", "nll", "leak", "rate", "windows")


class SpikeScores:
    """Sums over the windows of an aligned evaluation set, which add up over ranks; `result` makes scores of them.

    With `units` of units.by_recording, scores come with standard errors. With `keep_windows`, `window_nll` lists (origin, nats
    of the counts under q, number of counts) of each window.
    """

    def __init__(self, dataset, units=None, keep_windows=False):
        self.dataset, self.with_errors = dataset, units is not None
        self.units = units or by_session(dataset)
        self.sums = np.zeros((len(self.units.group), len(SUMS)))
        self.histograms = {}  # of a cell, (neurons, counts up to the largest seen)
        self.window_nll = [] if keep_windows else None

    def add(self, logits: torch.Tensor, batch):
        """Score one batch: logits (B, S, vocabulary) on any device, and the batch that they answer."""
        labels = batch.inputs["labels"].cpu()
        places = (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)
        labels, window_length = labels.reshape(-1)[places].long(), labels.shape[1]
        terms = token_terms(logits.detach().flatten(0, 1), places, labels)
        labels, places = labels.numpy(), places.numpy()
        ends = np.searchsorted(places, window_length * np.arange(1, len(batch.origins) + 1))
        begin = 0
        for number, (origin, end) in enumerate(zip(batch.origins, ends.tolist(), strict=True)):
            here = slice(begin, end)
            window_terms = {name: values[here] for name, values in terms.items()}
            self._add_window(origin, places[here] - number * window_length, labels[here], window_terms)
            begin = end

    def _add_window(self, origin, positions, labels, terms):
        neuron = (positions + 1) % self.dataset.width(origin[0]) - 1  # the label at p is token p + 1, and token 0 a separator
        is_count = neuron >= 0
        if (is_count == (labels == SEPARATOR)).any():
            raise ValueError(
                f"the window of {self.dataset.describe(origin)} does not start at a separator, so neurons cannot be told; "
                "score a data set built with mode='aligned', overlap=True"
            )
        if not is_count.any():
            return
        neuron, counts = neuron[is_count], labels[is_count]
        nll, leak = terms["nll"][is_count], terms["leak"][is_count]
        nll_bos = terms["nll_bos"][~is_count].sum()
        rate = (terms["mean"][is_count] - counts * np.log(terms["mean"][is_count])).sum()
        self.add_counts(
            origin,
            neuron,
            counts,
            nll=nll.sum(),
            leak=leak.sum(),
            rate=rate,
            tokens=len(labels),
            nll_all=nll.sum() + leak.sum() + nll_bos,
            separators=len(labels) - len(counts),
            nll_bos=nll_bos,
        )

    def add_counts(self, origin, neuron, counts, *, nll: float, **others: float):
        """Score the counts of one window, or of a whole recording, that cost `nll` nats together; `neuron` is whose each is.

        others: what a model has beside, by its name in SUMS. A baseline has no tokens, and scores of tokens or rates are None.
        """
        cell, added = self.units.cell(origin), {"counts": len(counts), "nll": nll, "windows": 1} | others
        self.sums[cell, [SUMS.index(name) for name in added]] += list(added.values())
        self._add_histogram(cell, self.dataset.width(origin[0]) - 1, neuron, counts)
        if self.window_nll is not None:
            self.window_nll.append((tuple(origin), float(nll), len(counts)))

    def _add_histogram(self, cell, n, neuron, counts):
        known = self.histograms.get(cell)
        width = max(int(counts.max()) + 1, 0 if known is None else known.shape[1])
        histogram = np.bincount(neuron * width + counts, minlength=n * width).reshape(n, width).astype(np.float64)
        if known is not None:
            histogram[:, : known.shape[1]] += known
        self.histograms[cell] = histogram

    def result(self, sum_array=lambda array: array) -> dict:
        """The scores over all sources, and where there are several also "macro" (their mean) and "sources" (each).

        `sum_array` adds a float64 array over ranks, and every rank must call this. A score of nothing (no spike, say) is None.
        """
        return self.summed(sum_array).scores(self.with_errors)

    def summed(self, sum_array=lambda array: array) -> "CellSums":
        """What all ranks have added; every rank must call this."""
        largest = np.zeros((len(self.sums), NUM_COUNTS))
        for cell, histogram in self.histograms.items():
            largest[cell, histogram.shape[1] - 1] = 1
        largest = sum_array(largest)
        neurons = [self.units.populations[population][1] for population in self.units.population.tolist()]
        widths = [int(seen[-1]) + 1 if len(seen := np.flatnonzero(row)) else 0 for row in largest]
        parts = [self.sums]
        for cell, shape in enumerate(zip(neurons, widths, strict=True)):
            histogram = np.zeros(shape)
            known = self.histograms.get(cell, histogram[:, :0])
            histogram[:, : known.shape[1]] = known
            parts.append(histogram)
        summed = np.split(sum_array(np.concatenate([part.ravel() for part in parts])), np.cumsum([part.size for part in parts]))
        sums, *histograms = [flat.reshape(part.shape) for flat, part in zip(summed, parts, strict=False)]
        nulls = np.zeros((len(sums), 4))
        for population in range(len(self.units.populations)):
            cells = np.flatnonzero(self.units.population == population).tolist()
            pooled = np.zeros((self.units.populations[population][1], max((widths[cell] for cell in cells), default=0)))
            for cell in cells:
                pooled[:, : widths[cell]] += histograms[cell]
            for cell in cells:
                nulls[cell] = null_sums(histograms[cell], pooled)
        return CellSums(self.units, sums, nulls)


def token_terms(logits, places, labels) -> dict[str, np.ndarray]:
    """Of the logits (tokens, vocabulary) at `places`, float64 on the CPU: `nll` = -ln q(label), `leak` = -ln p(a count),
    `nll_bos` = -ln p(separator), `mean` = sum of k q(k), `below` = sum of q(k) over k < label. What a larger vocabulary gives
    to tokens beyond the separator is leak as well. Computed in fp32 on the logits' device, chunk by chunk."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chunks = []
    for chunk, label in zip(places.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        scores = logits[chunk.to(logits.device)].to(dtype)
        of_counts, separator = scores[:, :NUM_COUNTS].logsumexp(1), scores[:, SEPARATOR]
        beyond = scores[:, SEPARATOR + 1 :].logsumexp(1)  # -inf where there is nothing
        counts = torch.arange(NUM_COUNTS, device=scores.device, dtype=dtype)
        label = label.to(scores.device)[:, None]
        q = (scores[:, :NUM_COUNTS] - of_counts[:, None]).exp()
        mean, below = q @ counts, (q * (counts < label)).sum(1)
        nll = of_counts - scores.gather(1, label).squeeze(1)
        # ln(1 + exp(difference)), because 1 - p would lose what is left of a leak of 1e-8
        leak = softplus(torch.logaddexp(separator, beyond) - of_counts, threshold=50)
        nll_bos = softplus(torch.logaddexp(of_counts, beyond) - separator, threshold=50)
        chunks.append(torch.stack([nll, leak, nll_bos, mean.clamp(min=torch.finfo(dtype).tiny), below]).double().cpu())
    table = torch.cat(chunks, dim=1).numpy() if chunks else np.zeros((5, 0))
    return dict(zip(("nll", "leak", "nll_bos", "mean", "below"), table, strict=True))


def null_sums(histogram, pooled) -> np.ndarray:
    """Of (neurons, counts) times: spikes, and nats under the Poisson of each neuron's mean in `pooled` and under its histogram
    there; sum of ln y!."""
    times, k = histogram.sum(1), np.arange(histogram.shape[1])
    spikes = histogram @ k
    ln_factorials = (histogram @ LN_FACTORIAL[: len(k)]).sum()
    all_times = np.maximum(pooled.sum(1), 1)
    mean = pooled @ np.arange(pooled.shape[1]) / all_times
    poisson = (times * mean - spikes * np.log(np.where(spikes > 0, mean, 1))).sum() + ln_factorials
    share = pooled[:, : len(k)] / all_times[:, None]
    return np.array([spikes.sum(), poisson, -(histogram * np.log(np.where(share > 0, share, 1))).sum(), ln_factorials])


@dataclass(frozen=True)
class CellSums:
    """What scores are made of, cell by cell."""

    units: Units
    sums: np.ndarray
    """(cells, SUMS)."""
    nulls: np.ndarray
    """(cells, 4), by null_sums."""

    def of_null(self) -> "CellSums":
        """The Poisson null in the place of what was scored here."""
        sums = np.where(np.isin(SUMS, ("counts", "windows")), self.sums, 0.0)
        sums[:, SUMS.index("nll")] = self.nulls[:, 1]
        return replace(self, sums=sums)

    def over(self, other: "CellSums") -> "CellSums":
        """These with `other` in the place of the Poisson null, in the cells that it has: bits/spike then say how far these are
        ahead of it, with the standard error of that difference."""
        counts = SUMS.index("counts")
        is_shared = other.sums[:, counts] > 0
        for mine, its in ((self.sums[:, counts], other.sums[:, counts]), (self.nulls[:, 0], other.nulls[:, 0])):
            assert np.array_equal(mine[is_shared], its[is_shared]), "scored on other counts"
        nulls = self.nulls.copy()
        nulls[:, 1] = other.sums[:, SUMS.index("nll")]
        return replace(self, sums=self.sums * is_shared[:, None], nulls=nulls)

    def scores(self, with_errors: bool) -> dict:
        """Those of all cells, and where there are several groups also "macro" and "sources"."""
        units = self.units
        scores = self._finish(np.arange(len(self.sums)), with_errors)
        if len(units.groups) > 1:
            each = [self._finish(np.flatnonzero(units.group == group), with_errors) for group in range(len(units.groups))]
            scores |= {"macro": mean_over_sources(each), "sources": dict(zip(units.groups, each, strict=True))}
        return scores

    def _finish(self, cells, with_errors):
        """Scores of some cells, then the totals they stand on."""
        cells = cells[self.sums[cells, SUMS.index("counts")] > 0]
        sums, nulls = self.sums[cells], self.nulls[cells]
        parts, scores = ratios(sums, nulls), {}
        for name, (above, below) in parts.items():
            scores[name] = float(above.sum() / below.sum()) if below.sum() else None
        scores |= {"spikes": int(nulls[:, 0].sum())}
        scores |= {name: int(sums[:, SUMS.index(name)].sum()) for name in ("counts", "tokens", "windows")}
        if with_errors:
            kind, clusters = self.units.clusters(cells)
            errors = {name: standard_error(above, below, clusters) for name, (above, below) in parts.items()}
            scores["standard_errors"] = errors | {"over": kind, "number": len(np.unique(clusters))}
        return scores


def ratios(sums, nulls) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(numerators, denominators) of each score, an entry a cell."""
    total = dict(zip(SUMS, sums.T, strict=True))
    spikes, poisson, histogram, ln_factorials = nulls.T
    is_model = total["tokens"] > 0
    return {
        "nll": (total["nll"], total["counts"]),
        "nll_all": (total["nll_all"], total["tokens"]),
        "nll_bos": (total["nll_bos"], total["separators"]),
        "leak": (total["leak"], is_model * total["counts"]),
        "bits_per_count": (total["nll"] / log(2), total["counts"]),
        "bits_per_spike": (poisson - total["nll"], spikes * log(2)),
        "bits_per_spike_hist": (histogram - total["nll"], spikes * log(2)),
        "bits_per_spike_rate": (is_model * (poisson - total["rate"] - ln_factorials), is_model * spikes * log(2)),
        "null_nll": (poisson, total["counts"]),
        "hist_nll": (histogram, total["counts"]),
    }


def mean_over_sources(each: list[dict]) -> dict:
    """The plain mean of each score over the sources that have it, with its standard error for just these sources.

    Totals have no mean.
    """
    means, errors = {}, {}
    for name in (name for name in each[0] if name not in ("spikes", "counts", "tokens", "windows", "standard_errors")):
        having = [scores for scores in each if scores[name] is not None]
        means[name] = sum(scores[name] for scores in having) / len(having) if having else None
        of_each = [scores.get("standard_errors", {}).get(name) for scores in having]
        if of_each and None not in of_each:
            errors[name] = sum(error**2 for error in of_each) ** 0.5 / len(having)
    return means | ({"standard_errors": errors} if errors else {})
