"""Attention over a sequence whose tokens are spread over the ranks of a process group, called as a kernel is.

Everything outside attention works on a token by itself, so a rank runs it on the S / C tokens that it holds. Ulysses trades, for
the time of attention, tokens for heads; the ring leaves the queries where they are and passes keys and values around.

Letters: C ranks of the group (the degree), B batch, S tokens of a whole row, Hq and Hkv heads of queries and of keys and values,
D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def build(method: str, kernel, group: dist.ProcessGroup):
    """What a model takes in the kernel's place, with q (B, S / C, Hq, D) and k, v (B, S / C, Hkv, D) of this rank's positions."""
    return METHODS[method](kernel, group)


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
        problems.append(
            f"seq_len={seq_len} is not a multiple of {unit}, {reason}; nearest valid values are {below or unit} and {below + unit}"
        )
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
        """Shapes as in build; cu_seqlens as in attention.Kernel, of the whole B * S tokens."""
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

    Any degree, since no head is split. It offers what attention.Kernel offers, forward_with_lse and backward, and asks its own
    kernel for the same two, in which queries and keys may differ in number where causal is False.
    """

    kernel: Callable
    group: dist.ProcessGroup

    @torch.compiler.disable
    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens: torch.Tensor | None = None):
        """Shapes as in build; cu_seqlens as in attention.Kernel, of the whole B * S tokens."""
        return _RingAttention.apply(q, k, v, self, causal, cu_seqlens)

    def forward_with_lse(self, q, k, v, causal: bool, cu_seqlens: torch.Tensor | None = None):
        """(B, S / C, Hq, D), its log-sum-exp (B, Hq, S / C) in fp32, and what backward wants beside them."""
        mixed = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, device=q.device)
        kept = []
        for source, key_value in self._visits(torch.stack((k, v))):
            for rows, queries, keys in self._pieces(q, source, causal, cu_seqlens):
                part, part_lse, saved = self.kernel.forward_with_lse(
                    q[rows, queries], *key_value[:, rows, keys], causal and source == self.group.rank()
                )
                kept.append(saved)
                so_far = lse[rows, :, queries]
                share = torch.sigmoid(part_lse - so_far).transpose(1, 2)[..., None]
                mixed[rows, queries].lerp_(part.float(), share)
                so_far.copy_(torch.logaddexp(so_far, part_lse))
        return mixed.to(q.dtype), lse, (cu_seqlens, kept)

    def backward(self, grad_out, q, k, v, out, lse, saved, causal: bool):
        """Gradients of q, k and v, given what forward_with_lse returned. Those of k and v follow them around the ring."""
        cu_seqlens, kept = saved
        kept, arrival = iter(kept), None
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        for source, key_value in self._visits(torch.stack((k, v))):
            grad_key_value = torch.zeros(key_value.shape, dtype=torch.float32, device=q.device)
            for rows, queries, keys in self._pieces(q, source, causal, cu_seqlens):
                here = (rows, queries)
                grad_piece, *grad_keys = self.kernel.backward(
                    grad_out[here],
                    q[here],
                    *key_value[:, rows, keys],
                    out[here],
                    lse[rows, :, queries],
                    next(kept),
                    causal and source == self.group.rank(),
                )
                grad_q[here] += grad_piece
                grad_key_value[:, rows, keys] += torch.stack(grad_keys)
            if arrival:
                grad_key_value += arrival()  # what the ranks before this one made of the same keys
            arrival = self._pass_on(grad_key_value)
        return grad_q.to(q.dtype), *arrival().to(k.dtype)

    def _visits(self, mine: torch.Tensor):
        """(rank, its tensor) of every rank, this one's first, then from the previous one back.

        The next is on its way while the caller works on the one it has.
        """
        degree = self.group.size()
        for distance in range(degree):
            arrival = self._pass_on(mine) if distance < degree - 1 else None
            yield (self.group.rank() - distance) % degree, mine
            mine = arrival() if arrival else mine

    def _pass_on(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start sending to the next rank and receiving from the previous; call the answer for what came."""
        degree, rank, received = self.group.size(), self.group.rank(), torch.empty_like(tensor)
        if degree == 1:
            return lambda: tensor
        ends = [(dist.isend, tensor, rank + 1), (dist.irecv, received, rank - 1)]
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(send_or_receive, buffer, group=self.group, group_peer=peer % degree)
                for send_or_receive, buffer, peer in ends
            ]
        )

        def arrival():
            for request in requests:
                request.wait()
            return received

        return arrival

    def _pieces(self, q, source: int, causal: bool, cu_seqlens):
        """Which (rows, queries of this rank, keys of `source`) form one call of the kernel, as slices of the local tensors.

        Local order is order in the row, so a document is one slice on every rank, and where both ranks are the same the call is
        causal as it stands. Between two others each half is either wholly before a half or wholly after it: keys of an earlier
        rank are seen in their first half by all queries, those of a later one in both halves by the second half of the queries.
        """
        local, degree, rank = q.shape[1], self.group.size(), self.group.rank()
        first_query = local // 2 if causal and source > rank else 0
        last_key = local // 2 if causal and source < rank else local
        if cu_seqlens is None:
            return [(slice(None), slice(first_query, None), slice(None, last_key))]
        row = cu_seqlens[:-1] // (local * degree)
        start, stop = (bounds - row * local * degree for bounds in (cu_seqlens[:-1], cu_seqlens[1:]))
        edges = [
            _num_held(start, rank, degree, local).clamp(min=first_query),
            _num_held(stop, rank, degree, local),
            _num_held(start, source, degree, local),
            _num_held(stop, source, degree, local).clamp(max=last_key),
        ]
        shared = (edges[0] < edges[1]) & (edges[2] < edges[3])
        return [
            (slice(row, row + 1), slice(*queries), slice(*keys))
            for row, *queries, keys in zip(...)
        ]


METHODS = {"ulysses": Ulysses, "ring": Ring}
