"""Llama 3: pre-norm, RMSNorm, SwiGLU, grouped-query attention, rotary positions in interleaved pairs. Meta's parameter names.

Letters: B batch, S tokens of a row, H heads, D head dimension, T = B * S.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_bio import attention, recompute
from torchtitan_bio.models import layers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    dim: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    ffn_dim: int
    """Hidden width of the feed-forward part, as it is: no multiplier or rounding is applied."""
    vocab_size: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths, which go from 2 pi to nearly 2 pi rope_theta tokens."""
    rope_scaling_factor: float = 1.0
    """Llama 3.1's stretch of long wavelengths; 1 is none."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192
    tie_embeddings: bool = False
    """Use the embedding as the output projection too."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def __post_init__(self):
        problems = layers.problems_of_types(self)
        if not problems:
            numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type is not bool}
            problems = [
                f"{name}={value!r} is not positive and finite" for name, value in numbers.items() if not 0 < value < math.inf
            ]
        if not problems:
            if self.dim % self.num_heads:
                problems.append(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
            elif self.head_dim % 2:
                problems.append(
                    f"dim / num_heads = {self.dim} / {self.num_heads} = {self.head_dim} is odd; rotary pairs need it even"
                )
            if self.num_heads % self.num_kv_heads:
                problems.append(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
            if self.rope_low_freq_factor >= self.rope_high_freq_factor:
                low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
                problems.append(f"rope_low_freq_factor={low} is not below rope_high_freq_factor={high}")
        if problems:
            raise ValueError("\n".join(problems))


# ffn_dim from 250M on: 1.3 * int(8 / 3 * dim), rounded up to a multiple of 1,024, as Meta has it.
FLAVORS = {
    "debug": Architecture(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128, rope_theta=1e4),
    "quickstart": Architecture(dim=64, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=160, rope_theta=1e4),
    "250M": Architecture(dim=1024, num_layers=16, num_heads=16, num_kv_heads=8, ffn_dim=4096, rope_theta=1e4),
    "870M": Architecture(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=7168, rope_theta=1e4),
    "1B": Architecture(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=7168),
    "2B": Architecture(dim=3072, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=11264, rope_theta=1e4),
    "8B": Architecture(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336),
}


def flops_per_token(architecture: Architecture, seq_len: int) -> float:
    """Training FLOPs: 6 a weight that multiplies (looking up an embedding is free), and attention over seq_len / 2 tokens.

    Linear in seq_len: packed documents of lengths d cost the sum of d * flops_per_token(d).
    """
    a = architecture
    attention_weights = 2 * a.dim * (a.num_heads + a.num_kv_heads) * a.head_dim
    weights = a.num_layers * (attention_weights + 3 * a.dim * a.ffn_dim) + a.vocab_size * a.dim
    # Scores and mixing are 2 FLOPs a pair of tokens, head and channel each; backward doubles forward.
    attention_of_a_pair = 3 * 2 * 2 * a.num_layers * a.num_heads * a.head_dim
    return 6.0 * weights + attention_of_a_pair * seq_len / 2


class Attention(nn.Module):
    def __init__(self, a: Architecture, attend):
        super().__init__()
        self.head_dim, self.attend = a.head_dim, attend
        self.wq = nn.Linear(a.dim, a.num_heads * a.head_dim, bias=False)
        self.wk = nn.Linear(a.dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wv = nn.Linear(a.dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wo = nn.Linear(a.num_heads * a.head_dim, a.dim, bias=False)

    def forward(self, x, rope, cu_seqlens, attend=None):
        attend = attend or self.attend
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv))
        mixed = attend(layers.rotate(q, rope), layers.rotate(k, rope), v, causal=True, cu_seqlens=cu_seqlens)
        return self.wo(mixed.flatten(-2))


def feed_forward_half(x, norm, w1, w2, w3, *, eps: float):
    """The second half of a block, a function of each token alone: x + w2 (silu(w1 n) * w3 n) of the normalized n."""
    n = F.rms_norm(x, norm.shape, norm, eps)
    return x + F.linear(F.silu(F.linear(n, w1)) * F.linear(n, w3), w2)


class Block(nn.Module):
    def __init__(self, a: Architecture, attend, ffn_tiles: int):
        super().__init__()
        self.attention = Attention(a, attend)
        shapes = {"w1": (a.dim, a.ffn_dim), "w2": (a.ffn_dim, a.dim), "w3": (a.dim, a.ffn_dim)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.attention_norm = nn.RMSNorm(a.dim, eps=a.norm_eps)
        self.ffn_norm = nn.RMSNorm(a.dim, eps=a.norm_eps)
        self.ffn_tiles = ffn_tiles

    def forward(self, x, rope, cu_seqlens, attend=None):
        x = x + self.attention(self.attention_norm(x), rope, cu_seqlens, attend)
        weights = (self.ffn_norm.weight, *(self.feed_forward[name].weight for name in ("w1", "w2", "w3")))
        return recompute.in_tiles(functools.partial(feed_forward_half, eps=self.ffn_norm.eps), x, weights, self.ffn_tiles)


class Model(nn.Module):
    """inputs: tokens (B, S), labels (B, S) with -100 where there is no target, cu_seqlens None or as in attention.Kernel, but
    perhaps an array.

    Where a rank holds a part of each row, "positions" (S) tells which, and attend gathers what it needs of the others.
    Where keys and values of earlier tokens are cached, "attends" has an attend for each block, in place of the model's own.
    ffn_tiles: tiles of tokens in which each block's feed-forward half is computed, and computed again in backward; 1 is off.
    """

    def __init__(self, architecture: Architecture, attend=None, ffn_tiles: int = 1):
        super().__init__()
        if ffn_tiles < 1:
            raise ValueError(f"ffn_tiles={ffn_tiles} is not at least 1")
        a, attend = architecture, attend or attention.TORCH_CHOICE
        self.architecture = a
        self.tok_embeddings = nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.ModuleList(Block(a, attend, ffn_tiles) for _ in range(a.num_layers))
        self.norm = nn.RMSNorm(a.dim, eps=a.norm_eps)
        self.output = None if a.tie_embeddings else nn.Linear(a.dim, a.vocab_size, bias=False)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, inputs: dict) -> dict[str, torch.Tensor]:
        return {"next_token": layers.token_loss(self._hidden(inputs), self._output_weight(), inputs["labels"])}

    def logits(self, inputs: dict) -> torch.Tensor:
        """(B, S, vocab_size) in the compute type."""
        return F.linear(self._hidden(inputs), self._output_weight())

    @torch.no_grad()
    def init_weights(self, seed: int, own_part=layers.whole):
        for name, parameter in self.named_parameters():
            part, first = own_part(parameter)
            if name.endswith("norm.weight"):
                part.fill_(1.0)
            else:
                layers.draw_normal(part, self._initial_std(name), seed=seed, name=name, first=first)

    def _initial_std(self, name: str) -> float:
        a = self.architecture
        # Meta's 0.02 suits widths from 1,000 on; narrower layers need larger numbers to pass as much on.
        inner = max(0.02, math.sqrt(0.4 / a.dim))
        if name == "output.weight" or (name == "tok_embeddings.weight" and a.tie_embeddings):
            return a.dim**-0.5
        if name == "tok_embeddings.weight":
            return 1.0
        if name.endswith(("wo.weight", "w2.weight")):
            return inner / math.sqrt(2 * a.num_layers)  # so many of them add up in the residual stream
        return inner

    def _hidden(self, inputs: dict) -> torch.Tensor:
        tokens, cu_seqlens = inputs["tokens"], inputs.get("cu_seqlens")
        if cu_seqlens is not None:
            # The boundaries of the rows and no others are none.
            cu_seqlens = None if len(cu_seqlens) == len(tokens) + 1 else torch.as_tensor(cu_seqlens)
        # The table is not a buffer: to_empty would leave one uninitialised, and mixed precision round it to bf16.
        positions = inputs.get("positions")
        rope = layers.rope_table(tokens.shape[1] if positions is None else positions, self._frequencies(tokens.device))
        x = self.tok_embeddings(tokens.long())
        attends = inputs.get("attends") or ()
        for number, block in enumerate(self.layers):
            x = block(x, rope, cu_seqlens, *attends[number : number + 1])
        return self.norm(x)

    def _frequencies(self, device) -> torch.Tensor:
        a = self.architecture
        return layers.rope_frequencies(
            a.head_dim,
            a.rope_theta,
            scaling_factor=a.rope_scaling_factor,
            low_freq_factor=a.rope_low_freq_factor,
            high_freq_factor=a.rope_high_freq_factor,
            original_context=a.rope_original_context,
            device=device,
        )

    def _output_weight(self) -> torch.Tensor:
        """The weight itself, not its module: under FSDP it belongs to the root's unit, which is gathered throughout forward."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight
