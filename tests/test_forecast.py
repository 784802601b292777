"""Forecasts by rollouts: the formula by hand, the best possible forecast by a sum over paths, and between them a model."""

import dataclasses
from itertools import product
from math import lgamma, log

import numpy as np
import pytest
import torch
from small_llama import SMALL, lively

import evaluate
from torchtitan_bio.data import loader, spikes
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.science import forecast, sampling

SPIKES = dataclasses.replace(SMALL, vocab_size=256)
CPU = torch.device("cpu")
RING = "ring-hmm:n=3,K=8,p=0.1,bins=16,test_rows=150"
WIDTH = 4


class Alone:
    """A world of one."""

    rank, size = 0, 1
    sum_array = staticmethod(np.array)


def held_out(source, seq_len, **settings):
    return spikes.build(source=str(source), split="test", mode="aligned", overlap=True, seq_len=seq_len, **settings)


def sampler_for(model):
    kernel = sampling.choose_kernel(CPU, torch.float32, SPIKES.head_dim)
    return sampling.Sampler(model=model, kernel=kernel, dtype=torch.float32, device=CPU)


def scored(model, places, rollouts, **settings):
    rates = forecast.predict(sampler_for(model), places, rollouts=rollouts, world=Alone, **settings)
    return forecast.nats_at(places, rates)


def one_hot(rows, width=256):
    """Logits (B, S, 256) that have probabilities (B, S, counts) and want no separator."""
    logits = torch.full((*rows.shape[:2], width), -1e9, dtype=torch.float64)
    logits[:, :, : rows.shape[2]] = rows.log()
    return logits


class ConstantRates:
    """Each neuron is Poisson, whatever was before."""

    architecture = SPIKES

    def __init__(self, rates):
        counts = torch.arange(60, dtype=torch.float64)
        rates = torch.tensor(rates, dtype=torch.float64)[:, None]
        self.shares = (counts * rates.log() - rates - torch.lgamma(counts + 1)).exp()

    def logits(self, inputs):
        neuron = (inputs["positions"] % (len(self.shares) + 1)).clamp(max=len(self.shares) - 1)
        return one_hot(self.shares[neuron].expand(len(inputs["tokens"]), -1, -1))


class IdealObserver:
    """Knows the population and filters; of rollouts that share a prompt each goes on from its belief."""

    architecture = SPIKES

    def __init__(self, store):
        self.emission, self.p = torch.from_numpy(store.distribution(store.rates(0))), store.p  # (K, n, levels)

    def logits(self, inputs):
        tokens, positions = inputs["tokens"].long(), inputs["positions"].tolist()
        states, n, _ = self.emission.shape
        if positions[0] == 0:
            self.belief = torch.full((len(tokens), states), 1 / states, dtype=torch.float64)
        self.belief = self.belief.repeat_interleave(len(tokens) // len(self.belief), dim=0)
        rows = []
        for position, seen in zip(positions, tokens.T, strict=True):
            place = position % (n + 1)
            if place == 0:
                around = self.belief.roll(1, 1) + self.belief.roll(-1, 1)
                self.belief = (1 - 2 * self.p) * self.belief + self.p * around
            else:
                self.belief = self.belief * self.emission[:, place - 1].T[seen]
                self.belief = self.belief / self.belief.sum(1, keepdim=True)
            rows.append(self.belief @ self.emission[:, min(place, n - 1)])
        return one_hot(torch.stack(rows, dim=1))


def write_session(folder, split, names, rates, bins, seed):
    random = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True, exist_ok=True)
    for name in names:
        counts = random.poisson(np.array(rates)[:, None], (len(rates), bins)).astype(np.uint8)
        np.savez(folder / split / f"{name}.npz", spike_counts=counts, source_dataset="a", subject_id="s", session_id="one")


# ---- The formula


def test_constant_rates_score_the_formula_by_hand_and_those_of_the_session_score_nothing(tmp_path):
    write_session(tmp_path, "test", ("one", "two"), (0.3, 1.1, 0.02), 90, seed=0)
    dataset, rates = held_out(tmp_path, 20 * WIDTH), (0.5, 0.7, 0.1)
    places = forecast.choose(dataset, prompts=7, horizon=3, context=12)
    assert len(places.numbers) == 7 and {each.shape for each in places.counts} == {(3, 15)}
    found = forecast.record(places, scored(ConstantRates(rates), places, rollouts=2), rollouts=2)
    recordings = [dataset.counts(row).astype(float) for row in (0, 1)]
    mean = np.concatenate(recordings, axis=1).mean(1)
    for ahead in range(3):
        null = model = num_spikes = 0.0
        for row, begin in places.origins:
            for neuron in range(3):
                y = recordings[row][neuron, begin + 12 + ahead]
                null += mean[neuron] - y * log(mean[neuron]) + lgamma(y + 1)
                model += rates[neuron] - y * log(rates[neuron]) + lgamma(y + 1)
                num_spikes += y
        assert found["fp_bits_per_spike"][ahead] == pytest.approx((null - model) / (num_spikes * log(2)), rel=1e-9)
        assert found["spikes"][ahead] == num_spikes
    own = forecast.record(places, scored(ConstantRates(mean), places, rollouts=2), rollouts=2)
    assert np.abs(own["fp_bits_per_spike"]).max() < 1e-9


def test_a_silent_neuron_costs_what_the_forecast_gives_it_and_no_spike_at_all_gives_no_score(tmp_path):
    write_session(tmp_path, "test", ("one",), (0.0, 0.0), 40, seed=0)
    places = forecast.choose(held_out(tmp_path, 30), prompts=3, horizon=2)
    nats = scored(ConstantRates((0.25, 0.5)), places, rollouts=1)
    assert nats == pytest.approx(0.75) and (places.null == 0).all()
    found = forecast.record(places, nats, rollouts=1)
    assert found["fp_bits_per_spike"] == [None, None] and "-" in forecast.table(found)[-1]


# ---- The best possible forecast


def test_the_exact_forecast_is_that_of_a_sum_over_all_paths():
    dataset = held_out("ring-hmm:n=2,K=4,p=0.17,bins=6,test_rows=3", 6 * 3)
    places = forecast.choose(dataset, prompts=3, horizon=2, context=3)
    store = dataset.store
    emission = store.distribution(store.rates(0))
    step = (1 - 2 * store.p) * np.eye(4) + store.p * (np.roll(np.eye(4), 1, 0) + np.roll(np.eye(4), -1, 0))
    for place, rates in enumerate(forecast.exact(dataset, places)):
        total, weights = np.zeros((2, 2)), 0.0
        for path in product(range(4), repeat=5):
            weight = 1 / 4 * np.prod([step[a, b] for a, b in zip(path, path[1:], strict=False)])
            for bin, z in enumerate(path[:3]):
                weight *= np.prod([emission[z, neuron, places.counts[place][neuron, bin]] for neuron in range(2)])
            weights += weight
            total += weight * np.stack([emission[z] @ np.arange(8) for z in path[3:]], axis=1)
        assert rates == pytest.approx(total / weights, rel=1e-10)


@pytest.fixture(scope="module")
def ring():
    """Places in ring-HMM data, and the nats of the best possible forecast."""
    dataset = held_out(RING, 16 * WIDTH)
    places = forecast.choose(dataset, prompts=150, horizon=6)
    return dataset, places, forecast.nats_at(places, forecast.exact(dataset, places))


def behind(places, nats, best):
    found = forecast.record(places, nats, rollouts=1, ideal=best)["ideal"]["model_behind"]["together"]
    return found["fp_bits_per_spike"], found["standard_error"]


def test_more_rollouts_of_the_ideal_observer_come_nearer_to_the_exact_forecast_and_never_above_it(ring):
    dataset, places, best = ring
    gaps = [behind(places, scored(IdealObserver(dataset.store), places, number), best) for number in (2, 8, 128)]
    for gap, error in gaps:
        assert gap > -3 * error
    few, more, many = (gap for gap, _ in gaps)
    assert few > more > many and many < 0.01 and few < 0.5
    # One bin ahead of the first neuron nothing is left to chance.
    rates = forecast.predict(sampler_for(IdealObserver(dataset.store)), places, rollouts=1, world=Alone)
    exact = forecast.exact(dataset, places)
    assert [each[0, 0] for each in rates] == pytest.approx([each[0, 0] for each in exact], rel=1e-12)


@pytest.mark.slow
def test_a_trained_model_forecasts_better_than_before_and_not_better_than_the_best(ring):
    dataset, places, best = ring
    model, train = Model(SPIKES), spikes.build(source=RING, mode="aligned", seq_len=16 * WIDTH)
    model.init_weights(0, lambda parameter: (parameter, 0))
    before, _ = behind(places, scored(model, places, 4), best)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = loader.read(train, range(8 * step, 8 * (step + 1)))
        (model(batch.inputs)["next_token"] / batch.counts["next_token"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    nats = scored(model, places, rollouts=8)
    gap, error = behind(places, nats, best)
    assert 2 * error < gap < before / 2
    ladder = forecast.against(places, nats, forecast.simple(train, dataset, places))
    assert ladder.keys() == {"mean rate", "recent rate"}
    for each in ladder.values():
        lead, own = each["model_ahead"]["together"], forecast.curve(places, places.null - nats)["together"]
        difference = own["fp_bits_per_spike"] - each["together"]["fp_bits_per_spike"]
        assert lead["fp_bits_per_spike"] == pytest.approx(difference, rel=1e-9)
        assert best.sum() < places.null.sum() - each["together"]["fp_bits_per_spike"] * places.spikes.sum() * log(2)


# ---- How it is computed


def test_forecasts_are_the_same_in_any_batch_and_more_rollouts_go_on_from_fewer(tmp_path, monkeypatch):
    write_session(tmp_path, "test", ("one", "two"), (0.3, 1.1, 0.5), 90, seed=0)
    np.savez(tmp_path / "test" / "wide.npz", spike_counts=np.ones((5, 60), np.uint8))
    dataset, model = held_out(tmp_path, 60), lively(Model(SPIKES)).requires_grad_(False)
    places, sampler = forecast.choose(dataset, prompts=9, horizon=3), sampler_for(model)
    assert {len(counts) for counts in places.counts} == {3, 5}

    def predicted(rollouts, **settings):
        return np.concatenate(
            [each.ravel() for each in forecast.predict(sampler, places, rollouts=rollouts, world=Alone, **settings)]
        )

    whole = predicted(6)
    for prompts_at_once in (1, 2):
        assert predicted(6, prompts_at_once=prompts_at_once) == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(forecast, "TOKENS_AT_ONCE", 30)  # two rollouts at a time of one prompt
    assert predicted(6) == pytest.approx(whole, rel=1e-5)
    assert predicted(2) != pytest.approx(whole, rel=1e-3)
    # By the definition: rollouts of one prompt, one by one
    place, numbers = 0, [places.numbers[0] << 32 | number for number in range(6)]
    n, context = len(places.counts[place]), places.counts[place][:, : places.context[place]]
    means = []
    for number in numbers:
        prompt = sampler.read(sampling.encode(context[None]), n)
        drawn = sampler.roll_out(prompt, bins=3, rollouts=[number])[0]
        tokens = sampling.encode(np.concatenate([context, drawn], axis=1)[None])
        logits = model.logits({"tokens": tokens})[0].reshape(-1, n + 1, 256)[-3:, :n, :255]
        means.append((logits.double().softmax(-1) @ torch.arange(255.0, dtype=torch.float64)).T.numpy())
    assert whole[: n * 3] == pytest.approx(np.mean(means, axis=0).ravel(), rel=1e-4)


def test_windows_that_do_not_hold_context_and_horizon_are_left_out_by_name_or_refused(tmp_path):
    write_session(tmp_path, "test", ("long",), (0.3, 1.1, 0.5), 90, seed=0)
    write_session(tmp_path, "test", ("short",), (0.3, 1.1, 0.5), 9, seed=1)
    dataset = held_out(tmp_path, 20 * WIDTH)
    places = forecast.choose(dataset, prompts=1000, horizon=4, context=6)
    assert places.left_out == ["short"] and places.context == [6] * 8  # of nine windows the last is short
    assert {begin % 10 for _, begin in places.origins} == {0}
    assert forecast.choose(dataset, prompts=1).horizon == 7  # the median of 10 and 4
    assert forecast.choose(dataset, prompts=1, context=15).horizon == 1
    with pytest.raises(ValueError, match="no window holds 18 [+] 3 bins, seen and forecast: the longest has 20"):
        forecast.choose(dataset, prompts=1, horizon=3, context=18)
    fewer = forecast.choose(dataset, prompts=3, horizon=4, context=6)
    assert set(fewer.numbers) < set(places.numbers) and len(fewer.numbers) == 3


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluate.read_own_flags(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"half a window, {forecast.HORIZON} at most" in said and f"by hash (default: {forecast.PROMPTS})" in said


# ---- Baselines


def test_the_recent_rate_is_the_best_of_its_kind_in_training_and_beats_the_mean_where_rates_drift(tmp_path):
    random = np.random.default_rng(0)
    for split, seed in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        rate = np.exp(np.repeat(np.random.default_rng(seed).normal(0, 1, (3, 40)), 30, axis=1))
        np.savez(tmp_path / split / "a.npz", spike_counts=random.poisson(rate).astype(np.uint8), session_id="x")
    train = spikes.build(source=str(tmp_path), seq_len=20 * WIDTH)
    dataset = held_out(tmp_path, 20 * WIDTH)
    places = forecast.choose(dataset, prompts=60, horizon=4)
    rates = forecast.simple(train, dataset, places)
    mean = (train.counts(0).sum(1) + 0.5) / 1200
    assert all((each == mean[:, None]).all() for each in rates["mean rate"].values())
    ladder = forecast.against(places, places.null, rates)
    ahead = [ladder[name]["together"]["fp_bits_per_spike"] for name in ("recent rate", "mean rate")]
    assert ahead[0] > ahead[1] + 0.2
    context, counts = places.context[0], train.counts(0).astype(float)
    costs = {}
    for bins, weight in [(0, 1), *product([1, 2, 4, 8], [2**k for k in range(11)])]:
        cost = 0.0
        for start in range(0, 1200 - context - 4 + 1, 2):
            recent = counts[:, start + context - bins : start + context].sum(1)
            rate = (recent + weight * mean) / (bins + weight)
            cost += (rate - counts[:, start + context + 3] * np.log(rate)).sum()
        costs[bins, weight] = cost
    bins, weight = min(costs, key=costs.get)
    seen = places.counts[5][:, context - bins : context].sum(1)
    assert rates["recent rate"][5][:, 3] == pytest.approx((seen + weight * mean) / (bins + weight), rel=1e-12)
