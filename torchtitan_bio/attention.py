"""attend(q, k, v, causal, cu_seqlens): exact attention by the fastest kernel that this device demonstrably runs.

`choose` decides at run time, never on import. A kernel is trusted after a small real forward and backward that agree with the
definition: wheels exist that import well and have no backward, and torch's own order on Hopper puts the slowest kernel first.

Letters: B batch, S tokens of a row, D head dimension, T = B * S tokens, Hq and Hkv heads of queries and of keys and values.
"""

import importlib
import importlib.util
import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MATH_LIMIT = 8192
"""Tokens up to which "auto" may fall back on math, whose scores are S x S a head: over 1 TB a layer at 131,072 tokens."""

SHORT_DOCUMENT = 4096
"""Mean tokens a document below which one launch of a slower variable-length kernel is preferred to one launch a document."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest error over the largest value: a few roundings of the type (TF32's for fp32). A wrong mask or head errs by > 0.1."""


@dataclass(frozen=True)
class Routes:
    """What one implementation offers."""

    dense: Callable
    """(q (B, S, Hq, D), k and v (B, S, Hkv, D), causal) -> (B, S, Hq, D)"""
    varlen: Callable | None = None
    """(q (T, Hq, D), k and v (T, Hkv, D), causal, bounds on the device, longest document) -> (T, Hq, D)"""
    varlen_is_as_fast: bool = True
    """Whether varlen computes as fast as dense does, so that it serves long documents too."""


@dataclass(frozen=True)
class Candidate:
    name: str
    open: Callable[[torch.device], Routes]
    """Loads the implementation; raises, with the reason, where it cannot run."""
    close: Callable[[], None] = lambda: None
    """Undoes what open did to the process."""


@dataclass(frozen=True)
class Kernel:
    """A chosen implementation; call it as attend."""

    name: str
    why: str
    routes: Routes

    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """q (B, S, Hq, D), k and v (B, S, Hkv, D) -> (B, S, Hq, D); query head h reads key head h // (Hq // Hkv).

        cu_seqlens: CPU tensor of the document boundaries in the flattened B * S tokens, from 0 to B * S, with every multiple of
        S among them. It stays on the CPU, so that reading it costs no wait for the device.
        """
        if cu_seqlens is None:
            return self.routes.dense(q, k, v, causal)
        return _attend_within_documents(self.routes, q, k, v, causal, cu_seqlens)


# Documents differ from batch to batch. Traced, their boundaries would become constants and every batch compile anew.
@torch.compiler.disable
def _attend_within_documents(routes: Routes, q, k, v, causal, cu_seqlens):
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    num_tokens = q.shape[0] * q.shape[1]
    if cu_seqlens.device.type != "cpu" or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens must rise from 0 to B * S = {num_tokens} on the CPU, not from {bounds[0]} to {bounds[-1]} "
            f"with a smallest step of {min(lengths)} on {cu_seqlens.device}"
        )
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    is_short = num_tokens < SHORT_DOCUMENT * len(lengths)
    if routes.varlen and (routes.varlen_is_as_fast or is_short):
        on_device = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
        return routes.varlen(*flat, causal, on_device, max(lengths)).view_as(q)
    outputs, start = [], 0
    for length, neighbours in itertools.groupby(lengths):
        stop = start + length * sum(1 for _ in neighbours)
        together = [tensor[start:stop].unflatten(0, (-1, length)) for tensor in flat]
        outputs.append(routes.dense(*together, causal).flatten(0, 1))
        start = stop
    return torch.cat(outputs).view_as(q)


def choose(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    candidates: tuple[Candidate, ...] | None = None,
) -> Kernel:
    """The first candidate for `name`, or for this device when name is "auto", whose forward and backward are right.

    ValueError, with every candidate's reason, when none is: a named kernel is never replaced by another.
    """
    device = torch.device(device)
    if candidates is None:
        names = preference(device, dtype) if name == "auto" else (name,)
        candidates = tuple(candidate for wanted in names for candidate in CANDIDATES if candidate.name == wanted)
        known = dict.fromkeys(candidate.name for candidate in CANDIDATES)
    else:
        known = dict.fromkeys(candidate.name for candidate in candidates)
        candidates = tuple(candidate for candidate in candidates if name in ("auto", candidate.name))
    if not candidates:
        raise ValueError(f"no attention kernel is called {name!r}; there are auto, {', '.join(known)}")
    refusals = []
    for candidate in candidates:
        try:
            routes, note = _open_and_probe(candidate, device, dtype, head_dim)
        except Exception as error:  # a kernel may fail in any way; each is a reason not to take it
            candidate.close()
            refusals.append(f"{candidate.name}: {_one_line(error)}")
            continue
        if name == "auto" and candidate.name == "math":
            routes = replace(routes, dense=_refuse_long(routes.dense, refusals))
        why = f"the first that runs on {_describe(device)}" if name == "auto" else f"asked for, runs on {_describe(device)}"
        return Kernel(candidate.name, "; ".join([why, note, *(f"not {reason}" for reason in refusals)]), routes)
    wanted = "no attention kernel runs" if name == "auto" else f"the attention kernel {name!r} does not run"
    kind = f"{str(dtype).removeprefix('torch.')} with head dimension {head_dim}"
    raise ValueError(f"{wanted} on {_describe(device)} in {kind}: {'; '.join(refusals)}")


def preference(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Kernels in the order in which "auto" tries them."""
    if device.type == "cpu":
        return ("math",) if dtype == torch.float64 else ("flash", "math")
    if device.type != "cuda":
        return ("math",)
    if torch.version.hip:
        return ("flash", "efficient", "math")
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9:
        return ("fa3", "cudnn", "flash", "efficient", "math")
    if major == 10:
        return ("cudnn", "flash", "efficient", "math")
    return ("flash", "cudnn", "efficient", "math")


# ---- What can be chosen


def _sdpa(*backends: SDPBackend, repeat_heads: bool = False):
    """torch's scaled_dot_product_attention held to these backends, as a dense route."""

    def dense(q, k, v, causal):
        if repeat_heads and q.shape[2] != k.shape[2]:
            k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
        is_grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=is_grouped).transpose(1, 2)

    return dense


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


def _open_fa3_in_torch(device: torch.device) -> Routes:
    """FlashAttention-3 behind torch's own operators: they compile, and recomputation policies know them."""
    _need_cuda(device)
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError(f"torch {torch.__version__} has no activate_flash_attention_impl")
    activate("FA3")
    return Routes(_sdpa(SDPBackend.FLASH_ATTENTION), _torch_varlen(device))


def _close_fa3_in_torch():
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    if current() == "FA3":
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
    return Routes(_sdpa(SDPBackend.CUDNN_ATTENTION), _torch_varlen(device), varlen_is_as_fast=False)


def _open_flash(device: torch.device) -> Routes:
    return Routes(_sdpa(SDPBackend.FLASH_ATTENTION), _torch_varlen(device))


def _open_efficient(device: torch.device) -> Routes:
    _need_cuda(device)
    # The one backend that knows no grouped heads.
    return Routes(_sdpa(SDPBackend.EFFICIENT_ATTENTION, repeat_heads=True))


def _open_math(device: torch.device) -> Routes:
    return Routes(_sdpa(SDPBackend.MATH))


CANDIDATES = (
    Candidate("fa3", _open_fa3_in_torch, _close_fa3_in_torch),
    Candidate("fa3", _open_fa3_package),
    Candidate("cudnn", _open_cudnn),
    Candidate("flash", _open_flash),
    Candidate("efficient", _open_efficient),
    Candidate("math", _open_math),
)


def _refuse_long(dense, refusals: list[str]):
    def short_only(q, k, v, causal):
        if q.shape[1] > MATH_LIMIT:
            raise ValueError(
                f"attention over {q.shape[1]} tokens would fall to math, which keeps all pairs of tokens in memory; above "
                f"{MATH_LIMIT} tokens ask for it by name, or mend what keeps the others from running: {'; '.join(refusals)}"
            )
        return dense(q, k, v, causal)

    return short_only


def _torch_choice(q, k, v, causal):
    fused = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return _sdpa(*fused, *([SDPBackend.MATH] if q.shape[1] <= MATH_LIMIT else []))(q, k, v, causal)


TORCH_CHOICE = Kernel("torch", "torch's own choice, not probed", Routes(_torch_choice))
"""For a model that is built without a kernel: small ones, tests, shapes on meta."""


# ---- The probe


def _open_and_probe(candidate: Candidate, device, dtype, head_dim: int) -> tuple[Routes, str]:
    """The candidate's routes after a run forward and backward, and how they treat documents.

    torch says why a backend is not viable in warnings only, so they become part of the error.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            routes = candidate.open(device)
            _probe(routes, device, dtype, head_dim, None)
        except Exception as error:
            raise RuntimeError(" ".join([_one_line(error), *(_one_line(warning.message) for warning in said)])) from error
        note = "documents one by one"
        if routes.varlen:
            bounds = torch.tensor([0, 1, 130, 192, 384], dtype=torch.int32)
            try:
                _probe(replace(routes, varlen_is_as_fast=True), device, dtype, head_dim, bounds)
                note = (
                    "documents in one launch"
                    if routes.varlen_is_as_fast
                    else "short documents in one launch, long ones one by one"
                )
            except Exception as error:
                routes, note = replace(routes, varlen=None), f"documents one by one, since in one launch: {_one_line(error)}"
    return routes, note


def _probe(routes: Routes, device, dtype, head_dim: int, cu_seqlens):
    """Raise unless output and gradients of grouped, causal attention are within TOLERANCE of the definition."""
    generator = torch.Generator().manual_seed(0)  # its own: a probe must not move the run's random numbers
    shapes = [(2, 192, heads, head_dim) for heads in (4, 2, 2, 4)]
    q, k, v, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    with torch.enable_grad():
        ours = [tensor.to(device).requires_grad_() for tensor in (q, k, v)]
        output = Kernel("probe", "", routes)(*ours, cu_seqlens=cu_seqlens)
        if output.shape != q.shape:
            raise RuntimeError(f"returned shape {tuple(output.shape)}, not {tuple(q.shape)}")
        if output.grad_fn is None:
            raise RuntimeError("has no backward: its output does not require gradients")
        gradients = torch.autograd.grad(output, ours, upstream.to(device))
        exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
        truth = by_definition(*exact, cu_seqlens=cu_seqlens)
        true_gradients = torch.autograd.grad(truth, exact, upstream.double())
    for what, mine, true in zip(
        ("output", "gradient of q", "gradient of k", "gradient of v"),
        (output, *gradients),
        (truth, *true_gradients),
        strict=True,
    ):
        error = ((mine.detach().cpu().double() - true).abs().max() / true.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{what} differs from the definition by {error:.2g}, more than {TOLERANCE[dtype]:.2g} of its largest value"
            )


def by_definition(q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
    """softmax(q k / sqrt(D)) v with every score in memory: what the kernels are compared with."""
    batch, tokens, heads, head_dim = q.shape
    k, v = (tensor.repeat_interleave(heads // k.shape[2], dim=2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    position = torch.arange(batch * tokens).view(batch, tokens)
    document = position // tokens if cu_seqlens is None else torch.bucketize(position, cu_seqlens, right=True)
    allowed = document[:, :, None] == document[:, None, :]
    if causal:
        allowed = allowed & (position[:, :, None] >= position[:, None, :])
    weights = scores.masked_fill(~allowed[:, None].to(q.device), -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return name if torch.version.hip else f"{name} (sm_{capability[0]}{capability[1]})"


def _one_line(problem) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 300 else text[:297] + "..."
