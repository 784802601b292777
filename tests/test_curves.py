"""Curves and calibration equal a plain account, on any division over ranks, and see what is wrong with a model."""

from math import lgamma, log

import numpy as np
import pytest
import torch

from torchtitan_bio.data import loader, spikes
from torchtitan_bio.science import curves, ring_hmm_floor, units

SOURCE = "ring-hmm:n=3,K=8,bins=50,test_rows=12"
SEQ_LEN = 30  # 7 bins and two tokens of padding; windows are 3 bins apart


@pytest.fixture(scope="module")
def dataset():
    return spikes.build(source=SOURCE, split="test", mode="aligned", overlap=True, seq_len=SEQ_LEN)


def drawn(batch):
    """Logits for each (window, position, token) that do not depend on how windows are batched."""
    rows = [
        torch.randn(SEQ_LEN, 256, generator=torch.Generator().manual_seed(1000 * row + begin)).double()
        for row, begin in batch.origins
    ]
    return torch.stack(rows + [torch.zeros(SEQ_LEN, 256).double()] * (len(batch.inputs["labels"]) - len(rows)))


def added(dataset, rank=0, world_size=1, local_batch_size=5, model=drawn):
    found = curves.Curves(dataset, units.by_recording(dataset))
    for batch in loader.finite(dataset, local_batch_size=local_batch_size, rank=rank, world_size=world_size):
        found.add(model(batch), batch)
    return found


def test_curves_equal_a_plain_account_of_every_bin_at_every_place(dataset):
    result = added(dataset).result()["all"]
    events, scored = {}, {}  # by place, by neuron: (neuron, count, nats)
    for row in range(len(dataset.index)):
        counts, begin, last = dataset.counts(row), 0, 0
        while last < 50:
            last = min(begin + 7, 50)
            generator = torch.Generator().manual_seed(1000 * row + begin)
            logits = torch.randn(SEQ_LEN, 256, generator=generator).double().numpy()
            for place, bin in enumerate(range(begin, last)):
                for neuron in range(3):
                    scores = logits[4 * place + neuron][:255]
                    event = (neuron, int(counts[neuron, bin]), np.log(np.exp(scores).sum()) - scores[counts[neuron, bin]])
                    events.setdefault(place, []).append(event)
                    if begin == 0 or place >= 4:
                        scored.setdefault(neuron, []).append(event)
            begin += 3
    assert sum(map(len, scored.values())) == 12 * 3 * 50  # each count once
    means = {neuron: np.mean([y for _, y, _ in each]) for neuron, each in scored.items()}

    def bits(chosen):
        null = sum(means[neuron] - y * log(means[neuron]) + lgamma(y + 1) for neuron, y, _ in chosen)
        return (null - sum(nats for *_, nats in chosen)) / sum(y for _, y, _ in chosen) / log(2)

    places = [[0], [1], [2], [3], [4, 5], [6]]
    context, neuron = result["context"], result["neuron"]
    assert (context["from_bin"], context["to_bin"]) == ([0, 1, 2, 3, 4, 6], [1, 2, 3, 4, 6, 7])
    of_class = [[event for place in each for event in events[place]] for each in places]
    assert context["counts"] == [len(each) for each in of_class]
    assert context["nll"] == pytest.approx([np.mean([nats for *_, nats in each]) for each in of_class], rel=1e-9)
    assert context["bits_per_spike"] == pytest.approx([bits(each) for each in of_class], rel=1e-9)
    assert neuron["bits_per_spike"] == pytest.approx([bits(scored[each]) for each in range(3)], rel=1e-9)
    assert neuron["spikes"] == [sum(y for _, y, _ in scored[each]) for each in range(3)]
    longest = context["below_longest"]
    assert longest[-1]["bits_per_spike"] == 0 and longest[-1]["standard_error"] == pytest.approx(0, abs=1e-12)
    assert longest[1]["bits_per_spike"] == pytest.approx(bits(of_class[-1]) - bits(of_class[1]), rel=1e-9)
    assert longest[1]["standard_error"] > 0


def leaves(value, path=""):
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, each in pairs for name, leaf in leaves(each, f"{path}/{key}").items()}
    return {path: value}


def test_curves_do_not_depend_on_batches_or_on_ranks_that_add_up(dataset):
    whole = added(dataset).result()
    ranks = [added(dataset, rank, 3, local_batch_size=2) for rank in range(3)]
    flat = []
    for each in ranks:
        each.result(lambda array: flat.append(array) or array)
    summed = ranks[0].result(lambda array: sum(flat))
    assert leaves(summed) == pytest.approx(leaves(whole), rel=1e-9, abs=1e-12)


def ideal(dataset, sharpness=1.0):
    """The ideal observer's curves, or those of a model that is surer of itself than it should be."""
    found = curves.Curves(dataset, units.by_recording(dataset))
    emission = dataset.store.distribution(dataset.store.rates(0))
    for window in ring_hmm_floor.observe(dataset):
        p = ring_hmm_floor.predictive(window.counts[None], emission, dataset.store.p)[0] ** sharpness
        p /= p.sum(-1, keepdims=True)
        at = np.take_along_axis(p, window.counts[..., None], 2)[..., 0]
        below = np.cumsum(p, -1) - p
        below = np.take_along_axis(below, window.counts[..., None], 2)[..., 0]
        found.add_window(window.origin, window.counts, -np.log(at), window.first_scored, below)
    return found.result()["all"]


@pytest.mark.slow
def test_a_model_with_the_true_probabilities_is_calibrated_and_one_too_sure_of_itself_is_not():
    source = "ring-hmm:n=4,K=8,bins=200,test_rows=30"
    many = spikes.build(source=source, split="test", mode="aligned", overlap=True, seq_len=5 * 10)
    right, wrong = ideal(many), ideal(many, sharpness=1.5)
    assert right["pit"]["counts"] == 24_000
    # Kolmogorov: 1.63 / sqrt(24,000) is passed by one in a hundred
    assert right["pit"]["distance"] < 1.63 / 24_000**0.5 < wrong["pit"]["distance"] / 4
    first = right["context"]["below_longest"][0]  # what is known of a hidden state grows with context
    assert first["bits_per_spike"] > 4 * first["standard_error"]


@pytest.mark.parametrize("most", [1, 2, 4, 5, 31, 32, 11915])
def test_classes_cover_everything_once_and_grow_by_half_at_most_from_the_fourth_on(most):
    found = curves.edges(most)
    assert found[0] == 0 and found[-1] == most and (np.diff(found) > 0).all()
    assert found[:5].tolist() == list(range(min(most, 4) + 1)) and (found[5:] <= 1.5 * found[4:-1]).all()
    assert len(found) < 30
