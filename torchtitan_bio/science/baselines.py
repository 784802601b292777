"""What simple models reach on held-out counts: the ladder that a trained model has to climb.

python -m torchtitan_bio.science.baselines --data SOURCE      on a data set alone

Each is fitted to the training counts of a session (one source, subject and session), and says what the held-out counts of the
same session cost. What they cost becomes scores where a model's logits do, in science/scores.py. Every held-out count is scored
once, and nothing precedes a recording's first bin. Nothing is carried over to other neurons, so a session without training
data, or with some of its neurons alone, is left out. ladder.py keeps and shows what is fitted here.
"""

import sys
import time
from dataclasses import dataclass
from itertools import groupby
from math import log

import numpy as np
import torch

from torchtitan_bio import command_line
from torchtitan_bio.science.scores import LN_FACTORIAL, NUM_COUNTS, SEPARATOR, CellSums, SpikeScores
from torchtitan_bio.science.units import Units, by_session

# Why a held-out recording is left out
NOT_SEEN = "no training data of their session"
OTHER_WIDTH = "another number of neurons than their session has in training (data.num_neurons)"

NUM_LAGS = 3  # bins of history
MAX_TRAIN_COUNTS = 2**23  # of a session; the fits hold some 40 bytes a count
BLOCK_COUNTS = 2**21  # that the n-grams sort at once
RIDGE = 1.0  # a prior of standard deviation 1 on each weight of a GLM; 1 to 50 change the embedded recording's score by 0.0003
NULL = "Poisson null (oracle)"


@dataclass(frozen=True)
class Scored:
    """What held-out counts cost under each baseline, in the recordings that it could be fitted for."""

    held_out: object
    nats: dict[str, dict[int, np.ndarray]]
    """Of each baseline and row, what the counts of each bin cost, the neurons together."""

    def on(self, units: Units, stretches: list | None = None) -> dict[str, CellSums]:
        """What scores are made of, of each baseline and of the Poisson null; nothing where there is no baseline.

        stretches: (origin, first bin, end bin) of what is scored, row after row, as a model's windows do; those of other
        recordings are passed over. None: whole recordings.
        """
        found = {}
        for name, of_row in self.nats.items():
            whole = [((row, 0), 0, len(nats)) for row, nats in of_row.items()]
            scores = SpikeScores(self.held_out, units)  # one at a time: their histograms take most of the memory
            for row, of_recording in groupby(whole if stretches is None else stretches, key=lambda each: each[0][0]):
                if row in of_row:
                    self._add(scores, row, of_recording, of_row[row])
            found[name] = scores.summed()
        return {NULL: next(iter(found.values())).of_null(), **found} if found else {}

    def _add(self, scores, row, stretches, nats):
        counts = self.held_out.counts(row)
        for origin, first, end in stretches:
            neuron = np.repeat(np.arange(len(counts)), end - first)
            scores.add_counts(origin, neuron, counts[:, first:end].ravel(), nll=nats[first:end].sum())


def ladder(train, test, say=print) -> list[tuple[str, float]]:
    """(name, held-out bits/spike) of each baseline and of the null, pooled over the sessions that both datasets hold.

    None of those, or no spike in them: an empty list.
    """
    found = score(train, test, say).on(by_session(test))
    values = [(name, cells.scores(with_errors=False)["bits_per_spike"]) for name, cells in found.items()]
    return [(name, value) for name, value in values if value is not None]


def score(train, test, say=print) -> Scored:
    """Fit every baseline and see what held-out counts cost under it. `say` gets a line every ten seconds of a long fit."""
    sessions, _ = match(train, test)
    tokens = TokenTrigram() if sessions else None
    for train_rows, _ in sessions:
        tokens.add(gather(train, train_rows, MAX_TRAIN_COUNTS))
    scored = Scored(test, {})
    for number, (train_rows, test_rows) in enumerate(sessions):
        tell = every_ten_seconds(say, f"baselines: session {number + 1} of {len(sessions)}, {{}}")
        seen, held_out = gather(train, train_rows, MAX_TRAIN_COUNTS), gather(test, test_rows)
        ends = np.cumsum([int(test.index.t[row]) for row in test_rows])[:-1]
        histogram, *_, ngram = own_history(seen, held_out, tell)
        nats = {
            "pooled token 3-gram (the predecessor's)": tokens.nats(held_out),
            "per-neuron histogram": histogram,
            "Poisson GLM (past)": poisson_glm(seen, held_out, tell, same_bin=False),
            "Poisson GLM (past + same bin)": poisson_glm(seen, held_out, tell, same_bin=True),
            "own-history n-gram": ngram,
        }
        for name, values in nats.items():
            scored.nats.setdefault(name, {}).update(zip(test_rows, np.split(values, ends), strict=True))
    return scored


def every_ten_seconds(say, form):
    """tell(line) that passes on to `say` only what comes ten seconds after the last."""
    last = time.monotonic()

    def tell(line):
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            say(form.format(line))

    return tell


@dataclass(frozen=True)
class Session:
    """Recordings of the same neurons end to end, each after NUM_LAGS bins of silence, which stand for its missing past."""

    counts: np.ndarray  # (neurons, bins), uint8
    inside: np.ndarray  # (bins,), false in that silence


def match(train, test) -> tuple[list[tuple[list[int], list[int]]], dict[str, list[str]]]:
    """(train rows, test rows) of each session that both hold with as many neurons, and by reason the names of the others'
    held-out recordings. Test rows too wide for a window are in neither, as no model is scored on them."""
    seen, sessions, left_out = _rows_by_session(train), [], {}
    names_seen = {name for name, _ in seen}
    for (name, width), rows in _rows_by_session(test).items():
        if (name, width) in seen:
            sessions.append((seen[name, width], rows))
        else:
            left_out.setdefault(OTHER_WIDTH if name in names_seen else NOT_SEEN, []).extend(test.index.id[row] for row in rows)
    return sessions, left_out


def _rows_by_session(dataset):
    """Rows by (session, width). A recording that names neither subject nor session is a session of its own, as for a score's
    null."""
    index, groups, not_scored = dataset.index, {}, {name for name, _ in dataset.not_scored}
    for row, name in enumerate(index.id):
        if name not in not_scored:
            subject, session = index.subject_id[row], index.session_id[row]
            named = (subject, session) if subject or session else (name,)
            groups.setdefault(((index.source_dataset[row], *named), dataset.width(row)), []).append(row)
    return groups


def gather(dataset, rows, max_counts=None) -> Session:
    """Rows of one session; of more than `max_counts` counts only the last that fit (at least one row)."""
    parts, inside, num_counts = [], [], 0
    for row in reversed(rows):
        counts = dataset.counts(row)
        num_counts += counts.size
        if parts and max_counts and num_counts > max_counts:
            break
        parts += [counts, np.zeros((len(counts), NUM_LAGS), np.uint8)]
        inside += [np.ones(counts.shape[1], bool), np.zeros(NUM_LAGS, bool)]
    return Session(np.concatenate(parts[::-1], axis=1), np.concatenate(inside[::-1]))


def ln_factorials(counts) -> np.ndarray:
    """The sum of ln y! over the neurons of each bin. A bin here and below is one inside a recording."""
    return LN_FACTORIAL[counts].sum(axis=0)


def own_history(seen, held_out, tell) -> np.ndarray:
    """Nats of each bin under Witten-Bell n-grams of a neuron's own last 0 .. NUM_LAGS bins, (orders, bins): the first is the
    histogram.

    After c of N times, and D different counts, p(y | history) = (c + D p(y | shorter history)) / (N + D); uniform in the end.
    """
    block = max(1, BLOCK_COUNTS // seen.counts.shape[1])
    nats = np.zeros((NUM_LAGS + 1, int(held_out.inside.sum())))
    for first in range(0, len(seen.counts), block):
        tell(f"n-gram of neuron {first} of {len(seen.counts)}")
        q = None
        for order in range(NUM_LAGS + 1):
            context, count = _histories(seen, first, first + block, order)
            test_context, test_count = _histories(held_out, first, first + block, order)
            q = np.full(len(test_count), 1 / NUM_COUNTS) if q is None else q
            contexts, times = np.unique(context, return_counts=True)
            pairs, pair_times = np.unique(context * NUM_COUNTS + count, return_counts=True)
            distinct = np.bincount(np.searchsorted(contexts, pairs // NUM_COUNTS), minlength=len(contexts))
            place, known = _find(contexts, test_context)
            pair, seen_before = _find(pairs, test_context * NUM_COUNTS + test_count)
            hits = np.where(seen_before, pair_times[pair], 0)
            q = np.where(known, (hits + distinct[place] * q) / (times[place] + distinct[place]), q)
            nats[order] -= np.log(q).reshape(-1, nats.shape[1]).sum(axis=0)
    return nats


def _histories(session, first, end, order):
    """(neuron and its last `order` counts as one number, the count that followed) of each bin of neurons [first, end)."""
    bins = np.flatnonzero(session.inside)
    counts = session.counts[first:end]
    context = np.broadcast_to(np.arange(len(counts), dtype=np.int64)[:, None], (len(counts), len(bins)))
    for lag in range(1, order + 1):
        context = context * NUM_COUNTS + counts[:, bins - lag]
    return context.ravel(), counts[:, bins].ravel().astype(np.int64)


def _find(table, values):
    """Where each value is in the sorted table, and whether it is there."""
    place = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return place, table[place] == values


class TokenTrigram:
    """p(token | the two before), add-one, over the tokens of all neurons and sessions as one stream, without neuron names.

    The predecessor's baseline, kept as it was: what it gives the separator inside a bin is lost.
    """

    def __init__(self):
        self.times = np.zeros(256**3, np.int32)

    def add(self, session):
        self.times += np.bincount(self._trigrams(session), minlength=256**3).astype(np.int32)

    def nats(self, session) -> np.ndarray:
        """Of each bin's counts; its separator is not scored."""
        trigrams = self._trigrams(session).reshape(-1, len(session.counts) + 1)[:, 1:]
        after = self.times.reshape(-1, 256).sum(axis=1)
        return np.log((after[trigrams // 256] + 256) / (self.times[trigrams] + 1)).sum(axis=1)

    def _trigrams(self, session):
        bins = session.counts[:, session.inside].T
        stream = np.insert(bins, 0, SEPARATOR, axis=1).ravel()
        before = np.concatenate([np.full(2, SEPARATOR, np.uint8), stream]).astype(np.int64)
        return (before[:-2] * 256 + before[1:-1]) * 256 + before[2:]


def poisson_glm(seen, held_out, tell, *, same_bin) -> np.ndarray:
    """Nats of each bin under y_i ~ Poisson(exp(b_i + sum over lags and neurons j of w_ij log(1 + y_j))).

    With `same_bin` the sum is also over the neurons j < i of the bin itself: all that a model of the token stream sees.
    """
    lags = range(0 if same_bin else 1, NUM_LAGS + 1)
    past, future = Regressors(seen, lags), Regressors(held_out, lags)
    weights = fit_poisson(past, tell)
    log_rate = future.times(weights).clamp(max=log(NUM_COUNTS - 1))
    nats = (log_rate.exp() - future.counts * log_rate).sum(dim=1)[future.inside[:, 0] > 0].numpy()
    return nats + ln_factorials(held_out.counts[:, held_out.inside])


class Regressors:
    """The design matrix X (bins, lags * neurons + 1) of a session, never formed: each lag is a shifted view of log(1 + y).

    Weights are (lags * neurons + 1, neurons), the last row the bias; `allowed` is 0 where neuron j may not predict neuron i.
    """

    def __init__(self, session, lags):
        values = torch.from_numpy(np.log1p(session.counts.T, dtype=np.float64, order="C"))
        self.views = [values[NUM_LAGS - lag : len(values) - lag] for lag in lags]
        self.counts = torch.from_numpy(session.counts.T[NUM_LAGS:].astype(np.float64, order="C"))
        self.inside = torch.from_numpy(session.inside[NUM_LAGS:, None].astype(np.float64))
        n = values.shape[1]
        self.allowed = torch.ones(len(lags) * n + 1, n, dtype=torch.float64)
        if lags[0] == 0:
            self.allowed[:n].triu_(1)

    def times(self, weights):
        """X @ weights."""
        result = weights[-1].expand_as(self.counts).clone()
        for view, part in zip(self.views, weights[:-1].split(weights.shape[1]), strict=True):
            result.addmm_(view, part)
        return result

    def transposed_times(self, values, power=1):
        """(X ** power).T @ values, for the weights that are allowed."""
        parts = [(view if power == 1 else view**power).T @ values for view in self.views]
        return torch.cat([*parts, values.sum(0, keepdim=True)]) * self.allowed


def fit_poisson(x, tell, tolerance=1e-3):
    """Ridge-penalised weights by Newton's method, for all neurons at once, each with its own step length.

    The penalty draws the bias to the mean rate, so that a neuron silent in training keeps a finite one. Ends when the next step
    would gain no neuron more than `tolerance` nats.
    """
    prior = torch.zeros_like(x.allowed)
    prior[-1] = torch.log((x.counts.sum(0) + 0.5) / (x.inside.sum() + 1))

    def loss(weights):
        log_rate = x.times(weights)
        rate = log_rate.exp() * x.inside
        return (rate - x.counts * log_rate).sum(0) + RIDGE / 2 * (weights - prior).square().sum(0), rate

    weights = prior
    value, rate = loss(weights)
    for iteration in range(50):
        gradient = x.transposed_times(rate - x.counts) + RIDGE * (weights - prior)
        step = conjugate_gradients(x, rate, gradient)
        gain = (gradient * step).sum(0)
        tell(f"GLM iteration {iteration}, {gain.max():.3g} nats to gain")
        if gain.max() < tolerance:
            break
        length = torch.ones_like(value)
        while True:
            next_value, next_rate = loss(weights - length * step)
            worse = ~(next_value <= value - 1e-4 * length * gain + 1e-9 * value.abs())
            if not worse.any():
                break
            length[worse] /= 2
        weights, value, rate = weights - length * step, next_value, next_rate
    return weights


def conjugate_gradients(x, rate, gradient, max_iterations=30):
    """The Newton step H^-1 gradient of each neuron (H = X.T diag(rate) X + ridge) to a tenth of the gradient."""
    diagonal = x.transposed_times(rate, power=2) + RIDGE
    step, residual = torch.zeros_like(gradient), gradient.clone()
    scaled = residual / diagonal
    direction, size = scaled, (residual * scaled).sum(0)
    enough, tiny = 0.01 * size, torch.finfo(size.dtype).tiny
    for _ in range(max_iterations):
        curved = x.transposed_times(rate * x.times(direction)) + RIDGE * direction
        length = size / (direction * curved).sum(0).clamp(min=tiny)
        step = step + length * direction
        residual = residual - length * curved
        scaled = residual / diagonal
        previous, size = size, (residual * scaled).sum(0)
        if (size <= enough).all():
            break
        direction = scaled + size / previous.clamp(min=tiny) * direction
    return step


def main():
    parser = command_line.Parser(description="Held-out bits/spike of the baselines on one data set.")
    parser.add_argument("--data", required=True, help="as data.source in a config")
    parser.add_argument("--split", default="test", help="the held-out split (default: test)")
    parser.add_argument("--split-by", default="given", help="as data.split_by in a config (default: given)")
    parser.add_argument(
        "--max-malformed-rows", type=int, default=0, help="of a split, as data.max_malformed_rows in a config (default: 0)"
    )
    options = parser.parse_args()
    if options.max_malformed_rows < 0:
        parser.error(f"--max-malformed-rows={options.max_malformed_rows} must be 0 or more")

    from torchtitan_bio import exits
    from torchtitan_bio.data import spikes
    from torchtitan_bio.science.ladder import fit, table, unmatched

    with exits.blaming_the_input():
        train, held_out = (
            spikes.build(
                source=options.data,
                split=split,
                split_by=options.split_by,
                max_malformed_rows=options.max_malformed_rows,
                seq_len=1,  # any: recordings are read whole here, and a stream's windows cut even the widest
            )
            for split in ("train", options.split)
        )
    for path, reason in held_out.skipped:
        print(f"{path} is not read: {reason}")
    for name, reason in dict.fromkeys([*train.malformed, *held_out.malformed]):  # split_by pools what both are made of
        print(f"{name} is malformed and left out: {reason}")
    found = fit(train, held_out, print)
    print(*(table(found) if found.rungs else []), *unmatched(found), sep="\n")
    if not found.rungs:
        print("no baseline: no held-out recording with a spike is of a session that has training data")


if __name__ == "__main__":
    from torchtitan_bio import exits

    sys.exit(exits.run(main, "this command"))
