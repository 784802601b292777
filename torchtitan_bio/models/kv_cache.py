"""Keys and values of the tokens already read, so that one more token costs one token.

Letters: B batch, S new tokens, T tokens that fit, Hq and Hkv heads of queries and of keys and values, G = Hq / Hkv, D head
dimension.
"""

import functools

import torch


class KVCache:
    """Memory for T tokens of B sequences, filled from the front: (layers, 2, B, Hkv, T, D), 0 keys and 1 values.

    The sequences go on from those of a cache `before` it, one each, or all from the only one that it has: that is kept and read
    once, however many they are. kernel is an attention.Kernel with forward_with_lse, which needs no mask here: what has been
    read is seen whole, new tokens see each other causally, and the two are merged by log-sum-exp.
    """

    def __init__(
        self,
        kernel,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device,
        before: "KVCache | None" = None,
    ):
        assert before is None or (before.before is None and before.memory.shape[2] in (1, batch))
        self.kernel, self.before, self.length = kernel, before, 0
        self.memory = torch.empty(num_layers, 2, batch, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)

    @torch.no_grad()
    def feed(self, model, tokens: torch.Tensor) -> torch.Tensor:
        """The model's logits (B, S, vocabulary) after each of the tokens (B, S) that come next, which are then cached."""
        capacity, num_new = self.memory.shape[4], tokens.shape[1]
        if self.length + num_new > capacity:
            raise ValueError(f"the cache holds {self.length} of at most {capacity} tokens; {num_new} more do not fit")
        first = self.length + (self.before.length if self.before else 0)
        attends = [functools.partial(self._attend, keys_and_values) for keys_and_values in enumerate(self.memory)]
        positions = torch.arange(first, first + num_new, device=tokens.device)
        logits = model.logits({"tokens": tokens, "positions": positions, "attends": attends})
        self.length += num_new
        return logits

    # The length changes with every call. Traced, it would become a constant of each compiled block.
    @torch.compiler.disable
    def _attend(self, layer, q, k, v, *, causal: bool, cu_seqlens):
        assert causal and cu_seqlens is None
        number, memory = layer
        end = self.length + q.shape[1]
        for target, new in zip(memory, (k, v), strict=True):
            target[:, :, self.length : end] = new.transpose(1, 2)
        if q.shape[1] == 1:
            parts = [_see_all(self.kernel, q, memory[:, :, :, :end])]
        else:
            out, lse, _ = self.kernel.forward_with_lse(q, k, v, True)
            parts = [(out, lse.transpose(1, 2))]
            if self.length:
                parts.append(_see_all(self.kernel, q, memory[:, :, :, : self.length]))
        if self.before:
            parts.append(_see_all(self.kernel, q, self.before.memory[number, :, :, :, : self.before.length]))
        return _merge(parts).to(q.dtype)


def _see_all(kernel, q, seen):
    """(out (B, S, Hq, D), lse (B, S, Hq)) of queries that see every token in seen (2, B or 1, Hkv, tokens, D).

    Without a mask it makes no difference to a key who asks: the query heads that share a key head, and the sequences that share
    the keys, are handed to the kernel as so many queries of one head and one sequence. Keys are read once for all of them.
    """
    k, v = seen.transpose(2, 3)
    q = q.unflatten(2, (k.shape[2], -1)).transpose(2, 3)  # (B, S, G, Hkv, D)
    out, lse, _ = kernel.forward_with_lse(q.reshape(len(k), -1, *q.shape[3:]), k, v, False)
    out, lse = out.reshape(q.shape), lse.transpose(1, 2).reshape(q.shape[:-1])
    return out.transpose(2, 3).flatten(2, 3), lse.transpose(2, 3).flatten(2)


def _merge(parts):
    """Attention to all the keys from attention to some of them each, in fp32."""
    out, lse = parts[0]
    for other, other_lse in parts[1:]:
        share = (other_lse - lse).sigmoid()[..., None]
        out = out.to(lse.dtype).lerp(other.to(lse.dtype), share)
        lse = torch.logaddexp(lse, other_lse)
    return out
