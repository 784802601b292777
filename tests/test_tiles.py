"""The feed-forward half in tiles of tokens: the values of the whole, in the memory that the formula says."""

import functools

import pytest
import torch
import torch.nn.functional as F
from small_llama import largest_error

from torchtitan_bio import recompute
from torchtitan_bio.live_memory import LiveMemory, fused_norms
from torchtitan_bio.models.llama3 import feed_forward_half
from torchtitan_bio.recompute import recomputed


def half(tokens=4096, dim=32, ffn_dim=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, dim), (dim,), (ffn_dim, dim), (dim, ffn_dim), (ffn_dim, dim)]
    tensors = [torch.randn(shape, generator=generator) * shape[-1] ** -0.25 for shape in shapes]
    x, *weights = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return functools.partial(feed_forward_half, eps=1e-5), x, tuple(weights)


def test_the_half_is_the_definition():
    function, x, (norm, w1, w2, w3) = half(8)
    n = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
    expected = x + F.linear(F.silu(F.linear(n, w1)) * F.linear(n, w3), w2)
    torch.testing.assert_close(function(x, norm, w1, w2, w3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tiles", [2, 7, 64, 4096, 5000])
def test_tiles_give_the_gradients_of_the_whole(num_tiles):
    # In fp64: sums over 4,096 tiles of one token round differently from one product, by 1e-6 in fp32.
    function, x, weights = half(dtype=torch.float64)
    upstream = torch.randn_like(x)
    names = ("out", "x", "norm", "w1", "w2", "w3")
    results = []
    for tiles in (1, num_tiles):
        out = recompute.in_tiles(function, x, weights, tiles)
        gradients = torch.autograd.grad(out, (x, *weights), upstream)
        results.append(dict(zip(names, (out.detach(), *gradients), strict=True)))
    assert largest_error(results[1], results[0]) <= 1e-13


def peak_of_the_half(num_tiles, tokens=4096, dim=32, ffn_dim=96):
    """Bytes alive at the peak of forward and backward, beside input, output, their gradients and the weights' gradients."""
    with fused_norms(), LiveMemory() as memory:
        function, x, weights = half(tokens, dim, ffn_dim)
        upstream = torch.randn_like(x)
        before = memory.live
        out = recompute.in_tiles(function, x, weights, num_tiles)
        gradients = torch.autograd.grad(out, (x, *weights), upstream)
    return memory.peak - before - out.nbytes - sum(gradient.nbytes for gradient in gradients)


def test_the_working_set_shrinks_with_the_number_of_tiles_and_is_what_the_formula_says():
    for num_tiles in (1, 4, 16):
        predicted = recompute.feed_forward_bytes(4096, 32, 96, 4, num_tiles)
        assert peak_of_the_half(num_tiles) == pytest.approx(predicted, rel=0.1)
    assert peak_of_the_half(8) < peak_of_the_half(1) / 6


def test_a_recomputed_block_computes_its_tiles_once_forward_and_once_backward():
    function, x, weights = half(64)
    calls = []

    def counted(*tensors):
        calls.append(torch.is_grad_enabled())
        return function(*tensors)

    block = recomputed(lambda x, *weights: recompute.in_tiles(counted, x.sin(), weights, 4))
    block(x, *weights).sum().backward()
    assert calls == [False] * 4 + [True] * 4


def test_in_bf16_the_weights_gradients_do_not_get_worse_with_the_number_of_tiles():
    function, x, weights = half(2048)
    exact = torch.autograd.grad(function(x, *weights).square().sum(), weights)
    function, x, weights = half(2048, dtype=torch.bfloat16)

    def error(num_tiles):
        out = recompute.in_tiles(function, x, weights, num_tiles)
        ours = torch.autograd.grad(out.float().square().sum(), weights)
        return max(((mine - true).abs().max() / true.abs().max()).item() for mine, true in zip(ours, exact, strict=True))

    assert error(256) <= 1.5 * error(1)


def test_the_number_of_tiles_is_the_smallest_that_fits_the_budget():
    sizes = dict(num_tokens=131_072, dim=4096, ffn_dim=14_336, value_bytes=2)
    gib = 2**30
    whole = recompute.feed_forward_bytes(**sizes)
    assert whole / gib == pytest.approx(22.0)
    assert recompute.choose_tiles(**sizes, budget_bytes=whole) == 1
    assert recompute.choose_tiles(**sizes, budget_bytes=whole - 1) == 2
    assert recompute.choose_tiles(**sizes, budget_bytes=4 * gib) == 8  # of 2.75 GiB
    assert recompute.choose_tiles(**sizes, budget_bytes=0) == 128  # of 1,024 tokens
    assert recompute.choose_tiles(**(sizes | {"num_tokens": 100}), budget_bytes=0) == 1
