"""Attention over a sequence whose tokens are spread over the ranks of a process group, called as a kernel is.

Everything outside attention works on a token by itself, so a rank runs it on the S / C tokens that it holds. For the time of
attention, Ulysses trades tokens for heads; the ring leaves queries where they are and passes keys and values around.

Ulysses(kernel, group) and Ring(kernel, group) take the kernel's place in a model, with its signature, on this rank's positions:
q (B, S / C, Hq, D), k and v (B, S / C, Hkv, D). cu_seqlens is that of the whole rows.

Letters: C ranks of the group (the degree), B batch, S tokens of a whole row, Hq and Hkv heads of queries and of keys and
values, D head dimension.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def check(method: str, degree: int, *, seq_len: int, num_kv_heads: int):
    """ValueError, naming the nearest valid values, unless so many ranks can share such a sequence and such heads."""
    problems = []
    if method not in METHODS:
        problems.append(f"context parallel method {method!r} is not one of {', '.join(METHODS)}")
    if degree < 1:
        problems.append(f"context parallel degree {degree} is not at least 1")
    if problems:
        raise ValueError("\n".join(problems))
    if method == "ulysses" and num_kv_heads % degree:
        valid = [divisor for divisor in range(1, num_kv_heads + 1) if num_kv_heads % divisor == 0]
        below, above = [d for d in valid if d < degree][-1], [d for d in valid if d > degree][:1]
        problems.append(
            f"context parallel degree {degree} does not divide the {num_kv_heads} key-value heads, which ulysses shares out; "
            f"nearest valid degrees are {' and '.join(map(str, [below, *above]))}, or use the ring"
        )
    unit, reason = (degree, "the degree") if method == "ulysses" else (2 * degree, "twice the degree, for the ring")
    if seq_len % unit:
        below = seq_len - seq_len % unit
        nearest = f"nearest valid values are {below or unit} and {below + unit}"
        problems.append(f"seq_len={seq_len} is not a multiple of {unit}, {reason}; {nearest}")
    if problems:
        raise ValueError("\n".join(problems))


def positions(seq_len: int, rank: int, degree: int, method: str) -> torch.Tensor:
    """The S / C positions of a row that a rank of the group holds, rising, int64 on the CPU.

    Ulysses: the rank's part of C. Ring: parts r and 2C - 1 - r of 2C, since with contiguous parts the last rank would attend to
    everything and the first to little.
    """
    if method == "ulysses":
        return torch.arange(seq_len).view(degree, -1)[rank]
    return torch.arange(seq_len).view(2 * degree, -1)[[rank, 2 * degree - 1 - rank]].flatten()


def shard(inputs: dict, rank: int, degree: int, method: str) -> dict:
    """The part of a model's inputs that a rank holds, with its "positions" for rotary tables.

    Every tensor is (B, S, ...) and loses the other ranks' tokens, except cu_seqlens, which stays that of the whole rows.
    """
    held = positions(inputs["tokens"].shape[1], rank, degree, method)
    sharded = {
        name: value if value is None or name == "cu_seqlens" else value[:, held.to(value.device)]
        for name, value in inputs.items()
    }
    return sharded | {"positions": held}


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup, method: str) -> torch.Tensor:
    """(B, S, ...) in order on every rank, from each rank's (B, S / C, ...). For evaluation: no gradient passes."""
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, local.detach().contiguous(), group=group)
    whole = torch.cat(parts, dim=1)
    held = [positions(whole.shape[1], rank, group.size(), method) for rank in range(group.size())]
    return whole[:, torch.cat(held).argsort().to(whole.device)]


# ---- Ulysses


@dataclass(frozen=True)
class Ulysses:
    """All tokens of some heads instead of some tokens of all heads: the kernel runs on whole rows."""

    kernel: Callable
    group: dist.ProcessGroup

    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        degree = self.group.size()
        check("ulysses", degree, seq_len=q.shape[1] * degree, num_kv_heads=k.shape[2])
        heads = [tensor.shape[2] // degree for tensor in (q, k, v)]
        by_receiver = [tensor.unflatten(2, (degree, -1)).permute(2, 0, 1, 3, 4) for tensor in (q, k, v)]
        by_sender = _Exchange.apply(torch.cat(by_receiver, dim=3), self.group)
        q, k, v = by_sender.transpose(0, 1).flatten(1, 2).split(heads, dim=2)
        mixed = self.kernel(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
        by_receiver = mixed.unflatten(1, (degree, -1)).transpose(0, 1).contiguous()
        return _Exchange.apply(by_receiver, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """x (C, ...): x[j] goes to rank j, and what rank j sent comes back as [j]. Its own transpose."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _exchange(gradient.contiguous(), ctx.group), None


def _exchange(x, group):
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


# ---- Ring


@dataclass(frozen=True)
class Ring:
    """Keys and values go around the ranks; a rank adds up what its queries make of each part, by log-sum-exp, in fp32.

    Any degree, since no head is split. It asks its kernel for forward_with_lse and backward, and offers the same two, so that
    its result can be kept across recomputation as a kernel's can.
    """

    kernel: Callable
    group: dist.ProcessGroup

    def __post_init__(self):
        if not self.kernel.can_be_kept:
            raise ValueError(
                f"the ring merges by log-sum-exp, which the attention kernel {self.kernel.name!r} does not give "
                f"({self.kernel.why}): choose another kernel, or ulysses"
            )

    @property
    def can_be_kept(self) -> bool:
        return True

    @torch.compiler.disable
    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        return _RingAttention.apply(q, k, v, self, causal, cu_seqlens)

    def forward_with_lse(self, q, k, v, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """(out (B, S / C, Hq, D), lse (B, Hq, S / C), saved), without autograd. Give all three to backward."""
        degree, wide = self.group.size(), torch.promote_types(q.dtype, torch.float32)
        check("ring", degree, seq_len=q.shape[1] * degree, num_kv_heads=k.shape[2])
        mixed = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide, device=q.device)
        saved = []
        for source, key_value in self._visits(torch.stack((k, v))):
            for (rows, queries, keys), how in self._calls(q, source, causal, cu_seqlens):
                part, part_lse, part_saved = self.kernel.forward_with_lse(q[rows, queries], *key_value[:, rows, keys], *how)
                so_far = lse[rows, :, queries]
                share = torch.sigmoid(part_lse - so_far).transpose(1, 2)[..., None]
                mixed[rows, queries].lerp_(part.to(wide), share)
                so_far.copy_(torch.logaddexp(so_far, part_lse))
                saved.append(part_saved)
        return mixed.to(q.dtype), lse, tuple(saved)

    def backward(self, grad_out, q, k, v, out, lse, saved, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """(dq, dk, dv). The gradients of keys and values follow these around the ring, one step behind, in fp32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        saved, arrival = iter(saved), None
        for source, key_value in self._visits(torch.stack((k, v))):
            grad_key_value = torch.zeros(key_value.shape, dtype=wide, device=q.device)
            for (rows, queries, keys), how in self._calls(q, source, causal, cu_seqlens):
                grad_queries, *grad_keys_values = self.kernel.backward(
                    grad_out[rows, queries],
                    q[rows, queries],
                    *key_value[:, rows, keys],
                    out[rows, queries],
                    lse[rows, :, queries].contiguous(),
                    next(saved),
                    *how,
                )
                grad_q[rows, queries] += grad_queries
                for total, part in zip(grad_key_value, grad_keys_values, strict=True):
                    total[rows, keys] += part
            if arrival:
                grad_key_value += arrival()  # what the ranks before this one made of the same keys
            arrival = self._pass_on(grad_key_value)
        grad_k, grad_v = arrival()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _visits(self, mine: torch.Tensor):
        """(rank, its tensor), this rank's first, then the previous one's and so on around.

        The next is on its way while the caller works on the one it has.
        """
        degree = self.group.size()
        for distance in range(degree):
            arrival = self._pass_on(mine) if distance < degree - 1 else None
            yield (self.group.rank() - distance) % degree, mine
            mine = arrival() if arrival else mine

    def _pass_on(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start sending to the next rank and receiving from the previous one; call the answer for what came."""
        degree, rank = self.group.size(), self.group.rank()
        if degree == 1:
            return lambda: tensor
        send = dist.P2POp(dist.isend, tensor, group=self.group, group_peer=(rank + 1) % degree)
        receive = dist.P2POp(dist.irecv, torch.empty_like(tensor), group=self.group, group_peer=(rank - 1) % degree)
        # The answer holds what is sent, too: it must not be freed on the way.
        return functools.partial(_arrived, dist.batch_isend_irecv([send, receive]), send, receive)

    def _calls(self, q, source: int, causal: bool, cu_seqlens):
        """How this rank's queries meet the keys of `source`: ((rows, queries, keys), (causal, cu_seqlens)) for each call.

        Local order is order in the row, so a document is one slice on every rank, and with a rank's own keys the call is causal
        as it stands. Between two ranks each half is wholly before or wholly after a half: an earlier rank's keys are seen in
        their first half, by all queries; a later one's in both halves, by the second half of the queries.
        """
        local, degree, rank = q.shape[1], self.group.size(), self.group.rank()
        if source == rank:
            return [((slice(None),) * 3, (causal, self._local_bounds(cu_seqlens, local)))]
        first_query = local // 2 if causal and source > rank else 0
        last_key = local // 2 if causal and source < rank else local
        if cu_seqlens is None:
            return [((slice(None), slice(first_query, local), slice(0, last_key)), (False, None))]
        starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
        rows = starts // (local * degree)
        starts, stops = starts - rows * local * degree, stops - rows * local * degree
        # Between two ranks the documents in common are few: each goes on over a border of halves.
        documents = zip(
            rows.tolist(),
            _num_held(starts, rank, degree, local).clamp(min=first_query).tolist(),
            _num_held(stops, rank, degree, local).tolist(),
            _num_held(starts, source, degree, local).tolist(),
            _num_held(stops, source, degree, local).clamp(max=last_key).tolist(),
            strict=True,
        )
        return [
            ((slice(row, row + 1), slice(query, query_end), slice(key, key_end)), (False, None))
            for row, query, query_end, key, key_end in documents
            if query < query_end and key < key_end
        ]

    def _local_bounds(self, cu_seqlens, local: int):
        """cu_seqlens of this rank's own B * S / C tokens."""
        if cu_seqlens is None:
            return None
        seq_len = local * self.group.size()
        rows = cu_seqlens // seq_len
        held = _num_held(cu_seqlens - rows * seq_len, self.group.rank(), self.group.size(), local)
        return (rows * local + held).unique_consecutive()


def _num_held(bounds: torch.Tensor, rank: int, degree: int, local: int) -> torch.Tensor:
    """How many of a row's tokens before each bound a rank of the ring holds: where the bound lies among its own."""
    half = local // 2
    early, late = bounds - rank * half, bounds - (2 * degree - 1 - rank) * half
    return early.clamp(0, half) + late.clamp(0, half)


def _arrived(requests, send: dist.P2POp, receive: dist.P2POp) -> torch.Tensor:
    for request in requests:
        request.wait()
    return receive.tensor


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring, causal, cu_seqlens):
        out, lse, saved = ring.forward_with_lse(q, k, v, causal, cu_seqlens)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = ring, saved, causal, cu_seqlens
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        ring, *rest = ctx.rest
        return *ring.backward(grad_out, *ctx.saved_tensors, *rest), None, None, None


METHODS = {"ulysses": Ulysses, "ring": Ring}
