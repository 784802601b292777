"""The attention kernels that can be chosen: how each is opened, what it computes, and its two halves outside autograd.

Nothing here decides; attention.py probes these and takes one.

Letters: B batch, S tokens of a row, D head dimension, T = B * S tokens, Hq and Hkv heads of queries and of keys and values.
"""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Halves:
    """Forward and backward as two functions outside autograd, for who keeps or merges what lies between them."""

    forward: Callable
    """(q, k, v, causal) -> (out, lse, saved): the log-sum-exp of each query's scores in fp32 or double, a tuple for backward"""
    backward: Callable
    """(grad_out, q, k, v, out, lse, saved, causal) -> (dq, dk, dv)"""


@dataclass(frozen=True)
class Routes:
    """What one implementation offers."""

    dense: Callable
    """(q (B, S, Hq, D), k and v (B, S, Hkv, D), causal) -> (B, S, Hq, D)"""
    varlen: Callable | None = None
    """(q (T, Hq, D), k and v (T, Hkv, D), causal, bounds on the device, longest document) -> (T, Hq, D)"""
    varlen_is_as_fast: bool = True
    """Whether varlen computes as fast as dense does, so that it serves long documents too."""
    halves: Halves | None = None
    """In dense's shapes, lse (B, Hq, S). Without causal, k and v may be longer or shorter than q."""
    varlen_halves: Halves | None = None
    """In varlen's shapes, lse (Hq, T), with (bounds, longest document) as last arguments of both."""


@dataclass(frozen=True)
class Candidate:
    name: str
    open: Callable[[torch.device], Routes]
    """Loads the implementation; raises, with the reason, where it cannot run."""
    close: Callable[[], None] = lambda: None
    """Undoes what open did to the process."""


def sdpa(*backends: SDPBackend, repeat_heads: bool = False):
    """torch's scaled_dot_product_attention held to these backends, as a dense route."""

    def dense(q, k, v, causal):
        if repeat_heads and q.shape[2] != k.shape[2]:
            k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
        is_grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=is_grouped).transpose(1, 2)

    return dense


def _heads_first(forward: Callable, backward: Callable, repeat_heads: bool = False) -> Halves:
    """Halves from functions of tensors (B, H, S, D), which is how torch's operators take them."""

    def turned(q, k, v):
        if repeat_heads:
            k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward_half(q, k, v, causal):
        out, lse, saved = forward(*turned(q, k, v), causal)
        return out.transpose(1, 2), lse, saved

    def backward_half(grad_out, q, k, v, out, lse, saved, causal):
        grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
        gradients = [gradient.transpose(1, 2) for gradient in backward(grad_out, *turned(q, k, v), out, lse, saved, causal)]
        if repeat_heads:
            gradients[1:] = [each.unflatten(2, (k.shape[2], -1)).sum(3) for each in gradients[1:]]
        return tuple(gradients)

    return Halves(forward_half, backward_half)


def _flash_cpu_forward(q, k, v, causal):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse, ()


def _flash_cpu_backward(grad_out, q, k, v, out, lse, saved, causal):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, causal)


def _flash_forward(q, k, v, causal):
    out, lse, *saved, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, lse, tuple(saved)


def _flash_backward(grad_out, q, k, v, out, lse, saved, causal):
    *layout, seed, offset = saved
    operator = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return operator(grad_out, q, k, v, out, lse, *layout, 0.0, causal, seed, offset)


def _cudnn_forward(q, k, v, causal):
    out, lse, *saved, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    return out, lse.view(out.shape[:3]), (lse.shape, *saved)


def _cudnn_backward(grad_out, q, k, v, out, lse, saved, causal):
    shape, *layout, seed, offset = saved
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return operator(grad_out, q, k, v, out, lse.view(shape), seed, offset, None, *layout, 0.0, causal)


def _efficient_forward(q, k, v, causal):
    out, lse, *saved = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out, lse[:, :, : q.shape[2]], tuple(saved)


def _efficient_backward(grad_out, q, k, v, out, lse, saved, causal):
    # The kernel reads whole blocks of 32 queries; to those past the end nothing must flow.
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    return operator(grad_out, q, k, v, None, out, lse, *saved, 0.0, [True, True, True, False], causal)[:3]


FLASH_ON_CPU = (_flash_cpu_forward, _flash_cpu_backward)
FLASH = (_flash_forward, _flash_backward)
CUDNN = (_cudnn_forward, _cudnn_backward)
EFFICIENT = (_efficient_forward, _efficient_backward)


def _varlen_halves(device: torch.device) -> Halves | None:
    if device.type != "cuda":
        return None

    def forward(q, k, v, causal, bounds, longest):
        operator = torch.ops.aten._flash_attention_forward
        out, lse, *saved, _ = operator(q, k, v, bounds, bounds, longest, longest, 0.0, causal, False)
        if lse.shape != (q.shape[1], len(q)):
            raise RuntimeError(f"log-sum-exp of shape {tuple(lse.shape)}, not (heads, tokens) = {(q.shape[1], len(q))}")
        return out, lse, tuple(saved)

    def backward(grad_out, q, k, v, out, lse, saved, causal, bounds, longest):
        operator = torch.ops.aten._flash_attention_backward
        return operator(grad_out, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, causal, *saved)

    return Halves(forward, backward)


def _math_scores(q, k, causal):
    """(B, Hkv, G, Sq, Sk) scaled scores in fp32 or better; G query heads read the same key head."""
    q = q.unflatten(2, (k.shape[2], -1)) / math.sqrt(q.shape[-1])
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(later, -math.inf)
    return scores


def _wide(*tensors):
    return [tensor.double() if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def _math_forward(q, k, v, causal):
    wide_q, wide_k, wide_v = _wide(q, k, v)
    scores = _math_scores(wide_q, wide_k, causal)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", (scores - lse[..., None]).exp_(), wide_v)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2), ()


def _math_backward(grad_out, q, k, v, out, lse, saved, causal):
    wide_q, wide_k, wide_v, grad, wide_out = _wide(q, k, v, grad_out, out)
    grad, groups = grad.unflatten(2, (k.shape[2], -1)), q.shape[2] // k.shape[2]
    weights = (_math_scores(wide_q, wide_k, causal) - lse.unflatten(1, (-1, groups))[..., None]).exp_()
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, grad)
    mean = (grad * wide_out.unflatten(2, (k.shape[2], -1))).sum(-1).permute(0, 2, 3, 1)
    d_scores = weights * (torch.einsum("bqhgd,bkhd->bhgqk", grad, wide_v) - mean[..., None]) / math.sqrt(q.shape[-1])
    dq = torch.einsum("bhgqk,bkhd->bqhgd", d_scores, wide_k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", d_scores, wide_q.unflatten(2, (k.shape[2], -1)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _need_cuda(device: torch.device):
    if device.type != "cuda":
        raise ValueError(f"needs a CUDA device, not {device.type}")


def _torch_varlen(device: torch.device):
    """torch's variable-length kernel as a route; None where this torch or device has none."""
    if device.type != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters

    def varlen(q, k, v, causal, bounds, longest):
        options = {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)

    return varlen


def _in_torch(implementation: str) -> tuple[Callable, Callable]:
    """(open, close) of a FlashAttention that runs behind torch's own operators: they compile, and have halves."""

    def open(device: torch.device) -> Routes:
        _need_cuda(device)
        activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
        if activate is None:
            raise ValueError(f"torch {torch.__version__} has no activate_flash_attention_impl")
        activate(implementation)
        return _flash_routes(device)

    def close():
        if _active_flash() == implementation:
            restore_flash()

    return open, close


def _active_flash() -> str | None:
    """The implementation that stands in for torch's own flash; None for torch's own, and where torch knows no other."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


def restore_flash():
    """Torch's own flash again: one that was chosen stays behind torch's operators for the whole process."""
    if _active_flash() is not None:
        torch.nn.attention.restore_flash_attention_impl()


def _open_fa3_package(device: torch.device) -> Routes:
    """FlashAttention-3 through its own Python functions, for builds that torch's registration does not fit."""
    _need_cuda(device)
    package = importlib.import_module("flash_attn_interface")

    def first(result):
        return result[0] if isinstance(result, tuple) else result  # older builds return (output, log-sum-exp)

    @torch.compiler.disable
    def dense(q, k, v, causal):
        return first(package.flash_attn_func(q, k, v, causal=causal))

    def varlen(q, k, v, causal, bounds, longest):
        return first(package.flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=causal))

    return Routes(dense, varlen if hasattr(package, "flash_attn_varlen_func") else None)


def _open_cudnn(device: torch.device) -> Routes:
    _need_cuda(device)
    restore_flash()  # its variable-length kernel is torch's flash, and so are that one's halves
    return Routes(sdpa(SDPBackend.CUDNN_ATTENTION), _torch_varlen(device), False, _heads_first(*CUDNN), _varlen_halves(device))


def _open_flash(device: torch.device) -> Routes:
    restore_flash()
    return _flash_routes(device)


def _flash_routes(device: torch.device) -> Routes:
    halves = _heads_first(*(FLASH_ON_CPU if device.type == "cpu" else FLASH))
    return Routes(sdpa(SDPBackend.FLASH_ATTENTION), _torch_varlen(device), halves=halves, varlen_halves=_varlen_halves(device))


def _open_efficient(device: torch.device) -> Routes:
    _need_cuda(device)
    # The one backend that knows no grouped heads.
    return Routes(sdpa(SDPBackend.EFFICIENT_ATTENTION, repeat_heads=True), halves=_heads_first(*EFFICIENT, repeat_heads=True))


def _open_math(device: torch.device) -> Routes:
    return Routes(sdpa(SDPBackend.MATH), halves=Halves(_math_forward, _math_backward))


CANDIDATES = (
    Candidate("fa3", *_in_torch("FA3")),
    Candidate("fa3", _open_fa3_package),
    Candidate("cudnn", _open_cudnn),
    Candidate("fa4", *_in_torch("FA4")),
    Candidate("flash", _open_flash),
    Candidate("efficient", _open_efficient),
    Candidate("math", _open_math),
)
