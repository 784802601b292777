"""attend(q, k, v, causal, cu_seqlens): exact attention by the fastest kernel that this device demonstrably runs.

`choose` decides at run time, never on import. A kernel is trusted after a small real forward and backward that agree with the
definition: wheels exist that import well and have no backward, and torch's own order on Hopper puts the slowest kernel first.

Letters: B batch, S tokens of a row, D head dimension, T = B * S tokens, Hq and Hkv heads of queries and of keys and values.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend

from torchtitan_bio.kernels import CANDIDATES, Candidate, Halves, Routes, sdpa

MATH_LIMIT = 8192
"""Tokens up to which "auto" may fall back on math, whose scores are S x S a head: over 1 TB a layer at 131,072 tokens."""

SHORT_DOCUMENT = 4096
"""Mean tokens a document below which one launch of a slower variable-length kernel is preferred to one launch a document."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest error over the largest value: a few roundings of the type (TF32's for fp32). A wrong mask or head errs by > 0.1."""


@dataclass(frozen=True)
class Kernel:
    """A chosen implementation; call it as attend."""

    name: str
    why: str
    routes: Routes
    refused: tuple[str, ...] = ()
    """Each candidate before it that did not run, with the reason."""

    @property
    def can_be_kept(self) -> bool:
        """Whether there are forward_with_lse and backward."""
        return self.routes.halves is not None

    @property
    def record(self) -> dict:
        """The choice in plain data, to be stored with a run."""
        return {"name": self.name, "why": self.why, "refused": list(self.refused), "can_be_kept": self.can_be_kept}

    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """q (B, S, Hq, D), k and v (B, S, Hkv, D) -> (B, S, Hq, D); query head h reads key head h // (Hq // Hkv).

        cu_seqlens: CPU tensor of the document boundaries in the flattened B * S tokens, from 0 to B * S, with every multiple of
        S among them. It stays on the CPU, so that reading it costs no wait for the device.
        """
        if cu_seqlens is None:
            return self.routes.dense(q, k, v, causal)
        return _attend_within_documents(self.routes, q, k, v, causal, cu_seqlens)

    def forward_with_lse(self, q, k, v, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """(out, lse (B, Hq, S) in fp32, saved): attention without autograd. Give all three to backward, with the same inputs.

        saved is a tuple of tensors and numbers whose meaning is the kernel's own; it is small beside out and lse.
        """
        if cu_seqlens is None:
            return self._halves.forward(q, k, v, causal)
        return _forward_within_documents(self.routes, self._halves, q, k, v, causal, cu_seqlens)

    def backward(self, grad_out, q, k, v, out, lse, saved, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """(dq, dk, dv) from what forward_with_lse returned; out and lse may be copies."""
        if cu_seqlens is None:
            return self._halves.backward(grad_out, q, k, v, out, lse, saved, causal)
        return _backward_within_documents(self.routes, self._halves, grad_out, q, k, v, out, lse, saved, causal, cu_seqlens)

    @property
    def _halves(self) -> Halves:
        if self.routes.halves is None:
            raise ValueError(f"the attention kernel {self.name!r} has no forward and backward of their own: {self.why}")
        return self.routes.halves


# Documents differ from batch to batch. Traced, their boundaries would become constants and every batch compile anew.
@torch.compiler.disable
def _attend_within_documents(routes: Routes, q, k, v, causal, cu_seqlens):
    lengths = _document_lengths(q, cu_seqlens)
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    if routes.varlen and _in_one_launch(routes, lengths):
        on_device = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
        return routes.varlen(*flat, causal, on_device, max(lengths)).view_as(q)
    outputs = []
    for rows, length in _equal_neighbours(lengths):
        together = [tensor[rows].unflatten(0, (-1, length)) for tensor in flat]
        outputs.append((_of_one_token(*together) if length == 1 else routes.dense(*together, causal)).flatten(0, 1))
    return torch.cat(outputs).view_as(q)


def _of_one_token(q, k, v):
    """Attention to a document's only token, which torch refuses to give to cuDNN: its v. q and k get gradients of zero."""
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
    return v + 0 * (q + k)


def _forward_within_documents(routes: Routes, halves: Halves, q, k, v, causal, cu_seqlens):
    lengths = _document_lengths(q, cu_seqlens)
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    if routes.varlen_halves and _in_one_launch(routes, lengths):
        on_device = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
        out, lse, saved = routes.varlen_halves.forward(*flat, causal, on_device, max(lengths))
        return out.view_as(q), lse.unflatten(1, q.shape[:2]).transpose(0, 1), (on_device, *saved)
    out, saved = torch.empty_like(flat[0]), []
    lse = torch.empty(q.shape[2], len(out), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows, length in _equal_neighbours(lengths):
        part, part_lse, part_saved = halves.forward(*(tensor[rows].unflatten(0, (-1, length)) for tensor in flat), causal)
        out[rows], lse[:, rows] = part.flatten(0, 1), part_lse.transpose(0, 1).flatten(1)
        saved.append(part_saved)
    return out.view_as(q), lse.unflatten(1, q.shape[:2]).transpose(0, 1), tuple(saved)


def _backward_within_documents(routes: Routes, halves: Halves, grad_out, q, k, v, out, lse, saved, causal, cu_seqlens):
    lengths = _document_lengths(q, cu_seqlens)
    flat = [tensor.flatten(0, 1) for tensor in (grad_out, q, k, v, out)]
    lse = lse.transpose(0, 1).flatten(1)
    if routes.varlen_halves and _in_one_launch(routes, lengths):
        on_device, *saved = saved
        gradients = routes.varlen_halves.backward(*flat, lse, tuple(saved), causal, on_device, max(lengths))
    else:
        gradients = [torch.empty_like(tensor) for tensor in flat[1:4]]
        for (rows, length), part_saved in zip(_equal_neighbours(lengths), saved, strict=True):
            parts = [tensor[rows].unflatten(0, (-1, length)) for tensor in flat]
            part_lse = lse[:, rows].unflatten(1, (-1, length)).transpose(0, 1).contiguous()
            for whole, part in zip(gradients, halves.backward(*parts, part_lse, part_saved, causal), strict=True):
                whole[rows] = part.flatten(0, 1)
    return tuple(gradient.view_as(tensor) for gradient, tensor in zip(gradients, (q, k, v), strict=True))


def _document_lengths(q, cu_seqlens: torch.Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    num_tokens = q.shape[0] * q.shape[1]
    if cu_seqlens.device.type != "cpu" or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens must rise from 0 to B * S = {num_tokens} on the CPU, not from {bounds[0]} to {bounds[-1]} "
            f"with a smallest step of {min(lengths)} on {cu_seqlens.device}"
        )
    return lengths


def _in_one_launch(routes: Routes, lengths: list[int]) -> bool:
    """Whether the variable-length kernel is the faster one for these documents."""
    return routes.varlen_is_as_fast or sum(lengths) < SHORT_DOCUMENT * len(lengths)


def _equal_neighbours(lengths: list[int]):
    """(their rows in the flattened tokens, length) of each run of equally long documents, which one call can take."""
    start = 0
    for length, neighbours in itertools.groupby(lengths):
        stop = start + length * sum(1 for _ in neighbours)
        yield slice(start, stop), length
        start = stop


def choose(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    with_halves: bool = False,
    candidates: tuple[Candidate, ...] | None = None,
) -> Kernel:
    """The first candidate for `name`, or for this device when name is "auto", whose forward and backward are right.

    with_halves asks for forward_with_lse and backward too, without which attention cannot be kept and the ring cannot merge.
    ValueError, with every candidate's reason, when none is right: a named kernel is never replaced by another.
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
            routes, notes = _open_and_probe(candidate, device, dtype, head_dim)
            if with_halves and routes.halves is None:
                raise ValueError(notes[-1])
        except Exception as error:  # a kernel may fail in any way; each is a reason not to take it
            candidate.close()
            refusals.append(f"{candidate.name}: {_one_line(error)}")
            continue
        if name == "auto" and candidate.name == "math":
            short_only = (
                replace(routes.halves, forward=_refuse_long(routes.halves.forward, refusals)) if routes.halves else None
            )
            routes = replace(routes, dense=_refuse_long(routes.dense, refusals), halves=short_only)
        why = f"the first that runs on {_describe(device)}" if name == "auto" else f"asked for, runs on {_describe(device)}"
        why = "; ".join([why, *notes, *(f"not {reason}" for reason in refusals)])
        return Kernel(candidate.name, why, routes, tuple(refusals))
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
        return ("fa3", "cudnn", "fa4", "flash", "efficient", "math")
    if major == 10:
        return ("cudnn", "fa4", "flash", "efficient", "math")
    return ("flash", "cudnn", "efficient", "math")


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
    return sdpa(*fused, *([SDPBackend.MATH] if q.shape[1] <= MATH_LIMIT else []))(q, k, v, causal)


TORCH_CHOICE = Kernel("torch", "torch's own choice, not probed", Routes(_torch_choice))
"""For a model that is built without a kernel: small ones, tests, shapes on meta."""


# ---- The probe


def _open_and_probe(candidate: Candidate, device, dtype, head_dim: int) -> tuple[Routes, list[str]]:
    """The candidate's routes after a run forward and backward, and how they treat documents and recomputation.

    torch says why a backend is not viable in warnings only, so they become part of the error.
    """
    bounds = torch.tensor([0, 1, 130, 192, 384], dtype=torch.int32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            routes = candidate.open(device)
            goes_one_by_one = not (routes.varlen and routes.varlen_is_as_fast)
            for boundaries in (None, bounds) if goes_one_by_one else (None,):
                _probe(_by_autograd(replace(routes, varlen=None)), device, dtype, head_dim, boundaries)
        except Exception as error:
            raise RuntimeError(" ".join([_one_line(error), *(_one_line(warning.message) for warning in said)])) from error
        notes = ["documents one by one"]
        if routes.varlen:
            try:
                _probe(_by_autograd(replace(routes, varlen_is_as_fast=True)), device, dtype, head_dim, bounds)
                in_one = "documents in one launch"
                notes = [in_one if routes.varlen_is_as_fast else f"short {in_one}, long ones one by one"]
            except Exception as error:
                routes, notes = replace(routes, varlen=None), [f"documents one by one, since in one launch: {_one_line(error)}"]
        if routes.varlen_halves:
            try:
                _probe(_by_halves(replace(routes, varlen_is_as_fast=True)), device, dtype, head_dim, bounds)
            except Exception as error:
                routes = replace(routes, varlen_halves=None)
                notes.append(f"kept attention takes documents one by one, since in one launch: {_one_line(error)}")
        if routes.halves:
            try:
                for boundaries in (None, bounds):
                    _probe(_by_halves(replace(routes, varlen_halves=None)), device, dtype, head_dim, boundaries)
            except Exception as error:
                routes = replace(routes, halves=None, varlen_halves=None)
                notes.append(f"cannot be kept across recomputation: {_one_line(error)}")
        else:
            routes = replace(routes, varlen_halves=None)
            notes.append("cannot be kept across recomputation: it offers no log-sum-exp")
    return routes, notes


def _by_autograd(routes: Routes) -> Callable:
    def run(q, k, v, upstream, cu_seqlens):
        tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
        output = Kernel("probe", "", routes)(*tensors, cu_seqlens=cu_seqlens)
        if output.shape != q.shape:
            raise RuntimeError(f"returned shape {tuple(output.shape)}, not {tuple(q.shape)}")
        if output.grad_fn is None:
            raise RuntimeError("has no backward: its output does not require gradients")
        return {"output": output.detach()} | _named_gradients(torch.autograd.grad(output, tensors, upstream))

    return run


def _by_halves(routes: Routes) -> Callable:
    def run(q, k, v, upstream, cu_seqlens):
        kernel = Kernel("probe", "", routes)
        out, lse, saved = kernel.forward_with_lse(q, k, v, cu_seqlens=cu_seqlens)
        gradients = kernel.backward(upstream, q, k, v, out.clone(), lse.clone(), saved, cu_seqlens=cu_seqlens)
        return {"output": out, "log-sum-exp": lse} | _named_gradients(gradients)

    return run


def _named_gradients(gradients) -> dict[str, torch.Tensor]:
    return {f"gradient of {name}": gradient for name, gradient in zip("qkv", gradients, strict=True)}


def _probe(run: Callable, device, dtype, head_dim: int, cu_seqlens):
    """Raise unless output and gradients of grouped, causal attention are within TOLERANCE of the definition."""
    generator = torch.Generator().manual_seed(0)  # its own: a probe must not move the run's random numbers
    shapes = [(2, 192, heads, head_dim) for heads in (4, 2, 2, 4)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with torch.enable_grad():
        ours = run(*(tensor.to(device, copy=True) for tensor in drawn), cu_seqlens)
        *exact, upstream = (tensor.double() for tensor in drawn)
        exact = [tensor.requires_grad_() for tensor in exact]
        output = by_definition(*exact, cu_seqlens=cu_seqlens)
        truth = {"output": output.detach(), "log-sum-exp": _scores(*exact[:2], True, cu_seqlens).logsumexp(-1).detach()}
        truth |= _named_gradients(torch.autograd.grad(output, exact, upstream))
    for what, mine in ours.items():
        true = truth[what]
        if mine.shape != true.shape:
            raise RuntimeError(f"returned {what} of shape {tuple(mine.shape)}, not {tuple(true.shape)}")
        error = ((mine.cpu().double() - true).abs().max() / true.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{what} differs from the definition by {error:.2g}, more than {TOLERANCE[dtype]:.2g} of its largest value"
            )


def by_definition(q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
    """softmax(q k / sqrt(D)) v with every score in memory: what the kernels are compared with."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", _scores(q, k, causal, cu_seqlens).softmax(-1), v)


def _scores(q, k, causal: bool, cu_seqlens) -> torch.Tensor:
    """(B, Hq, S, S), -inf where a query must not look."""
    batch, tokens, heads, head_dim = q.shape
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    position = torch.arange(batch * tokens).view(batch, tokens)
    document = position // tokens if cu_seqlens is None else torch.bucketize(position, cu_seqlens, right=True)
    allowed = document[:, :, None] == document[:, None, :]
    if causal:
        allowed = allowed & (position[:, :, None] >= position[:, None, :])
    return scores.masked_fill(~allowed[:, None].to(q.device), -math.inf)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return name if torch.version.hip else f"{name} (sm_{capability[0]}{capability[1]})"


def _one_line(problem) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 300 else text[:297] + "..."
