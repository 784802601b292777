"""One process against many: the same model, batch and step, whatever the layout of the ranks."""

import numpy as np
import pytest
import torch
from ranks import on_ranks

import train
from torchtitan_bio import config_loader, distributed, models, optimizer
from torchtitan_bio.data.batch import IGNORED, Batch

TOLERANCE = 2e-6  # relative to the tensor's largest value, in fp32
SEQ_LEN, GLOBAL_BATCH = 48, 8


def uneven_batch(step, first, size):
    """Windows whose number of targets differs up to tenfold, some with a document that begins inside."""
    tokens, labels, boundaries = [], [], [0]
    for position in range(first, first + size):
        rng = np.random.default_rng([step, position])
        tokens.append(rng.integers(0, 256, SEQ_LEN, dtype=np.uint8))
        window = rng.integers(0, 256, SEQ_LEN).astype(np.int16)
        window[rng.random(SEQ_LEN) < position / (GLOBAL_BATCH + 1)] = IGNORED
        labels.append(window)
        start = (len(tokens) - 1) * SEQ_LEN
        boundaries += [start + 17] * (position % 3 == 0) + [start + SEQ_LEN]
    labels = torch.from_numpy(np.stack(labels))
    inputs = {
        "tokens": torch.from_numpy(np.stack(tokens)),
        "labels": labels,
        "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
    }
    return Batch(inputs=inputs, counts={"next_token": int((labels != IGNORED).sum())}, origins=[(0, 0)] * size)


def three_steps(rank, arguments, local_batch_size):
    """Losses of three steps, gradients of the first and all initial weights, gathered whole."""
    config = config_loader.load(["--model.flavor", "debug", *arguments]).config
    parallelism = config.parallelism
    world = distributed.start(
        shard_degree=parallelism.data_parallel_shard_degree, replicate_degree=parallelism.data_parallel_replicate_degree
    )
    architecture = models.resolve("llama3", "debug", {})
    model = train.build_model(config, architecture, world, lambda line: None)
    adamw = optimizer.build(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    initial = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    losses, gradients = [], {}
    share = GLOBAL_BATCH // world.size
    for step in range(3):
        first = world.rank * share
        microbatches = [uneven_batch(step, start, local_batch_size) for start in range(first, first + share, local_batch_size)]
        loss, grad_norm, taken = train.train_step(model, adamw, microbatches, world, max_norm=1e9)
        assert taken
        losses.append(loss)
        if step == 0:
            gradients = {name: parameter.grad.full_tensor().clone() for name, parameter in model.named_parameters()}
            gradients["norm"] = torch.tensor(grad_norm)
    numpy = lambda tensors: {name: tensor.numpy() for name, tensor in tensors.items()}  # noqa: E731
    return losses, numpy(gradients), numpy(initial)


@pytest.fixture(scope="module")
def reference():
    return on_ranks(1, three_steps, [], GLOBAL_BATCH)[0]


@pytest.mark.parametrize(
    ("ranks", "arguments", "local_batch_size"),
    [
        (1, [], 1),
        (2, [], 4),
        (2, ["--activation_checkpoint.mode", "full"], 2),
        (2, ["--parallelism.data_parallel_replicate_degree", "2"], 4),
        (4, [], 2),
        (4, ["--parallelism.fsdp_reshard_after_forward", "never"], 1),
        (4, ["--parallelism.data_parallel_replicate_degree", "2"], 2),
    ],
    ids=["accumulation", "fsdp-2", "fsdp-2-recompute", "replicate-2", "fsdp-4", "fsdp-4-kept", "hsdp-2x2"],
)
def test_losses_gradients_and_initial_weights_equal_one_process(reference, ranks, arguments, local_batch_size):
    losses, gradients, initial = reference
    for other_losses, other_gradients, other_initial in on_ranks(ranks, three_steps, arguments, local_batch_size):
        for name, weights in initial.items():
            np.testing.assert_array_equal(other_initial[name], weights, err_msg=name)
        np.testing.assert_allclose(other_losses, losses, rtol=TOLERANCE)
        for name, gradient in gradients.items():
            error = np.abs(other_gradients[name] - gradient).max() / np.abs(gradient).max()
            assert error < TOLERANCE, f"{name}: {error:.2e}"
