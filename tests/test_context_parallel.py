"""A sequence spread over ranks: attention, its gradients and a whole model equal those of one process."""

import functools
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan_bio import attention, context_parallel, recompute
from torchtitan_bio.models import layers, llama3

TOLERANCE = {"ulysses": 2e-6, "ring": 1e-5}  # relative to the tensor's largest value, in fp32
CASES = {
    # batch, tokens, query heads, key-value heads, causal, document starts inside the rows
    "plain": (1, 64, 4, 4, True, None),
    "grouped-batch": (2, 96, 8, 4, True, None),
    "not-causal": (2, 48, 4, 4, False, None),
    "shortest": (1, 8, 4, 4, True, None),
    "ragged": (2, 96, 8, 4, True, [1, 2, 13, 40, 96, 97, 150, 191]),
    "ragged-not-causal": (2, 96, 8, 4, False, [5, 77, 96, 100]),
    "long-in-one-row": (2, 64, 4, 4, True, [3, 64]),
    "at-the-borders": (1, 64, 8, 4, True, [8, 16, 24, 40, 48]),
    "many-of-one-token": (1, 16, 4, 4, True, list(range(1, 13))),
}


@functools.cache
def kernel(name="auto", dtype=torch.float32):
    return attention.choose(name, device=torch.device("cpu"), dtype=dtype, head_dim=16)


def whole_tensors(case, seed=0):
    """q, k, v and the output's gradient, and the boundaries."""
    batch, tokens, heads, kv_heads, causal, starts = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(batch, tokens, count, 16, generator=generator) for count in (heads, kv_heads, kv_heads, heads)]
    bounds = None if starts is None else sorted({0, *starts, *range(tokens, batch * tokens + 1, tokens)})
    return tensors, causal, None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def output_and_gradients(attend, q, k, v, upstream, causal, cu_seqlens):
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    output = attend(*inputs, causal=causal, cu_seqlens=cu_seqlens)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def mesh_of(rank, degree):
    """(the process group that shares a sequence, which of the sequences it has)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // degree, degree), mesh_dim_names=("shard", "context"))
    return mesh["context"].get_group(), rank // degree


def spread_attention(rank, degree, method, cases):
    """The largest relative error of the output and of each gradient, by case. Groups side by side get different sequences."""
    group, sequence = mesh_of(rank, degree)
    spread, errors = context_parallel.METHODS[method](kernel(), group), {}
    for case in cases:
        tensors, causal, cu_seqlens = whole_tensors(case, sequence)
        exact = output_and_gradients(attention.by_definition, *(t.double() for t in tensors), causal, cu_seqlens)
        held = context_parallel.positions(tensors[0].shape[1], group.rank(), degree, method)
        ours = output_and_gradients(spread, *(tensor[:, held] for tensor in tensors), causal, cu_seqlens)
        whole = [context_parallel.gather_sequence(tensor, group, method) for tensor in ours]
        errors[case] = [((mine - true).abs().max() / true.abs().max()).item() for mine, true in zip(whole, exact, strict=True)]
    return errors


@pytest.mark.parametrize(("ranks", "degree"), [(2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_attention_over_a_spread_sequence_equals_the_definition(method, ranks, degree):
    for errors in on_ranks(ranks, spread_attention, degree, method, list(CASES)):
        assert max(map(max, errors.values())) < TOLERANCE[method], errors


def ring_in_double(rank):
    group, _ = mesh_of(rank, 2)
    ring = context_parallel.Ring(kernel("math", torch.float64), group)
    (q, k, v, upstream), causal, cu_seqlens = whole_tensors("ragged")
    q, k, v, upstream = (tensor.double() for tensor in (q, k, v, upstream))
    held = context_parallel.positions(q.shape[1], rank, 2, "ring")
    ours = output_and_gradients(ring, *(tensor[:, held] for tensor in (q, k, v, upstream)), causal, cu_seqlens)
    exact = output_and_gradients(attention.by_definition, q, k, v, upstream, causal, cu_seqlens)
    return max((mine - true[:, held]).abs().max().item() for mine, true in zip(ours, exact, strict=True))


def test_the_ring_is_exact_to_the_precision_of_its_type():
    assert max(on_ranks(2, ring_in_double)) < 1e-13


# ---- What it costs


@dataclass(frozen=True)
class Counting:
    """A kernel that writes down the number of scores of each of its forward calls."""

    kernel: attention.Kernel
    scores: list
    can_be_kept: bool = True

    def forward_with_lse(self, q, k, v, causal, cu_seqlens):
        self.scores.append(q.shape[1] * (q.shape[1] + 1) // 2 if causal else q.shape[1] * k.shape[1])
        return self.kernel.forward_with_lse(q, k, v, causal, cu_seqlens)

    def backward(self, *args):
        return self.kernel.backward(*args)


def cost_of_the_ring(rank, degree):
    """Scores of a row of 64 causal tokens on this rank, and elements that it sent forward and backward."""
    group, _ = mesh_of(rank, degree)
    scores, sent, send = [], [], dist.batch_isend_irecv

    def counted(operations):
        sent.append(operations[0].tensor.numel())
        return send(operations)

    (q, k, v, _), *_ = whole_tensors("plain")
    held = context_parallel.positions(64, group.rank(), degree, "ring")
    q, k, v = (tensor[:, held].requires_grad_() for tensor in (q, k[:, :, :2], v[:, :, :2]))
    with mock.patch.object(dist, "batch_isend_irecv", counted):
        output = context_parallel.Ring(Counting(kernel(), scores), group)(q, k, v)
        forward = sum(sent)
        output.sum().backward()
    return sum(scores), forward / k.numel(), (sum(sent) - forward) / k.numel()


def test_every_rank_of_the_ring_has_the_same_work_and_sends_no_repeated_head():
    costs = on_ranks(4, cost_of_the_ring, 4)
    assert sum(scores for scores, _, _ in costs) == 64 * 65 // 2  # each pair of tokens once
    assert len({scores for scores, _, _ in costs}) == 1
    # k and v to the three other ranks; backward again, and their gradients once around.
    assert {(forward, backward) for _, forward, backward in costs} == {(2 * 3, 2 * 3 + 2 * 4)}


# ---- Who holds what


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_every_position_is_held_once_and_in_order_by_a_rank(method, degree):
    held = [context_parallel.positions(32, rank, degree, method).tolist() for rank in range(degree)]
    assert sorted(sum(held, [])) == list(range(32))
    assert all(positions == sorted(positions) and len(positions) == 32 // degree for positions in held)


def test_the_ring_gives_a_rank_an_early_and_a_late_part():
    assert context_parallel.positions(16, 1, 4, "ring").tolist() == [2, 3, 12, 13]
    assert context_parallel.positions(16, 1, 4, "ulysses").tolist() == [4, 5, 6, 7]


def test_a_shard_takes_tokens_and_labels_at_its_positions_and_keeps_the_boundaries_whole():
    tokens, cu_seqlens = torch.arange(32, dtype=torch.uint8).view(2, 16), torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    part = context_parallel.shard({"tokens": tokens, "labels": -tokens.short(), "cu_seqlens": cu_seqlens}, 1, 4, "ring")
    assert part["positions"].tolist() == [2, 3, 12, 13]
    assert part["tokens"].tolist() == [[2, 3, 12, 13], [18, 19, 28, 29]]
    assert part["labels"].tolist() == (-part["tokens"].short()).tolist()
    assert part["cu_seqlens"] is cu_seqlens
    assert context_parallel.shard({"tokens": tokens, "cu_seqlens": None}, 0, 2, "ulysses")["cu_seqlens"] is None


@pytest.mark.parametrize(
    ("method", "degree", "seq_len", "num_kv_heads", "complaint"),
    [
        ("ulysses", 3, 96, 8, "degree 3 does not divide the 8 key-value heads, .* nearest valid degrees are 2 and 4"),
        (
            "ulysses",
            16,
            96,
            8,
            "degree 16 does not divide the 8 key-value heads, .* nearest valid degrees are 8, or use the ring",
        ),
        ("ulysses", 4, 90, 8, "seq_len=90 is not a multiple of 4, .* nearest valid values are 88 and 92"),
        ("ring", 4, 4, 8, "seq_len=4 is not a multiple of 8, twice the degree, .* nearest valid values are 8 and 8"),
        ("ring", 4, 100, 1, "seq_len=100 is not a multiple of 8, twice the degree, .* nearest valid values are 96 and 104"),
        ("spiral", 0, 64, 8, "'spiral' is not one of ulysses, ring\ncontext parallel degree 0 is not at least 1"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_both_numbers_and_the_nearest_valid(
    method, degree, seq_len, num_kv_heads, complaint
):
    with pytest.raises(ValueError, match=complaint):
        context_parallel.check(method, degree, seq_len=seq_len, num_kv_heads=num_kv_heads)


def test_what_can_be_shared_is_not_refused():
    context_parallel.check("ulysses", 8, seq_len=131_072, num_kv_heads=8)
    context_parallel.check("ring", 3, seq_len=96, num_kv_heads=8)


def refusals(rank):
    messages = []
    for method, q, k in (("ulysses", (1, 8, 6, 16), (1, 8, 3, 16)), ("ring", (1, 7, 4, 16), (1, 7, 2, 16))):
        spread = context_parallel.METHODS[method](kernel(), dist.group.WORLD)
        with pytest.raises(ValueError) as refused:
            spread(torch.randn(q), torch.randn(k), torch.randn(k))
        messages.append(str(refused.value))
    return messages


def test_tensors_that_cannot_be_shared_are_refused_before_anything_is_sent():
    for ulysses, ring in on_ranks(2, refusals):
        assert "degree 2 does not divide the 3 key-value heads" in ulysses
        assert "seq_len=14 is not a multiple of 4" in ring


def test_the_ring_refuses_a_kernel_that_gives_no_log_sum_exp():
    with pytest.raises(ValueError, match="attention kernel 'torch' does not give .* choose another kernel, or ulysses"):
        context_parallel.Ring(attention.TORCH_CHOICE, group=None)


# ---- A whole model


def batch_of(sequence):
    """Two rows of 48 tokens with ragged documents and labels that are not all targets."""
    generator = torch.Generator().manual_seed(sequence)
    tokens = torch.randint(0, 256, (2, 48), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 256, (2, 48), generator=generator).short()
    labels[torch.rand(2, 48, generator=generator) < 0.3] = layers.IGNORED
    bounds = torch.tensor([0, 7, 31 - sequence, 48, 73, 96], dtype=torch.int32)
    return {"tokens": tokens, "labels": labels, "cu_seqlens": bounds}


def rotary_rows(positions):
    """Llama's rotary table with the rows of these positions only."""
    table = layers.rope_table

    def rows(num_positions, frequencies):
        return tuple(part[positions] for part in table(int(positions.max()) + 1, frequencies))

    return mock.patch.object(layers, "rope_table", rows)


def model_with(attend):
    model = llama3.Model(llama3.FLAVORS["debug"], attend=attend)
    model.init_weights(seed=0)
    return model


def spread_attend(method, group, recomputation):
    """What the model attends by, and the part of it that keeps its results."""
    attend = context_parallel.Ring(kernel(), group) if method == "ring" else kernel()
    kept = recompute.KeptAttention(attend) if recomputation == "keep_attention" else None
    attend = kept or attend
    return (context_parallel.Ulysses(attend, group) if method == "ulysses" else attend), kept


def spread_model(rank, degree, method, recomputation):
    """The largest relative error of the loss, gradients and logits, of a batch a group against one process with them all."""
    group, sequence = mesh_of(rank, degree)
    attend, kept = spread_attend(method, group, recomputation)
    model = model_with(attend)
    if recomputation != "none":
        for block in model.blocks():
            block.forward = recompute.recomputed(block.forward, kept=kept)
    inputs = context_parallel.shard(batch_of(sequence), group.rank(), degree, method)
    with rotary_rows(inputs["positions"]):
        loss = model(inputs)["next_token"]
    loss.backward()
    results = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for result in results:
        dist.all_reduce(result)
    with torch.no_grad(), rotary_rows(inputs["positions"]):
        results.append(context_parallel.gather_sequence(model.logits(inputs), group, method))

    alone = model_with(kernel())
    true_loss = sum(alone(batch_of(other))["next_token"] for other in range(dist.get_world_size() // degree))
    true_loss.backward()
    truth = [true_loss.detach(), *(parameter.grad for parameter in alone.parameters())]
    with torch.no_grad():
        truth.append(alone.logits(batch_of(sequence)))
    return max(((mine - true).abs().max() / true.abs().max()).item() for mine, true in zip(results, truth, strict=True))


@pytest.mark.parametrize(
    ("ranks", "degree", "method", "recomputation"),
    [
        (2, 2, "ulysses", "full"),
        (2, 2, "ring", "full"),
        (4, 2, "ulysses", "keep_attention"),
        (4, 2, "ring", "keep_attention"),
        (4, 4, "ring", "none"),
    ],
)
def test_loss_gradients_and_logits_of_a_spread_model_equal_those_of_one_process(ranks, degree, method, recomputation):
    assert max(on_ranks(ranks, spread_model, degree, method, recomputation)) < TOLERANCE[method]
