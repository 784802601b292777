"""Attention kernels: what is chosen, what is refused and why, and that documents and grouped heads are exact."""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from torchtitan_bio import attention, kernels
from torchtitan_bio.attention import choose
from torchtitan_bio.kernels import Candidate, Halves, Routes

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # relative to the largest value, in fp32


def qkv(batch, tokens, heads, kv_heads, head_dim, dtype=torch.float32):
    shapes = [(batch, tokens, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(output, tensors):
    return torch.autograd.grad(output.square().sum(), tensors)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


def on_cpu(name="auto", **options):
    return choose(name, device=CPU, dtype=options.pop("dtype", torch.float32), head_dim=16, **options)


def fake(name, dense, **options):
    return Candidate(name, lambda device: Routes(dense, **options))


def forward_only(q, k, v, causal):
    return attention.by_definition(q.detach(), k.detach(), v.detach(), causal=causal)


def not_causal(q, k, v, causal):
    return attention.by_definition(q, k, v, causal=False)


def wrong_heads(q, k, v, causal):
    return attention.by_definition(q, k.flip(2), v.flip(2), causal=causal)


def wrong_gradient(q, k, v, causal):
    return attention.by_definition(q, k.detach() + 0 * k, v, causal=causal)


def broken(q, k, v, causal):
    raise RuntimeError("FA3 requires\n compute capability 9.0")


GOOD = fake("good", lambda q, k, v, causal: attention.by_definition(q, k, v, causal=causal))


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        (forward_only, "no backward"),
        (not_causal, "output differs from the definition"),
        (wrong_heads, "output differs from the definition"),
        (wrong_gradient, "gradient of k differs from the definition"),
        (broken, "FA3 requires compute capability 9.0"),
        (lambda q, k, v, causal: q[:, :1], "returned shape (2, 1, 4, 16)"),
        (lambda q, k, v, causal: q + k.sum() + v.sum() + torch.nan, "output differs from the definition by nan"),
    ],
)
def test_a_kernel_that_does_not_compute_attention_is_passed_over_and_the_reason_is_told(dense, reason):
    kernel = on_cpu(candidates=(fake("bad", dense), GOOD))
    assert kernel.name == "good"
    assert "not bad:" in kernel.why and reason in kernel.why


@pytest.mark.parametrize(
    ("function", "chosen"),
    [
        (lambda q, k, v, causal: (attention.by_definition(q, k, v, causal=causal), torch.zeros(1)), "fa3"),
        (lambda q, k, v, causal: attention.by_definition(q, k, v, causal=causal), "fa3"),
        (lambda q, k, v, causal: forward_only(q, k, v, causal), "good"),
    ],
    ids=["with log-sum-exp", "output alone", "built forward-only"],
)
def test_a_package_that_imports_well_is_taken_only_if_it_has_a_backward(monkeypatch, function, chosen):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=function))
    monkeypatch.setattr(kernels, "_need_cuda", lambda device: None)
    package = [candidate for candidate in kernels.CANDIDATES if candidate.open is kernels._open_fa3_package]
    kernel = on_cpu(candidates=(*package, GOOD))
    assert kernel.name == chosen
    assert kernel.refused == (() if chosen == "fa3" else ("fa3: has no backward: its output does not require gradients",))


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dimensions_from_16_to_128_run_by_flash_and_can_be_kept(head_dim, dtype):
    kernel = choose("auto", device=CPU, dtype=dtype, head_dim=head_dim)
    assert kernel.name == "flash" and kernel.can_be_kept and kernel.refused == ()


def test_a_refused_kernel_leaves_nothing_behind_and_what_it_warned_of_is_told():
    events = []

    def open_and_warn(device):
        events.append("opened")
        import warnings

        warnings.warn("Flash attention requires sm80", stacklevel=1)
        return Routes(broken)

    kernel = on_cpu(candidates=(Candidate("bad", open_and_warn, lambda: events.append("closed")), GOOD))
    assert events == ["opened", "closed"]
    assert "Flash attention requires sm80" in kernel.why


@pytest.mark.parametrize("name", ["fa3", "cudnn", "efficient"])
def test_a_kernel_asked_for_by_name_is_never_replaced_by_another(name):
    with pytest.raises(
        ValueError, match=f"'{name}' does not run on cpu in float32 with head dimension 16: .*needs a CUDA device"
    ):
        on_cpu(name)


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'flsh'; there are auto, fa3, cudnn, fa4, flash, efficient, math"):
        on_cpu("flsh")


def test_no_kernel_at_all_is_an_error_with_every_reason():
    with pytest.raises(ValueError, match="first: .*no backward.*second: .*compute capability"):
        on_cpu(candidates=(fake("first", forward_only), fake("second", broken)))


def test_auto_takes_flash_on_the_cpu_and_math_in_float64():
    assert on_cpu().name == on_cpu(dtype=torch.bfloat16).name == "flash"
    assert on_cpu(dtype=torch.float64).name == "math"


def test_every_kernel_in_an_order_of_preference_exists(monkeypatch):
    known = {candidate.name for candidate in attention.CANDIDATES}
    first = {}
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        order = attention.preference(torch.device("cuda"), torch.bfloat16)
        assert set(order) <= known and order[-1] == "math"
        first[capability] = order[:3]
    assert first[9, 0] == ("fa3", "cudnn", "fa4") and first[10, 0] == ("cudnn", "fa4", "flash")
    assert first[8, 0] == ("flash", "cudnn", "efficient")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert attention.preference(torch.device("cuda"), torch.bfloat16) == ("flash", "efficient", "math")


def test_choosing_moves_no_random_numbers():
    state = torch.get_rng_state()
    on_cpu()
    assert torch.equal(state, torch.get_rng_state())


def test_choosing_works_where_gradients_are_off():
    with torch.no_grad():
        assert on_cpu().name == "flash"


def test_auto_never_computes_more_than_8192_tokens_by_math():
    q, k, v = qkv(1, attention.MATH_LIMIT + 1, 1, 1, 16, torch.float64)
    kernel = on_cpu(dtype=torch.float64, candidates=(fake("bad", broken), *attention.CANDIDATES[-1:]))
    assert kernel.name == "math"
    with pytest.raises(ValueError, match="8193 tokens would fall to math.*bad: FA3 requires"):
        kernel(q, k, v)
    cut = torch.tensor([0, 4000, attention.MATH_LIMIT + 1], dtype=torch.int32)
    with torch.no_grad():
        assert kernel(q, k, v, cu_seqlens=cut).shape == q.shape


def test_the_kernel_without_a_choice_refuses_long_math_too(monkeypatch):
    monkeypatch.setattr(attention, "MATH_LIMIT", 8)
    seen = []
    monkeypatch.setattr(kernels, "sdpa_kernel", lambda backends: seen.append(backends) or torch.no_grad())
    for tokens in (8, 9):
        attention.TORCH_CHOICE(*qkv(1, tokens, 2, 1, 16))
    assert [SDPBackend.MATH in backends for backends in seen] == [True, False]


@pytest.mark.parametrize("name", ["flash", "math"])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_grouped_heads_equal_repeated_keys_and_values(name, head_dim):
    q, k, v = qkv(2, 50, 6, 2, head_dim)
    ours = on_cpu(name)(q, k, v)
    many = [tensor.repeat_interleave(3, dim=2).transpose(1, 2) for tensor in (k, v)]
    theirs = F.scaled_dot_product_attention(q.transpose(1, 2), *many, is_causal=True).transpose(1, 2)
    assert_close([ours, *gradients(ours, (q, k, v))], [theirs, *gradients(theirs, (q, k, v))])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "bounds",
    [[0, 30, 60], [0, 1, 7, 30, 37, 60], [0, 10, 20, 30, 31, 32, 33, 60], list(range(61))],
    ids=["rows only", "uneven", "equal neighbours", "one token each"],
)
def test_attention_within_documents_equals_attention_to_each_alone(bounds, causal):
    q, k, v = qkv(2, 30, 4, 2, 16)
    kernel = on_cpu()
    ours = kernel(q, k, v, causal=causal, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    alone = [
        kernel(*(tensor[None, start:stop] for tensor in flat), causal=causal)[0]
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    assert_close([ours], [torch.cat(alone).view_as(q)])
    # Gradients by the definition alone: where all documents are of one token q's and k's are zero, flash's a rounding off it.
    masked = attention.by_definition(q, k, v, causal=causal, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_close([ours, *gradients(ours, (q, k, v))], [masked, *gradients(masked, (q, k, v))])


@pytest.mark.parametrize("name, dtype", [("flash", torch.float32), ("math", torch.float32), ("math", torch.float64)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, [0, 30, 60], [0, 1, 7, 30, 37, 60], [0, 10, 20, 30, 31, 32, 33, 60]])
def test_forward_and_backward_on_their_own_equal_autograd_through_the_kernel(name, dtype, causal, bounds):
    q, k, v = qkv(2, 30, 6, 2, 16, dtype)
    kernel, upstream = on_cpu(name, dtype=dtype), torch.randn(2, 30, 6, 16, dtype=dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    theirs = kernel(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        out, lse, saved = kernel.forward_with_lse(q, k, v, causal, cu_seqlens)
        ours = kernel.backward(upstream, q, k, v, out.clone(), lse.clone(), saved, causal, cu_seqlens)
    assert lse.shape == (2, 6, 30) and lse.dtype == dtype
    assert_close([out, *ours], [theirs, *torch.autograd.grad(theirs, (q, k, v), upstream)], 1e-6)
    assert_close([lse], [attention._scores(q, k, causal, cu_seqlens).logsumexp(-1)], 1e-6)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_parts_of_the_keys_merge_by_their_log_sum_exp_to_attention_over_all(name):
    q, k, v = qkv(1, 24, 4, 2, 16)
    kernel = on_cpu(name)
    with torch.no_grad():
        parts = [kernel.forward_with_lse(q, k[:, rows], v[:, rows], False) for rows in (slice(0, 7), slice(7, 24))]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        merged = sum(out * (part_lse - lse).exp().transpose(1, 2)[..., None] for out, part_lse, _ in parts)
        assert_close([merged], [attention.by_definition(q, k, v, causal=False)], 1e-6)


def test_a_kernel_whose_halves_are_wrong_serves_attention_but_cannot_be_kept():
    good = on_cpu("math").routes
    off = Halves(lambda *a: (lambda out, lse, saved: (out, 1.1 * lse, saved))(*good.halves.forward(*a)), good.halves.backward)
    kernel = on_cpu(candidates=(fake("odd", good.dense, halves=off),))
    assert "cannot be kept across recomputation: log-sum-exp differs" in kernel.why
    assert not kernel.record["can_be_kept"]
    with pytest.raises(ValueError, match="'odd' has no forward and backward of their own: .*log-sum-exp differs"):
        kernel.forward_with_lse(*qkv(1, 8, 2, 2, 16))


def test_where_attention_is_to_be_kept_a_kernel_that_cannot_be_is_passed_over():
    keeping = Candidate("keeping", kernels._open_math)
    kernel = on_cpu(candidates=(GOOD, keeping), with_halves=True)
    assert kernel.name == "keeping" and kernel.can_be_kept
    assert kernel.refused == ("good: cannot be kept across recomputation: it offers no log-sum-exp",)
    with pytest.raises(ValueError, match="'good' does not run on cpu .*: good: cannot be kept across recomputation"):
        on_cpu("good", candidates=(GOOD, keeping), with_halves=True)


def test_the_choice_can_be_stored_in_a_run():
    kernel = on_cpu(candidates=(fake("bad", broken), GOOD))
    record = json.loads(json.dumps(kernel.record))
    assert record == {"name": "good", "why": kernel.why, "refused": list(kernel.refused), "can_be_kept": False}
    assert kernel.refused == ("bad: FA3 requires compute capability 9.0",)


@pytest.mark.parametrize("bounds", [[0, 30], [1, 60], [0, 40, 30, 60], [0, 30, 30, 60]])
def test_boundaries_that_do_not_cover_the_batch_are_refused(bounds):
    with pytest.raises(ValueError, match="from 0 to B \\* S = 60"):
        on_cpu()(*qkv(2, 30, 4, 2, 16), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def varlen_by_definition(calls):
    def varlen(q, k, v, causal, bounds, longest):
        calls.append((bounds.tolist(), longest))
        flat = (tensor[None] for tensor in (q, k, v))
        return attention.by_definition(*flat, causal=causal, cu_seqlens=bounds)[0]

    return varlen


def test_one_launch_for_all_documents_is_used_where_it_pays_and_only_if_it_is_right():
    calls, bounds = [], torch.tensor([0, 5, 30, 60], dtype=torch.int32)
    dense = attention.by_definition
    good = fake("good", lambda q, k, v, causal: dense(q, k, v, causal=causal), varlen=varlen_by_definition(calls))
    kernel = on_cpu(candidates=(good,))
    calls.clear()
    q, k, v = qkv(2, 30, 4, 2, 16)
    assert_close([kernel(q, k, v, cu_seqlens=bounds)], [dense(q, k, v, cu_seqlens=bounds)])
    assert calls == [([0, 5, 30, 60], 30)] and "one launch" in kernel.why

    crossing = lambda q, k, v, causal, bounds, longest: dense(q[None], k[None], v[None], causal=causal)[0]  # noqa: E731
    kernel = on_cpu(candidates=(fake("good", lambda q, k, v, causal: dense(q, k, v, causal=causal), varlen=crossing),))
    assert kernel.routes.varlen is None and "one by one, since in one launch: output differs" in kernel.why
    assert_close([kernel(q, k, v, cu_seqlens=bounds)], [dense(q, k, v, cu_seqlens=bounds)])


def test_a_slower_launch_for_all_documents_serves_short_ones_only(monkeypatch):
    calls = []
    routes = Routes(kernels.sdpa(SDPBackend.FLASH_ATTENTION), varlen_by_definition(calls), varlen_is_as_fast=False)
    kernel = attention.Kernel("mixed", "", routes)
    monkeypatch.setattr(attention, "SHORT_DOCUMENT", 16)
    for bounds in ([0, 30, 60], [0, 10, 20, 30, 60]):
        kernel(*qkv(2, 30, 4, 2, 16), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert [bounds for bounds, _ in calls] == [[0, 10, 20, 30, 60]]


def test_a_document_of_one_token_never_reaches_a_kernel_that_cannot_take_it(monkeypatch):
    def dense(q, k, v, causal):
        if k.shape[1] == 1:
            raise RuntimeError("No available kernel")  # cuDNN, by torch's check of shapes
        return attention.by_definition(q, k, v, causal=causal)

    candidate = fake("like cuDNN", dense, varlen=varlen_by_definition([]), varlen_is_as_fast=False)
    kernel = on_cpu(candidates=(candidate,))
    monkeypatch.setattr(attention, "SHORT_DOCUMENT", 16)
    q, k, v = qkv(2, 60, 4, 2, 16)
    bounds = torch.tensor([0, 59, 60, 61, 120], dtype=torch.int32)
    ours, theirs = (attend(q, k, v, cu_seqlens=bounds) for attend in (kernel, attention.by_definition))
    assert_close([ours, *gradients(ours, (q, k, v))], [theirs, *gradients(theirs, (q, k, v))])


def test_a_kernel_that_cannot_take_documents_one_by_one_is_passed_over_where_they_go_so():
    def dense(q, k, v, causal):
        if k.shape[1] % 64:
            raise RuntimeError("not a multiple of 64")
        return attention.by_definition(q, k, v, causal=causal)

    for slower in ({}, {"varlen": varlen_by_definition([]), "varlen_is_as_fast": False}):
        kernel = on_cpu(candidates=(fake("bad", dense, **slower), GOOD))
        assert kernel.refused == ("bad: not a multiple of 64",)
    assert on_cpu(candidates=(fake("varlen", dense, varlen=varlen_by_definition([])), GOOD)).name == "varlen"


@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this torch has one flash only")
@pytest.mark.parametrize("open_next", [kernels._open_flash, kernels._open_cudnn])
def test_what_is_called_flash_is_torchs_own_though_fa3_was_chosen_before(monkeypatch, open_next):
    from torch.nn.attention import _registry

    removed = []
    handle = types.SimpleNamespace(remove=lambda: removed.append("FA3"))
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: handle)
    monkeypatch.setattr(kernels, "_need_cuda", lambda device: None)
    assert on_cpu("fa3").refused == () and torch.nn.attention.current_flash_attention_impl() == "FA3"
    open_next(CPU)
    assert removed == ["FA3"] and torch.nn.attention.current_flash_attention_impl() is None
    open_next(CPU)
    assert removed == ["FA3"]


def test_importing_attention_chooses_nothing(monkeypatch):
    import importlib

    def refuse(*arguments, **options):
        raise AssertionError("asked the device on import")

    for name in ("is_available", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.delitem(sys.modules, "torchtitan_bio.attention")
    importlib.import_module("torchtitan_bio.attention")
    assert "flash_attn_interface" not in sys.modules
