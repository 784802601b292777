"""Recomputation under FSDP2 and torch.compile, as parallelize sets it up: the steps of one plain process."""

import functools
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from small_llama import DOCUMENTS, SMALL, Counting, example, kernel, largest_error, lively, model_with, train_once
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor

from torchtitan_bio import distributed, optimizer, parallelize
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.recompute import HostMemory, KeptAttention


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "selective"}, "'selective' is not one of none, full, keep_attention"),
        ({"recompute": "keep_attention"}, "keep_attention needs it"),
        ({"recompute": "none", "inputs_on_host": HostMemory()}, "needs recomputed blocks"),
    ],
)
def test_parallelize_refuses_what_does_not_go_together(settings, message):
    types = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        parallelize.parallelize(Model(SMALL), None, **types, compile_blocks=False, reshard_after_forward=True, **settings)


def sharded(rank, settings):
    """Losses of two steps, the gradients of the first and attention's calls, on this rank's half of the batch."""
    world = distributed.start()
    counting, mode = Counting(kernel()), settings.get("recompute", "none")
    kept = KeptAttention(counting, settings.get("keep_on", "device")) if mode == "keep_attention" else None
    with torch.device("meta"):
        model = Model(SMALL, kept or counting, settings.get("ffn_tiles", 1))
    parallelize.parallelize(
        model,
        world.mesh,
        param_dtype=settings.get("dtype", torch.float32),
        reduce_dtype=torch.float32,
        recompute=mode,
        compile_blocks=False,
        reshard_after_forward=settings.get("reshard", True),
        kept_attention=kept,
        inputs_on_host=HostMemory() if settings.get("on_host") else None,
        offload_states=settings.get("offload_states", False),
    )
    parallelize.materialize(model, world.device, seed=0, offload_states=settings.get("offload_states", False))
    adamw = optimizer.build(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    losses, gradients = [0.0, 0.0], {}
    for step in range(2):
        adamw.zero_grad()
        for row in range(2) if world.size == 1 else [rank]:
            inputs = example(DOCUMENTS[:4], seed=step)
            inputs |= {name: inputs[name][row : row + 1] for name in ("tokens", "labels")}
            loss = model(inputs)["next_token"]
            (loss * world.size).backward()
            losses[step] += world.sum_on_device(loss).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        if step == 0:
            gradients = {name: parameter.grad.full_tensor().clone() for name, parameter in model.named_parameters()}
        adamw.step()
    return losses, {name: gradient.numpy() for name, gradient in gradients.items()}, counting.counts


@pytest.fixture(scope="module")
def alone():
    return on_ranks(1, sharded, {})[0]


EVERYTHING = {"recompute": "keep_attention", "keep_on": "host", "on_host": True, "ffn_tiles": 3, "offload_states": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute": "keep_attention"},
        {"ffn_tiles": 3},
        {"ffn_tiles": 3, "reshard": False},
        {"recompute": "full", "on_host": True, "ffn_tiles": 2},
        {"offload_states": True},
        EVERYTHING,
    ],
    ids=["kept", "tiles", "tiles, not resharded", "full, tiles, inputs on host", "states on host", "everything"],
)
def test_on_two_sharded_ranks_the_step_is_that_of_one_plain_process(alone, settings):
    for losses, gradients, counts in on_ranks(2, sharded, settings):
        assert losses == pytest.approx(alone[0], rel=2e-6)
        errors = largest_error(
            {name: torch.from_numpy(gradient) for name, gradient in gradients.items()},
            {name: torch.from_numpy(gradient) for name, gradient in alone[1].items()},
        )
        assert errors <= 2e-6
        if settings.get("recompute") == "keep_attention":
            assert counts == {"plain": 0, "forward": 6, "backward": 6}


def test_sharded_in_bf16_everything_together_stays_near_fp32(alone):
    for losses, gradients, _ in on_ranks(2, sharded, EVERYTHING | {"dtype": torch.bfloat16}):
        assert losses == pytest.approx(alone[0], rel=1e-2)
        assert all(torch.from_numpy(gradient).isfinite().all() for gradient in gradients.values())


# ---- Compiled


def compiled(rank, mode, backend):
    """(graphs made, graphs run, largest error) of a step on each batch of documents, by what parallelize makes of a model."""
    world, counts, chosen = distributed.start(), {"made": 0, "run": 0}, kernel()

    def counting(graph, inputs):
        counts["made"] += 1
        inner = aot_eager(graph, inputs)

        def run(*arguments):
            counts["run"] += 1
            return inner(*arguments)

        return run

    torch.compiler.reset()
    kept = KeptAttention(chosen) if mode == "keep_attention" else None
    model, plain = lively(Model(SMALL, kept or chosen)), model_with(chosen, plain=True)
    types = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    of_torch = torch.compile
    with mock.patch.object(
        torch, "compile", functools.partial(of_torch, backend=counting) if backend == "counting" else of_torch
    ):
        parallelize.parallelize(
            model, world.mesh, **types, recompute=mode, compile_blocks=True, reshard_after_forward=True, kept_attention=kept
        )
    rows = []
    for inner in ([1, 20, 64, 90], [64, 127], [3, 64], [5, 7, 9, 64, 70], [64], [1, 2, 64, 65, 99, 101]):
        bounds = torch.tensor([0, *inner, 128], dtype=torch.int32)
        counts.update(made=0, run=0)
        ours = train_once(model, example(bounds))
        ours = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in ours.items()}
        rows.append((counts["made"], counts["run"], largest_error(ours, train_once(plain, example(bounds)))))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "keep_attention"])
def test_recomputed_blocks_run_compiled_and_other_documents_compile_nothing_anew(mode):
    (rows,) = on_ranks(1, compiled, mode, "counting")
    made, run, errors = zip(*rows, strict=True)
    # Packed, a block is four graphs around attention: norm, q k v, output, feed-forward. All three blocks share them. Then one
    # more time, for any number of documents, those two that the boundaries pass through. A batch of whole rows, the fifth, is
    # one graph with attention inside, unless that is kept.
    (of_rows, in_rows) = (1, 1) if mode == "full" else (2, 4)
    assert made == (4, 2, 0, 0, of_rows, 0)
    assert run == tuple(6 * graphs for graphs in (4, 4, 4, 4, in_rows, 4))  # three blocks, forward and recomputed
    assert max(errors) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "keep_attention"])
def test_by_inductor_too_recomputed_blocks_give_the_plain_gradients(mode):
    (rows,) = on_ranks(1, compiled, mode, "inductor", timeout_s=600)
    assert max(error for _, _, error in rows) <= 1e-5
