"""Memory for time: each technique gives the plain path's losses and gradients, and what it saves is counted."""

import pytest
import torch
from small_llama import (
    BATCH,
    DOCUMENTS,
    SMALL,
    TOKENS,
    Counting,
    example,
    kernel,
    largest_error,
    model_with,
    train_once,
)

from torchtitan_bio import attention, parallelize
from torchtitan_bio.live_memory import LiveMemory
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.recompute import HostMemory, KeptAttention, recomputed

TOLERANCE = 1e-6  # relative to the tensor's largest value, in fp32; without tiles the paths are equal bit for bit
IN_DOUBLE = 1e-8  # the same in fp64, of which the loss's logits are rounded to fp32
BYTES_OF_X = BATCH * TOKENS * SMALL.dim * 4
BYTES_OF_LSE = BATCH * TOKENS * SMALL.num_heads * 4


# ---- Exactness


@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("keep_on", ["device", "host"])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("ffn_tiles", [1, 5])
def test_losses_and_gradients_are_those_of_the_plain_path(keep_on, on_host, ffn_tiles, cu_seqlens):
    chosen, inputs = kernel("flash"), example(cu_seqlens)
    plain = train_once(model_with(chosen, plain=True), inputs)
    kept = KeptAttention(chosen, keep_on)
    model = model_with(kept, kept=kept, inputs=HostMemory() if on_host else None, ffn_tiles=ffn_tiles)
    for _ in range(2):  # the second step uses the first one's buffers
        error = largest_error(train_once(model, inputs), plain)
        assert error == 0 if ffn_tiles == 1 else error <= TOLERANCE


@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("keep_on", ["device", "host"])
def test_a_kernel_kept_by_other_formulas_than_its_own_gives_the_plain_paths_gradients(keep_on, cu_seqlens):
    """Math's kept halves are ours, its plain path torch's: in fp32 each is 2e-6 from the truth, which would hide an error."""
    chosen, inputs = kernel("math", torch.float64), example(cu_seqlens)
    plain = train_once(model_with(chosen, plain=True).double(), inputs)
    kept = KeptAttention(chosen, keep_on)
    model = model_with(kept, kept=kept, inputs=HostMemory(), ffn_tiles=5).double()
    assert largest_error(train_once(model, inputs), plain) <= IN_DOUBLE


@pytest.mark.parametrize("is_kept", [False, True])
def test_batches_whose_backward_waits_for_one_another_do_not_mix(is_kept):
    chosen, batches = kernel(), [example(seed=seed) for seed in range(3)]
    plain, host = model_with(chosen, plain=True), HostMemory()
    attend = KeptAttention(chosen, "host") if is_kept else chosen
    model = model_with(attend, kept=attend if is_kept else None, inputs=host, ffn_tiles=3)
    losses = [each(batch)["next_token"] for each in (model, plain) for batch in batches]
    for loss in losses[:2] + losses[3:]:  # the first three are the model's; one of them is thrown away
        loss.backward()
    plain.zero_grad()
    for batch in batches[:2]:
        plain(batch)["next_token"].backward()
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert largest_error({name: parameter.grad for name, parameter in model.named_parameters()}, theirs) <= TOLERANCE


FROZEN = {
    "the first layers": ("tok_embeddings*", "layers.0.*", "layers.1.feed_forward.w2.*", "*norm.weight"),
    "all behind the embedding": ("layers.*", "norm.weight", "output.weight"),
}


@pytest.mark.parametrize("patterns", FROZEN.values(), ids=FROZEN.keys())
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(patterns):
    chosen, inputs = kernel(), example()
    kept = KeptAttention(chosen)
    results = []
    for model in (model_with(chosen, plain=True), model_with(kept, kept=kept, inputs=HostMemory(), ffn_tiles=4)):
        parallelize.freeze(model, patterns)
        model(inputs)["next_token"].backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert 0 < len(results[0]) < 20 and largest_error(results[1], results[0]) <= TOLERANCE


def test_scoring_is_the_same_and_keeps_nothing():
    counting = Counting(kernel())
    kept, host, inputs = KeptAttention(counting), HostMemory(), example(DOCUMENTS)
    model = model_with(kept, kept=kept, inputs=host, ffn_tiles=4)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(inputs), model_with(kernel(), plain=True).logits(inputs), rtol=0, atol=1e-6)
    assert counting.counts == {"plain": 3, "forward": 0, "backward": 0} and host.allocated_bytes == 0


def test_a_compiled_block_with_all_techniques_gives_the_same_gradients():
    chosen = kernel()
    for cu_seqlens in (None, DOCUMENTS):
        inputs, kept = example(cu_seqlens), KeptAttention(chosen, "host")
        model = model_with(kept, plain=True, ffn_tiles=3)
        for block in model.blocks():
            block.forward = recomputed(torch.compile(block.forward, backend="aot_eager"), kept=kept, inputs=HostMemory())
        plain = train_once(model_with(chosen, plain=True), inputs)
        for _ in range(2):
            assert largest_error(train_once(model, inputs), plain) <= TOLERANCE


# ---- What is saved


@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "documents"])
def test_kept_attention_is_computed_once_a_block_and_step_and_otherwise_twice(cu_seqlens):
    full, once, inputs = Counting(kernel()), Counting(kernel()), example(cu_seqlens)
    train_once(model_with(full), inputs)
    assert full.counts == {"plain": 6, "forward": 0, "backward": 0}
    kept = KeptAttention(once)
    model = model_with(kept, kept=kept, ffn_tiles=2)
    for step in (1, 2):
        train_once(model, inputs)
        assert once.counts == {"plain": 0, "forward": 3 * step, "backward": 3 * step}


def kept_bytes(num_layers, keep_on=None, on_host=False):
    """(on the device, on the host) between forward and backward."""
    inputs, chosen = example(), kernel()
    kept, host = keep_on and KeptAttention(chosen, keep_on), HostMemory() if on_host else None
    with LiveMemory() as memory:
        model = model_with(kept or chosen, kept=kept, inputs=host, num_layers=num_layers)
        before = memory.live
        loss = model(inputs)["next_token"]
        for each in filter(None, (host, kept and kept.host)):
            each.settle()
        live = memory.live - before
    assert loss.requires_grad
    buffers = sum(each.allocated_bytes for each in (host, kept and kept.host) if each)
    return live - buffers, buffers


@pytest.mark.parametrize(
    ("settings", "device", "host"),
    [
        ({}, BYTES_OF_X, 0),
        ({"keep_on": "device"}, 2 * BYTES_OF_X + BYTES_OF_LSE, 0),
        ({"keep_on": "host"}, BYTES_OF_X, BYTES_OF_X + BYTES_OF_LSE),
        ({"on_host": True}, 0, BYTES_OF_X),
        ({"keep_on": "device", "on_host": True}, BYTES_OF_X + BYTES_OF_LSE, BYTES_OF_X),
        ({"keep_on": "host", "on_host": True}, 0, 2 * BYTES_OF_X + BYTES_OF_LSE),
    ],
    ids=["full", "attention kept", "attention on host", "inputs on host", "kept, inputs on host", "all on host"],
)
def test_a_block_more_keeps_its_input_and_its_attention_and_not_a_byte_beside(settings, device, host):
    few, many = kept_bytes(2, **settings), kept_bytes(6, **settings)
    assert ((many[0] - few[0]) / 4, (many[1] - few[1]) / 4) == (device, host)


def test_buffers_on_the_host_are_used_again():
    chosen = kernel()
    kept, host = KeptAttention(chosen, "host"), HostMemory()
    model = model_with(kept, kept=kept, inputs=host)
    for step in (1, 2, 3):
        train_once(model, example(seed=step))
        assert host.allocated_bytes == 3 * BYTES_OF_X
        assert kept.host.allocated_bytes == 3 * (BYTES_OF_X + BYTES_OF_LSE)
        assert host.moved_bytes == step * 2 * 3 * BYTES_OF_X


def test_what_comes_back_is_what_was_stored_though_the_source_is_gone_and_buffers_change_hands():
    host, stored = HostMemory(), []
    tensors = [torch.full((4, 3), float(number)) for number in range(4)]
    for tensor in tensors:
        stored.append(host.store(tensor, 10 * tensor[0]))
        tensor.zero_()
    for number in (3, 2):
        large, small = stored[number].take()
        assert (large == number).all() and (small == 10 * number).all()
    again = host.store(torch.full((4, 3), 7.0))
    assert (stored[1].take()[0] == 1).all() and (again.take()[0] == 7).all() and (stored[0].take()[0] == 0).all()
    assert host.allocated_bytes == 4 * (12 + 3) * 4
    with pytest.raises(RuntimeError, match="serves one backward pass"):
        stored[0].take()


@pytest.mark.parametrize("settings", [{"keep_on": "device"}, {"keep_on": "host"}, {"on_host": True}, {"ffn_tiles": 2}])
def test_a_second_backward_is_refused_and_not_wrong(settings):
    chosen = kernel()
    kept = KeptAttention(chosen, settings["keep_on"]) if "keep_on" in settings else None
    host = HostMemory() if settings.get("on_host") else None
    model = model_with(kept or chosen, kept=kept, inputs=host, ffn_tiles=settings.get("ffn_tiles", 1))
    loss = model(example())["next_token"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward pass"):
        loss.backward()


def test_after_backward_nothing_is_kept_though_the_loss_is():
    chosen = kernel()
    kept = KeptAttention(chosen)
    with LiveMemory() as memory:
        model = model_with(kept, kept=kept, ffn_tiles=4)
        before = memory.live
        loss = model(example())["next_token"]
        loss.backward()
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
        assert memory.live - before - gradients < BYTES_OF_X
    assert loss.grad_fn is not None


# ---- Refusals


def test_what_cannot_be_kept_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="'torch' cannot be kept across recomputation .*not probed"):
        KeptAttention(attention.TORCH_CHOICE)
    with pytest.raises(ValueError, match="on device or host, not 'disk'"):
        KeptAttention(kernel(), "disk")
    with pytest.raises(ValueError, match="ffn_tiles=0 is not at least 1"):
        Model(SMALL, ffn_tiles=0)
