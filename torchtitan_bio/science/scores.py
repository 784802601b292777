"""How well a model predicts held-out spike counts, in numbers that mean the same for every recording.

Nats a token hide everything: the separator is nearly free, and the number of neurons sets its share. So a count is scored by
q(k) = p(k) / (1 - p(separator)), and beside it stand two nulls that know each neuron's own held-out counts: Poisson with its
mean (the null of the Neural Latents Benchmark, oracle included) and its histogram. A model of the token stream conditions on
the earlier neurons of the same bin: the sum over a bin is its joint likelihood, and a single term is no forecast.
"""

from math import lgamma, log

import numpy as np
import torch
from torch.nn.functional import softplus

from torchtitan_bio.data.batch import IGNORED

SEPARATOR = 255
NUM_COUNTS = 255  # 0 .. 254
CHUNK_TOKENS = 2**14  # logits of so many tokens are worked on at once: 16 MB in fp32
LN_FACTORIAL = np.array([lgamma(count + 1) for count in range(NUM_COUNTS)])
SUMS = ("tokens", "nll_all", "separators", "nll_bos", "counts", "nll", "leak", "rate", "windows")


class SpikeScores:
    """Sums over the windows of an aligned evaluation set, which add up over ranks; `result` makes scores of them.

    With `keep_windows`, `window_nll` lists (origin, nats of the counts under q, number of counts) of each window.
    """

    def __init__(self, dataset, keep_windows=False):
        self.dataset = dataset
        rows = range(len(dataset.index.id))
        self.sources = sorted(set(dataset.index.source_dataset))
        self.populations = sorted({self._population(row) for row in rows})
        self.source_of = {self._population(row): self.sources.index(dataset.index.source_dataset[row]) for row in rows}
        self.sums = np.zeros((len(self.sources), len(SUMS)))
        self.histograms = {}  # of a population, (neurons, counts up to the largest seen)
        self.window_nll = [] if keep_windows else None

    def _population(self, row):
        """The neurons that share a null: those of a session, with all its rows. Rows of another width are other neurons."""
        return int(self.dataset.session[row]), self.dataset.width(row) - 1

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
        population = self._population(origin[0])
        neuron = (positions + 1) % (population[1] + 1) - 1  # the label at p is token p + 1, and token 0 a separator
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
        self.sums[self.source_of[population]] += (
            *(len(labels), nll.sum() + leak.sum() + nll_bos, len(labels) - len(counts), nll_bos),
            *(len(counts), nll.sum(), leak.sum(), rate, 1),
        )
        self._add_histogram(population, neuron, counts)
        if self.window_nll is not None:
            self.window_nll.append((tuple(origin), float(nll.sum()), len(counts)))

    def _add_histogram(self, population, neuron, counts):
        known, n = self.histograms.get(population), population[1]
        width = max(int(counts.max()) + 1, 0 if known is None else known.shape[1])
        histogram = np.bincount(neuron * width + counts, minlength=n * width).reshape(n, width).astype(np.float64)
        if known is not None:
            histogram[:, : known.shape[1]] += known
        self.histograms[population] = histogram

    def result(self, sum_array=lambda array: array) -> dict:
        """The scores over all sources, and where there are several also "macro" (their mean) and "sources" (each).

        `sum_array` adds a float64 array over ranks, and every rank must call this. A score of nothing (no spike, say) is None.
        """
        largest = np.zeros((len(self.populations), NUM_COUNTS))
        for number, population in enumerate(self.populations):
            if population in self.histograms:
                largest[number, self.histograms[population].shape[1] - 1] = 1
        largest = sum_array(largest)
        widths = [int(seen[-1]) + 1 if len(seen := np.flatnonzero(row)) else 0 for row in largest]
        parts = [self.sums]
        for population, width in zip(self.populations, widths, strict=True):
            histogram = np.zeros((population[1], width))
            known = self.histograms.get(population, histogram[:, :0])
            histogram[:, : known.shape[1]] = known
            parts.append(histogram)
        summed = np.split(sum_array(np.concatenate([part.ravel() for part in parts])), np.cumsum([part.size for part in parts]))
        sums = summed[0].reshape(self.sums.shape)
        nulls = np.zeros((len(self.sources), 4))
        for population, part, flat in zip(self.populations, parts[1:], summed[1:], strict=False):
            nulls[self.source_of[population]] += null_sums(flat.reshape(part.shape))
        scores = finish(sums.sum(0), nulls.sum(0))
        if len(self.sources) > 1:
            each = {source: finish(sums[i], nulls[i]) for i, source in enumerate(self.sources)}
            scores |= {"macro": mean_over_sources(list(each.values())), "sources": each}
        return scores


def token_terms(logits, places, labels) -> dict[str, np.ndarray]:
    """Of the logits (tokens, vocabulary) at `places`, float64 on the CPU: `nll` = -ln q(label), `leak` = -ln(1 - p(separator)),
    `nll_bos` = -ln p(separator), `mean` = sum of k q(k). Computed in fp32 on the logits' device, chunk by chunk."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chunks = []
    for chunk, label in zip(places.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        scores = logits[chunk.to(logits.device)].to(dtype)
        separator = scores[:, SEPARATOR].clone()
        scores[:, SEPARATOR] = -torch.inf
        others = scores.logsumexp(1)
        counts = torch.arange(NUM_COUNTS, device=scores.device, dtype=dtype)
        mean = (scores[:, :NUM_COUNTS] - others[:, None]).exp() @ counts
        nll = others - scores.gather(1, label.to(scores.device)[:, None]).squeeze(1)
        # ln(1 + exp(difference)), because 1 - p would lose what is left of a leak of 1e-8
        leak, nll_bos = softplus(separator - others, threshold=50), softplus(others - separator, threshold=50)
        chunks.append(torch.stack([nll, leak, nll_bos, mean.clamp(min=torch.finfo(dtype).tiny)]).double().cpu())
    table = torch.cat(chunks, dim=1).numpy() if chunks else np.zeros((4, 0))
    return dict(zip(("nll", "leak", "nll_bos", "mean"), table, strict=True))


def null_sums(histogram) -> np.ndarray:
    """Of (neurons, counts) times: spikes, and nats under each neuron's own Poisson and its own histogram; sum of ln y!."""
    times, k = histogram.sum(1), np.arange(histogram.shape[1])
    spikes = histogram @ k
    ln_factorials = (histogram @ LN_FACTORIAL[: len(k)]).sum()
    mean = spikes / np.maximum(times, 1)
    poisson = (spikes - spikes * np.log(np.where(spikes > 0, mean, 1))).sum() + ln_factorials
    share = histogram / np.maximum(times, 1)[:, None]
    return np.array([spikes.sum(), poisson, -(histogram * np.log(np.where(share > 0, share, 1))).sum(), ln_factorials])


def finish(sums, nulls) -> dict:
    """Scores of the sums over one or more sources, then the totals they stand on."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    spikes, poisson, histogram, ln_factorials = nulls.tolist()
    ratios = {
        "nll": (total["nll"], total["counts"]),
        "nll_all": (total["nll_all"], total["tokens"]),
        "nll_bos": (total["nll_bos"], total["separators"]),
        "leak": (total["leak"], total["counts"]),
        "bits_per_count": (total["nll"] / log(2), total["counts"]),
        "bits_per_spike": (poisson - total["nll"], spikes * log(2)),
        "bits_per_spike_hist": (histogram - total["nll"], spikes * log(2)),
        "bits_per_spike_rate": (poisson - total["rate"] - ln_factorials, spikes * log(2)),
        "null_nll": (poisson, total["counts"]),
        "hist_nll": (histogram, total["counts"]),
    }
    totals = {"spikes": int(spikes)} | {name: int(total[name]) for name in ("counts", "tokens", "windows")}
    return {name: value / number if number else None for name, (value, number) in ratios.items()} | totals


def mean_over_sources(each: list[dict]) -> dict:
    """The plain mean of each score over the sources that have it; totals have no mean."""
    means = {}
    for name in (name for name in each[0] if name not in ("spikes", "counts", "tokens", "windows")):
        values = [scores[name] for scores in each if scores[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
