"""train.train_step on a family with two loss terms: sums over global counts, whichever ranks hold the targets of a term."""

import numpy as np
import pytest
import torch
import toy_family
from ranks import on_ranks

import train
from torchtitan_bio import distributed, parallelize
from torchtitan_bio.data.batch import IGNORED, Batch

TOLERANCE = 2e-6  # relative to the tensor's largest value, in fp32
GLOBAL_BATCH, SEQ_LEN, STEPS = 8, 10, 3
LEARNING_RATE, MAX_NORM = 0.05, 0.5  # of plain SGD, under which a gradient of the wrong length shows in the next loss


def samples(step, first, size):
    """Of the 8, only 0, 1 and 3 have targets of `distance` (so half of the ranks have none), and 6 and 7 have no next token."""
    tokens, labels, distances = [], [], []
    for position in range(first, first + size):
        rng = np.random.default_rng([step, position])
        window = rng.integers(0, 16, SEQ_LEN + 1)
        tokens.append(window[:-1].astype(np.uint8))
        label, distance = window[1:].astype(np.int16), np.arange(SEQ_LEN, 0, -1)
        label[rng.random(SEQ_LEN) < (1 if position >= 6 else position / 8)] = IGNORED
        distance[rng.random(SEQ_LEN) < (0.5 if position in (0, 1, 3) else 1)] = IGNORED
        labels.append(label)
        distances.append(distance)
    tokens, labels, distances = (torch.from_numpy(np.stack(rows)) for rows in (tokens, labels, distances))
    counts = {"next_token": int((labels != IGNORED).sum()), "distance": int((distances != IGNORED).sum())}
    return Batch({"tokens": tokens, "labels": labels, "distances": distances}, counts)


def shard(model, world):
    fp32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize.parallelize(model, world.mesh, **fp32, recompute="none", compile_blocks=False, reshard_after_forward=True)


def sharded_steps(rank, replicate_degree, local_batch_size):
    """Losses, norms and the targets this rank had, of each step; its first gradient, gathered whole."""
    world = distributed.start(replicate_degree=replicate_degree)
    with torch.device("meta"):
        model = toy_family.Model(toy_family.FLAVORS["debug"])
    shard(model, world)
    parallelize.materialize(model, world.device, seed=3)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    share, told, gradients = GLOBAL_BATCH // world.size, [], {}
    for step in range(STEPS):
        firsts = range(rank * share, (rank + 1) * share, local_batch_size)
        microbatches = [samples(step, first, local_batch_size) for first in firsts]
        loss, norm, taken = train.train_step(model, sgd, microbatches, world, MAX_NORM)
        assert taken
        told.append((loss, norm, train.add_counts(microbatches)))
        if step == 0:
            gradients = {name: parameter.grad.full_tensor().numpy().copy() for name, parameter in model.named_parameters()}
    return told, gradients


@pytest.fixture(scope="module")
def plain():
    """The same steps written out, on the whole batch, without a process group or a shard."""
    model = toy_family.Model(toy_family.FLAVORS["debug"])
    model.init_weights(seed=3)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    told, gradients = [], {}
    for step in range(STEPS):
        batch = samples(step, 0, GLOBAL_BATCH)
        sgd.zero_grad()
        sums = model(batch.inputs)
        loss = sums["next_token"] / batch.counts["next_token"] + sums["distance"] / batch.counts["distance"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        told.append((loss.item(), norm.item()))
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        sgd.step()
    return told, gradients


@pytest.mark.parametrize(
    ("ranks", "replicate_degree", "local_batch_size"),
    [(1, 1, 8), (1, 1, 2), (2, 1, 4), (2, 1, 1), (2, 2, 4), (4, 1, 2), (4, 2, 1)],
    ids=["1", "1-accumulated", "2", "2-accumulated", "2-replicas", "4", "2x2-accumulated"],
)
def test_two_loss_terms_with_uneven_targets_give_the_losses_and_gradients_of_a_plain_step(
    plain, ranks, replicate_degree, local_batch_size
):
    expected, expected_gradients = plain
    for told, gradients in on_ranks(ranks, sharded_steps, replicate_degree, local_batch_size):
        np.testing.assert_allclose([step[:2] for step in told], expected, rtol=TOLERANCE)
        for name, gradient in expected_gradients.items():
            error = np.abs(gradients[name] - gradient).max() / np.abs(gradient).max()
            assert error < TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_some_rank_had_no_target_of_a_term_and_the_norm_was_clipped(ranks):
    """What makes the test above worth its name."""
    results = [told for told, _ in on_ranks(ranks, sharded_steps, 1, GLOBAL_BATCH // ranks)]
    for step in range(STEPS):
        targets = [told[step][2] for told in results]
        assert min(of_rank["distance"] for of_rank in targets) == 0 < max(of_rank["distance"] for of_rank in targets)
        assert results[0][step][1] > MAX_NORM
    if ranks == 4:
        assert [told[0][2]["next_token"] for told in results][-1] == 0


def one_term_without_targets(rank):
    """Losses of a step in which no rank has a target of `distance`, beside the sum and the count of the other term."""
    world = distributed.start()
    model = toy_family.Model(toy_family.FLAVORS["debug"])
    model.init_weights(seed=3)
    batch = samples(0, 2, 1)  # the same sample, without distances, on both ranks
    with torch.no_grad():
        expected = model(batch.inputs)["next_token"].item() / batch.counts["next_token"]
    shard(model, world)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return expected, train.train_step(model, sgd, [batch], world, MAX_NORM)


def test_a_term_without_any_target_adds_nothing_and_the_step_is_taken():
    for expected, (loss, _, taken) in on_ranks(2, one_term_without_targets):
        assert taken and loss == pytest.approx(expected, rel=TOLERANCE)
