"""The ideal observer is exact, and no honest model scores below it."""

from itertools import product

import numpy as np
import pytest
import torch

from torchtitan_bio.data import loader, spikes
from torchtitan_bio.models.llama3 import Architecture, Model
from torchtitan_bio.science import ring_hmm_floor
from torchtitan_bio.science.scores import SpikeScores


def build(source, seq_len):
    return spikes.build(source=source, split="test", mode="aligned", overlap=True, seq_len=seq_len)


@pytest.fixture(scope="module")
def population():
    """32-bin windows that are whole rows, as in the specification."""
    return build("ring-hmm:n=8,K=16,p=0.1,bins=32,test_rows=400", 32 * 9)


@pytest.fixture(scope="module")
def floor(population):
    return ring_hmm_floor.window_nll(population)


def probabilities(dataset, batch):
    """The ideal observer's (B, S, 256), for windows of whole rows."""
    bins, n = batch.inputs["tokens"].shape[1] // 9, 8
    counts = batch.inputs["tokens"].reshape(-1, bins, n + 1)[:, :, 1:].numpy().astype(int)
    emission = dataset.store.distribution(dataset.store.rates(0))
    table = np.full((len(counts), bins * (n + 1), 256), 1e-300)
    places = np.arange(bins * (n + 1)).reshape(bins, n + 1)
    table[:, places[:, :-1].ravel(), :8] = ring_hmm_floor.predictive(counts, emission, dataset.store.p).reshape(
        len(counts), -1, 8
    )
    table[:, places[:, -1], 255] = 1.0
    return torch.from_numpy(table)


def score(dataset, model):
    scores = SpikeScores(dataset, keep_windows=True)
    for batch in loader.finite(dataset, local_batch_size=100, rank=0, world_size=1):
        scores.add(model(batch).log(), batch)
    return scores


def test_filtering_equals_a_sum_over_all_paths():
    random = np.random.default_rng(0)
    states, neurons, bins, p = 4, 2, 4, 0.17
    emission = random.dirichlet(np.ones(3), (states, neurons))
    counts = random.integers(0, 3, (5, bins, neurons))
    step = np.zeros((states, states))
    for z in range(states):
        step[z, z] += 1 - 2 * p
        step[z, (z + 1) % states] += p
        step[z, (z - 1) % states] += p

    def likelihood(sequence):
        """P(the first len(sequence) counts of a window) over every path of the hidden state."""
        total = 0.0
        for path in product(range(states), repeat=bins):
            weight = 1 / states * np.prod([step[a, b] for a, b in zip(path, path[1:], strict=False)])
            total += weight * np.prod([emission[path[i // neurons], i % neurons, y] for i, y in enumerate(sequence)])
        return total

    found = ring_hmm_floor.predictive(counts, emission, p)
    for window in range(len(counts)):
        sequence = counts[window].ravel().tolist()
        for i in range(len(sequence)):
            before = likelihood(sequence[:i])
            expected = [likelihood([*sequence[:i], y]) / before for y in range(3)]
            np.testing.assert_allclose(found[window, i // neurons, i % neurons], expected, rtol=0, atol=1e-10)


def test_the_ideal_observer_as_a_model_has_no_gap_and_captures_everything(population, floor):
    scores = score(population, lambda batch: probabilities(population, batch))
    found = ring_hmm_floor.gap(scores.window_nll, floor)
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.captured(scores.result()["hist_nll"]) == pytest.approx(1)


def test_the_figures_are_near_those_of_another_population_of_the_same_kind(population, floor):
    scores = score(population, lambda batch: torch.ones(*batch.inputs["labels"].shape, 256).double())
    result, found = scores.result(), ring_hmm_floor.gap(scores.window_nll, floor)
    assert found.floor == pytest.approx(0.50, abs=0.15) and result["hist_nll"] == pytest.approx(0.63, abs=0.15)
    assert found.floor < 0.9 * result["hist_nll"] < 0.9 * result["null_nll"]


@pytest.mark.slow
def test_a_wrong_model_lies_above_and_one_that_sees_its_answers_far_below(population, floor):
    def blurred(batch):
        return 0.9 * probabilities(population, batch) + 0.1 * (torch.arange(256) < 8) / 8

    def peeking(batch):
        answers = torch.nn.functional.one_hot(batch.inputs["labels"].long().clamp(min=0), 256)
        return 0.99 * probabilities(population, batch) + 0.01 * answers

    above = ring_hmm_floor.gap(score(population, blurred).window_nll, floor)
    below = ring_hmm_floor.gap(score(population, peeking).window_nll, floor)
    assert above.gap > 3 * above.standard_error and below.gap < -3 * below.standard_error


def test_the_standard_error_is_that_of_the_mean_where_windows_are_alike():
    random = np.random.default_rng(0)
    difference = random.normal(2.0, 1.0, 1000)
    model = [((row, 0), 100 + nats, 10) for row, nats in enumerate(difference)]
    found = ring_hmm_floor.gap(model[::-1], [((row, 0), 100.0, 10) for row in range(1000)])
    assert found.gap == pytest.approx(difference.mean() / 10, rel=1e-9)
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / 10 / np.sqrt(1000), rel=1e-9)


def test_windows_inside_rows_of_many_populations_are_filtered_from_their_own_start():
    dataset = build("ring-hmm:n=3..6,K=8,p=0.1,bins=20,test_rows=5", 50)
    found = ring_hmm_floor.window_nll(dataset)
    assert sum(number for *_, number in found) == int((dataset.index.n * dataset.index.t).sum())
    for (row, first_bin), nats, number in found:
        n = int(dataset.index.n[row])
        counts = dataset.counts(row).T[None, first_bin : first_bin + 50 // (n + 1)].astype(int)
        emission = dataset.store.distribution(dataset.store.rates(int(dataset.index.offset[row]), n))
        nll = -np.log(np.take_along_axis(ring_hmm_floor.predictive(counts, emission, 0.1), counts[..., None], 3))
        assert nats == pytest.approx(nll[0, -(number // n) :].sum(), rel=1e-12)


def test_comparing_other_windows_is_refused():
    with pytest.raises(ValueError, match="the model's 1 windows are not the ideal observer's 2"):
        ring_hmm_floor.gap([((0, 0), 1.0, 1)], [((0, 0), 1.0, 1), ((1, 0), 1.0, 1)])


def after_40_steps(sees_ahead):
    """The gap of a small model whose attention sees so many tokens ahead."""

    def attend(q, k, v, *, causal=True, cu_seqlens=None):
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(sees_ahead)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    source = "ring-hmm:n=3,K=8,bins=16,rows=1000,test_rows=100"
    train, test = spikes.build(source=source, mode="aligned", seq_len=64), build(source, 64)
    model = Model(Architecture(dim=32, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=64, vocab_size=256), attend)
    model.init_weights(0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        batch = loader.read(train, range(16 * step, 16 * (step + 1)))
        adamw.zero_grad()
        (model(batch.inputs)["next_token"] / batch.counts["next_token"]).backward()
        adamw.step()
    with torch.no_grad():
        scores = score(test, lambda batch: model.logits(batch.inputs).exp())
    return ring_hmm_floor.gap(scores.window_nll, ring_hmm_floor.window_nll(test))


def test_a_model_trained_with_a_mask_off_by_one_is_called_a_leak_and_the_same_model_with_the_right_mask_is_not():
    leaking, honest = after_40_steps(sees_ahead=1), after_40_steps(sees_ahead=0)
    assert leaking.is_leak and leaking.gap < -10 * leaking.standard_error
    assert not honest.is_leak and honest.gap > 3 * honest.standard_error


def test_what_is_captured_is_told_only_where_the_histogram_is_above_the_floor():
    found = ring_hmm_floor.Gap(gap=0.1, standard_error=0.01, nll=0.6, floor=0.5)
    assert found.captured(0.7) == pytest.approx(0.5) and found.captured(0.5) is None


def test_the_windows_of_a_subset_are_those_of_the_whole(population, floor):
    assert ring_hmm_floor.window_nll(population, [7, 3]) == [floor[7], floor[3]]
