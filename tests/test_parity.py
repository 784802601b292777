"""One process against many: the same model, batch and step, whatever the layout of the ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import on_ranks

import preflight
import train
from torchtitan_bio import assembly, config_loader, distributed, models, optimizer
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
        shard_degree=parallelism.data_parallel_shard_degree,
        replicate_degree=parallelism.data_parallel_replicate_degree,
        context_degree=parallelism.context_parallel_degree,
    )
    architecture = models.resolve("llama3", "debug", {})
    job = preflight.job_of(config, architecture, world.size, world.device)
    model = assembly.build_model(config, architecture, job, world, lambda line: None).model
    adamw = optimizer.build(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    initial = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    losses, gradients = [], {}
    share = GLOBAL_BATCH // world.data_size
    for step in range(3):
        first = world.data_rank * share
        microbatches = [uneven_batch(step, start, local_batch_size) for start in range(first, first + share, local_batch_size)]
        method = parallelism.context_parallel_method
        loss, grad_norm, taken = train.train_step(model, adamw, microbatches, world, 1e9, method)
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


REPLICATE_2 = ["--parallelism.data_parallel_replicate_degree", "2"]
CONTEXT_2, CONTEXT_4 = (["--parallelism.context_parallel_degree", degree] for degree in "24")
RING = ["--parallelism.context_parallel_method", "ring"]
KEEP_ATTENTION = ["--activation_checkpoint.mode", "keep_attention"]
ON_HOST = ["--activation_checkpoint.keep_on", "host", "--activation_checkpoint.offload_inputs", "true"]
IN_TILES = ["--activation_checkpoint.ffn_tiles", "3"]
STATES_ON_HOST = ["--parallelism.offload_states", "true"]
EVERYTHING = [*KEEP_ATTENTION, *ON_HOST, *IN_TILES, *STATES_ON_HOST]


@pytest.mark.parametrize(
    ("ranks", "arguments", "local_batch_size"),
    [
        (1, [], 1),
        (2, [], 4),
        (2, ["--activation_checkpoint.mode", "full"], 2),
        (2, REPLICATE_2, 4),
        (4, [], 2),
        (4, ["--parallelism.fsdp_reshard_after_forward", "never"], 1),
        (4, REPLICATE_2, 2),
        (4, REPLICATE_2, 1),
        (2, STATES_ON_HOST, 2),
        (2, [*CONTEXT_2, *KEEP_ATTENTION], 4),
        (2, EVERYTHING, 4),
        pytest.param(4, [*CONTEXT_2, *REPLICATE_2], 2, marks=pytest.mark.slow),
        pytest.param(4, [*CONTEXT_2, *EVERYTHING], 2, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "fsdp-2", "fsdp-2-recompute", "replicate-2", "fsdp-4", "fsdp-4-kept", "hsdp-2x2"]
    + ["hsdp-2x2-accumulation", "states-on-host", "ulysses-2", "everything", "replicate-2-ulysses-2", "everything-and-ulysses"],
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


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(2, CONTEXT_2), *(pytest.param(4, each, marks=pytest.mark.slow) for each in (CONTEXT_4, [*CONTEXT_2, *EVERYTHING]))],
)
def test_a_ring_of_ranks_equals_one_process(reference, ranks, arguments):
    """Merging parts of a softmax rounds more than summing it at once."""
    losses, gradients, _ = reference
    for other_losses, other_gradients, _ in on_ranks(ranks, three_steps, [*arguments, *RING], 2):
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
        for name, gradient in gradients.items():
            assert np.abs(other_gradients[name] - gradient).max() < 1e-5 * np.abs(gradient).max(), name


def skip_a_step(rank, what):
    """Three steps, the second with something not finite on the last rank alone: whether each was taken and left the weights."""
    config = config_loader.load(["--model.flavor", "debug"]).config
    world = distributed.start()
    model = assembly.build_model(config, models.resolve("llama3", "debug", {}), None, world, lambda line: None).model
    adamw = optimizer.build(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    report = []
    for step in range(3):
        hook = None
        if step == 1 and world.rank == world.size - 1:
            if what == "loss":
                hook = model.register_forward_hook(lambda module, inputs, sums: {k: v * float("inf") for k, v in sums.items()})
            else:
                hook = model.layers[1].register_full_backward_hook(
                    lambda module, grads, _: (grads[0] * float("nan"), *grads[1:])
                )
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        batch = uneven_batch(step, world.rank * 4, 4)
        loss, grad_norm, taken = train.train_step(model, adamw, [batch], world, max_norm=1.0)
        same = all(torch.equal(old, new.to_local()) for old, new in zip(before, model.parameters(), strict=True))
        report.append((taken, same))
        if hook:
            hook.remove()
    return report


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_on_one_rank_makes_all_ranks_skip_that_step_alone(what):
    for report in on_ranks(2, skip_a_step, what):
        assert report == [(True, False), (False, True), (True, False)]


def held_out_scores(rank, max_windows, context_degree=1, method="ulysses"):
    method_setting = ["--parallelism.context_parallel_method", method]
    config = config_loader.load(["--model.flavor", "debug", "--training.seq_len", "128", *method_setting]).config
    world = distributed.start(context_degree=context_degree)
    architecture = models.resolve("llama3", "debug", {})
    _, held_out = assembly.build_data(config, architecture, world, lambda line: None)
    job = preflight.job_of(config, architecture, world.size, world.device)
    model = assembly.build_model(config, architecture, job, world, lambda line: None).model
    scores = assembly.named(held_out.scorer)(held_out)
    return train.validate(model, held_out, world, scores, local_batch_size=3, max_windows=max_windows, context_method=method)


def test_held_out_scores_are_those_of_one_process_whatever_the_number_of_ranks():
    """10 windows in batches of 3 leave ranks with uneven shares, and one with none in the last turn."""
    (one,) = on_ranks(1, held_out_scores, 10)
    assert one["windows"] == 10
    for ranks in (2, 4):
        for other in on_ranks(ranks, held_out_scores, 10):
            assert other == pytest.approx(one, rel=1e-6)
    for method in ("ulysses", "ring"):
        for other in on_ranks(4, held_out_scores, 10, 2, method):
            assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_and_gradients_of_eager_ones(reference):
    losses, gradients, _ = reference
    ((other_losses, other_gradients, _),) = on_ranks(1, three_steps, ["--compile.enable", "true"], 8, timeout_s=300)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for name, gradient in gradients.items():
        assert np.abs(other_gradients[name] - gradient).max() < 1e-5 * np.abs(gradient).max(), name


def test_what_fsdp_moves_to_an_accelerator_leaves_document_boundaries_on_the_cpu():
    """Before the root's forward FSDP moves each tensor that it finds among the inputs, on accelerators only."""
    from torch.distributed.utils import _to_kwargs

    batch = uneven_batch(0, 0, 4)
    inputs = train.to_device(batch.inputs, SimpleNamespace(device=torch.device("cpu"), context_size=1), "ulysses")
    [moved], _ = (each[0] for each in _to_kwargs((inputs,), {}, torch.device("meta"), False))
    assert moved["tokens"].is_meta and np.array_equal(moved["cu_seqlens"], batch.inputs["cu_seqlens"])
    model = models.build("llama3", models.resolve("llama3", "debug", {}))
    model.init_weights(0)
    one, other = (model(batch.inputs | {"cu_seqlens": each["cu_seqlens"]})["next_token"] for each in (batch.inputs, moved))
    assert torch.equal(one, other) and not torch.equal(one, model(batch.inputs | {"cu_seqlens": None})["next_token"])
