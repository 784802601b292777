"""How far ahead a model knows the future: bits/spike of the rates that it expects 1, 2, .. bins after what it has seen.

From some bins of held-out context a model goes on by itself, in many rollouts. Its forecast of a count is the mean over
rollouts of what it expects of that count given the rollout's own past: the mean of the sampled counts has the same expectation,
more noise, and zeros that no likelihood forgives. Rates are scored as in the Neural Latents Benchmark, over the Poisson null
that bits_per_spike has. Nothing of the same bin is seen here: unlike bits_per_spike this is a forecast of each neuron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from torchtitan_bio.data import keyed
from torchtitan_bio.data.ring_hmm import RingHMM
from torchtitan_bio.science import baselines, sampling, units
from torchtitan_bio.science.evaluation import in_columns

HORIZON = 25  # bins, where windows hold twice as many
PROMPTS = 64
PLACES = 302  # names the random stream, beside those of data/
TOKENS_AT_ONCE = 2**15  # whose keys and values a process holds for rollouts; a prompt that its rollouts share comes on top
TRAINING_WINDOWS = 1000  # of a session, from which the best use of the recent rate is learnt
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, kw_only=True)
class Places:
    """What is forecast: the bins after the first ones of some windows of an evaluation set."""

    horizon: int
    numbers: list[int]
    """Of the windows."""
    origins: list[tuple[int, int]]
    context: list[int]
    """Bins that are seen, of each."""
    counts: list[np.ndarray]
    """(neurons, context + horizon) of each."""
    left_out: list[str]
    """Recordings whose windows do not hold as much."""
    null: np.ndarray
    """Nats of the oracle null, (places, horizon), as `nats` has them: it knows each neuron's mean over the held-out bins of its
    session."""
    spikes: np.ndarray
    cell: np.ndarray
    """Of each place, the cell of `units` in which it lies."""
    units: units.Units

    def truth(self, place: int) -> np.ndarray:
        return self.counts[place][:, self.context[place] :].astype(np.float64)


def choose(
    dataset, *, prompts: int = PROMPTS, horizon: int | None = None, context: int | None = None, by: str = units.GROUPINGS[0]
) -> Places:
    """So many windows, by hash. Without a context it is half a window, or what the horizon leaves of it."""
    index, windows = dataset.index, dataset.windows
    in_sight = np.minimum(windows.window_bins, index.t)
    is_scored = windows.num_windows > 0
    if horizon is None:
        left = in_sight - (context or in_sight // 2)
        horizon = int(np.clip(np.median(left[is_scored]), 1, HORIZON)) if is_scored.any() else HORIZON
    own_context = np.minimum(in_sight // 2, in_sight - horizon) if context is None else np.full(len(in_sight), context)
    is_long_enough = is_scored & (own_context >= 1) & (own_context + horizon <= in_sight)
    if not is_long_enough.any():
        raise ValueError(
            f"no window holds {context or 1:,} + {horizon:,} bins, seen and forecast: the longest has "
            f"{int(in_sight.max(initial=0)):,}; ask for less, or for longer windows by --training.seq_len"
        )
    numbers, order = [], keyed.Permutation(len(dataset), 0, PLACES)
    for turn in range(len(dataset)):
        row, begin = dataset.origin(order[turn])
        if is_long_enough[row] and begin + own_context[row] + horizon <= index.t[row]:
            numbers.append(order[turn])
            if len(numbers) == prompts:
                break
    numbers.sort()
    origins = [dataset.origin(number) for number in numbers]
    lengths = [int(own_context[row]) for row, _ in origins]
    counts = [
        dataset.sample(number).tokens[: (length + horizon) * dataset.width(row)].reshape(length + horizon, -1)[:, 1:].T
        for number, length, (row, _) in zip(numbers, lengths, origins, strict=True)
    ]
    means = _session_means(dataset, [row for row, _ in origins])
    truth = [each[:, length:].astype(np.float64) for each, length in zip(counts, lengths, strict=True)]
    cells = units.by_recording(dataset, by)
    return Places(
        horizon=horizon,
        numbers=numbers,
        origins=origins,
        context=lengths,
        counts=counts,
        left_out=[index.id[row] for row in np.flatnonzero(is_scored & ~is_long_enough)],
        null=np.array([nats(mean[:, None], each) for mean, each in zip(means, truth, strict=True)]),
        spikes=np.array([each.sum(0) for each in truth]),
        cell=np.array([cells.cell(origin) for origin in origins]),
        units=cells,
    )


def _session_means(dataset, rows) -> list[np.ndarray]:
    """For each row, the mean count of its neurons in all held-out bins of their session."""
    populations, means = units.populations_of(dataset), {}
    for row in rows:
        if (key := tuple(populations[row].tolist())) not in means:
            counts = [dataset.counts(other) for other in np.flatnonzero((populations == key).all(1)).tolist()]
            means[key] = sum(each.sum(1) for each in counts) / sum(each.shape[1] for each in counts)
    return [means[tuple(populations[row].tolist())] for row in rows]


def predict(
    sampler: sampling.Sampler,
    places: Places,
    *,
    rollouts: int,
    world,
    prompts_at_once: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[np.ndarray]:
    """The model's rates (neurons, horizon) at each place. All ranks call this, share the work and get the same.

    A rollout's chance is a function of its window and its own number: more rollouts go on from fewer.
    """
    rates = [np.zeros((len(counts), places.horizon)) for counts in places.counts]
    done = 0
    for group, at_once in _batches(places, rollouts, prompts_at_once):
        batches = [group[first : first + at_once] for first in range(0, len(group), at_once)]
        for first in range(0, len(batches), world.size):
            # A rank that has none left repeats the last one: sharded blocks are gathered by all ranks together.
            batch = batches[min(first + world.rank, len(batches) - 1)]
            found = _expect(sampler, places, batch, rollouts)
            if first + world.rank < len(batches):
                for place, its_rates in zip(batch, found, strict=True):
                    rates[place] = its_rates
            done += sum(map(len, batches[first : first + world.size]))
            tell(f"{done:,} of {len(rates):,}")
    flat = np.split(world.sum_array(np.concatenate([each.ravel() for each in rates])), np.cumsum([each.size for each in rates]))
    return [np.maximum(each.reshape(like.shape), TINY) for each, like in zip(flat, rates, strict=False)]


def _batches(places: Places, rollouts: int, prompts_at_once: int | None):
    """(places that a model goes through in equally many steps, how many of them a process may take at once)."""
    groups = {}
    for place, counts in enumerate(places.counts):
        groups.setdefault(counts.shape, []).append(place)
    for (n, bins), group in groups.items():
        fit = max(1, TOKENS_AT_ONCE // (rollouts * bins * (n + 1)))
        yield group, min(fit, prompts_at_once or fit)


def _expect(sampler: sampling.Sampler, places: Places, batch: list[int], rollouts: int) -> np.ndarray:
    """Rates (batch, neurons, horizon)."""
    n, total = len(places.counts[batch[0]]), 0.0
    contexts = np.stack([places.counts[place][:, : places.context[place]] for place in batch])
    prompt = sampler.read(sampling.encode(contexts), n)
    at_once = rollouts if len(batch) > 1 else max(1, TOKENS_AT_ONCE // (places.horizon * (n + 1)))
    for first in range(0, rollouts, at_once):
        numbers = range(first, min(first + at_once, rollouts))
        keys = [places.numbers[place] << 32 | number for place in batch for number in numbers]
        means = sampler.expected(prompt.repeated(len(numbers)), bins=places.horizon, rollouts=keys)
        total = total + means.reshape(len(batch), len(numbers), n, -1).sum(1)
    return total / rollouts


# ---- Rates that need no model


def exact(dataset, places: Places) -> list[np.ndarray] | None:
    """The best possible rates, of ring-HMM data: the state as the context tells it, carried on by the walk."""
    store, result = dataset.store, []
    if not isinstance(store, RingHMM):
        return None
    for place, (row, _) in enumerate(places.origins):
        emission = store.distribution(store.rates(int(dataset.index.offset[row]), int(dataset.index.n[row])))
        belief = np.full(store.K, 1 / store.K)
        for counts in places.counts[place][:, : places.context[place]].T:
            ln_likelihood = np.log(emission[:, np.arange(len(counts)), counts]).sum(1)
            belief = _walk(belief, store.p) * np.exp(ln_likelihood - ln_likelihood.max())
            belief /= belief.sum()
        means, rates = emission @ np.arange(emission.shape[2]), []
        for _ in range(places.horizon):
            belief = _walk(belief, store.p)
            rates.append(belief @ means)
        result.append(np.stack(rates, axis=1))
    return result


def _walk(belief, p):
    return (1 - 2 * p) * belief + p * (np.roll(belief, 1) + np.roll(belief, -1))


def simple(training, dataset, places: Places) -> dict[str, dict[int, np.ndarray]]:
    """{baseline: {place: rates (neurons, horizon)}}, fitted to training data of the same session; where there is none, none.

    "mean rate": each neuron's. "recent rate": between that and the neuron's rate in the last bins of the context. How many
    bins, and how much they weigh, is what would have been best in the training data, for each bin of the horizon.
    """
    found = {"mean rate": {}, "recent rate": {}}
    for train_rows, test_rows in baselines.match(training, dataset)[0]:
        members = [place for place, (row, _) in enumerate(places.origins) if row in set(test_rows)]
        if not members:
            continue
        seen = baselines.gather(training, train_rows, baselines.MAX_TRAIN_COUNTS)
        # Half a spike more, because a neuron that was silent in training may spike yet
        mean = (seen.counts[:, seen.inside].sum(1) + 0.5) / seen.inside.sum()
        settings = {
            length: _learn_recent(seen, mean, length, places.horizon) for length in {places.context[p] for p in members}
        }
        for place in members:
            length = places.context[place]
            context = places.counts[place][None, :, :length]
            found["mean rate"][place] = np.repeat(mean[:, None], places.horizon, axis=1)
            rates = [_recent(context, mean, *setting)[0] for setting in settings[length]]
            found["recent rate"][place] = np.stack(rates, axis=1)
    return found


def _recent(contexts, mean, bins, weight):
    """Rates (windows, neurons): of the last bins, and of the mean as if it had been seen for `weight` bins."""
    return (contexts[:, :, contexts.shape[2] - bins :].sum(2) + weight * mean) / (bins + weight)


def _learn_recent(seen: baselines.Session, mean, context: int, horizon: int) -> list[tuple[int, float]]:
    """(bins, weight) for each bin of the horizon: the mean alone where no training window is as long."""
    length = context + horizon
    outside = np.append(0, np.cumsum(~seen.inside))
    starts = np.flatnonzero(outside[length:] == outside[:-length]) if len(outside) > length else np.empty(0, int)
    starts = starts[:: max(1, -(-len(starts) // TRAINING_WINDOWS))]
    choices = [(0, 1.0), *((bins, weight) for bins in _powers_of_two(context) for weight in _powers_of_two(1024))]
    if not len(starts):
        return choices[:1] * horizon
    windows = np.stack([seen.counts[:, start : start + length] for start in starts.tolist()])
    future = windows[:, :, context:].astype(np.float64)
    cost = []
    for setting in choices:
        rates = _recent(windows[:, :, :context], mean, *setting)
        cost.append(rates.sum() - np.tensordot(np.log(rates), future, axes=([0, 1], [0, 1])))
    return [choices[best] for best in np.argmin(cost, axis=0)]


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


# ---- Scores


def nats(rates, counts) -> np.ndarray:
    """Of counts (neurons, bins) under Poisson rates, by bin; ln y! is left out, as it is in all that they are compared with."""
    return (rates - counts * np.log(np.where(counts > 0, rates, 1.0))).sum(0)


def nats_at(places: Places, rates) -> np.ndarray:
    """(places, horizon)."""
    return np.array([nats(each, places.truth(place)) for place, each in enumerate(rates)])


def curve(places: Places, above, chosen=None) -> dict:
    """Bits/spike by horizon and together from nats `above` something, with standard errors; of the places chosen, or of all."""
    chosen = np.arange(len(above)) if chosen is None else chosen
    above, spikes = above[chosen], places.spikes[chosen] * log(2)
    kind, clusters = places.units.clusters(places.cell[chosen])
    together = above.sum(1), spikes.sum(1)
    return {
        "fp_bits_per_spike": [_ratio(a, b) for a, b in zip(above.T, spikes.T, strict=True)],
        "standard_error": [units.standard_error(a, b, clusters) for a, b in zip(above.T, spikes.T, strict=True)],
        "together": {"fp_bits_per_spike": _ratio(*together), "standard_error": units.standard_error(*together, clusters)},
        "errors_over": kind,
        "prompts": len(chosen),
    }


def _ratio(above, below):
    return float(above.sum() / below.sum()) if below.sum() else None


def record(places: Places, model, *, rollouts: int, ideal=None) -> dict:
    """As JSON: fp_bits_per_spike, and how it was measured. model, ideal: nats, by nats_at."""
    context = [min(places.context), max(places.context)]
    asked = {"rollouts": rollouts, "context_bins": context, "horizon": places.horizon}
    result = asked | {"spikes": places.spikes.sum(0).astype(int).tolist(), **curve(places, places.null - model)}
    if len(places.units.groups) > 1:
        group = places.units.group[places.cell]
        result["groups"] = {
            places.units.groups[each]: curve(places, places.null - model, np.flatnonzero(group == each))
            for each in np.unique(group).tolist()
        }
    if ideal is not None:
        result["ideal"] = curve(places, places.null - ideal) | {"model_behind": curve(places, model - ideal)}
    return result


def against(places: Places, model, rates: dict[str, dict[int, np.ndarray]]) -> dict:
    """{baseline: its curve, and by how much the model is ahead at the same places}."""
    result = {}
    for name, by_place in rates.items():
        if chosen := sorted(by_place):
            theirs = np.zeros_like(model)
            theirs[chosen] = [nats(by_place[place], places.truth(place)) for place in chosen]
            result[name] = curve(places, places.null - theirs, chosen)
            result[name]["model_ahead"] = curve(places, theirs - model, chosen)
    return result


def on_the_same(places: Places, model, rates: dict[str, dict[int, np.ndarray]]) -> dict | None:
    """The model's curve at the places that baselines have rates for; None where that is all of them or none."""
    chosen = sorted(set().union(*rates.values()))
    return curve(places, places.null - model, chosen) if 0 < len(chosen) < len(model) else None


def how(found: dict) -> str:
    """The forecast was made, in words."""
    least, most = found["context_bins"]
    bins = f"{least:,} bins" if least == most else f"{least:,} to {most:,} bins"
    return f"{found['rollouts']} rollouts after each of {found['prompts']} contexts of {bins}"


def line(found: dict) -> str:
    """The whole horizon in a line."""
    return f"  forecast of {found['horizon']} bins: {_figure(*found['together'].values())} bits/spike, {how(found)}"


def table(found: dict) -> list[str]:
    """Bits/spike by horizon: the model among what else forecasts, the best one last."""
    shown = sorted({*_powers_of_two(found["horizon"])[::2], found["horizon"]})
    same, ideal = found.get("on_the_same_recordings"), found.get("ideal")
    names = {**found.get("baselines", {}), "this model": found}
    names |= ({"this model, on the same recordings": same} if same else {}) | ({"best possible": ideal} if ideal else {})
    rows = [("", [*(f"{bin} ahead" for bin in shown), "all", "model ahead by"])]
    for name, each in sorted(names.items(), key=lambda named: named[1]["together"]["fp_bits_per_spike"] or 0):
        pairs = list(zip(each["fp_bits_per_spike"], each["standard_error"], strict=True))
        cells = [*(_figure(*pairs[bin - 1]) for bin in shown), _figure(*each["together"].values())]
        ahead = [_figure(*each["model_ahead"]["together"].values())] if "model_ahead" in each else []
        rows.append((f"  {name}", [*cells, *ahead]))
    lines = ["", f"forecast: bits/spike of rates, {how(found)}", *in_columns(rows, max(20, *(len(name) for name, _ in rows)))]
    if same:
        lines.append(f"  baselines, and what the model is ahead by, are of the {same['prompts']} contexts with training data")
    if ideal:
        behind = ideal["model_behind"]["together"]
        lines.append(f"  the model is {_figure(*behind.values())} bits/spike behind the best possible forecast")
    return lines


def _figure(value, error) -> str:
    return "-" if value is None else f"{value:.3f}" + (f" +- {error:.3f}" if error is not None else "")
