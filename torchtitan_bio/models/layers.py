"""Parts that several families share: rotary positions, the token loss, seeded initial values, checks of an architecture.

Letters: B batch, S tokens of a row, H heads, D head dimension, T tokens, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""A label that is no target."""

LOGITS_AT_ONCE = 2**27
"""Logits that are in memory together, in the loss: 512 MB in fp32. At 131,072 tokens a vocabulary of 1,024 just fits."""


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    scaling_factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_context: int = 8192,
    device=None,
) -> torch.Tensor:
    """Radians a token for each of the D / 2 pairs, fp32; a scaling_factor other than 1 applies Llama 3.1's scaling.

    Pairs that turn more than high_freq_factor times in the original context stay, those that turn less than low_freq_factor
    times slow down by the factor, and in between the two are blended.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling_factor == 1:
        return frequencies
    turns = original_context * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling_factor)


def rope_table(positions: int | torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (S, 1, D / 2) of these positions, or of so many from 0 on.

    In fp32 whatever the model's type: bf16 tells apart 1,409 of 131,072 positions.
    """
    if isinstance(positions, int):
        positions = torch.arange(positions, device=frequencies.device)
    angles = torch.outer(positions.to(frequencies.device, torch.float32), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, S, H, D) with its pairs (0, 1), (2, 3), ... turned by their position's angles, in fp32, returned in x's type."""
    cos, sin = rope
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # times fp32, these are fp32
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def token_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, at_once: int = LOGITS_AT_ONCE) -> torch.Tensor:
    """Summed cross entropy, fp32, of the logits hidden (B, S, dim) @ weight.T (dim, V) against labels (B, S).

    Where all logits are more than at_once, they are computed in chunks of tokens, and again in backward, so that only one chunk
    of them exists at a time.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten().long()
    if len(hidden) * len(weight) <= at_once:
        return _cross_entropy(hidden, weight, labels)
    # Each chunk adds to the weight's gradient: through an fp32 copy, so that the sum of bf16 parts is not rounded at each.
    weight = weight.float()
    tokens = max(1, at_once // len(weight))
    chunks = zip(hidden.split(tokens), labels.split(tokens), strict=True)
    recomputed = functools.partial(checkpoint, _cross_entropy, use_reentrant=False, preserve_rng_state=False)
    return sum(recomputed(part, weight, targets) for part, targets in chunks)


def _cross_entropy(hidden, weight, labels):
    logits = F.linear(hidden, weight.type_as(hidden)).float()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def whole(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """The part of a parameter that init_weights fills where nothing is sharded, and how many elements lie before it."""
    return parameter, 0


@torch.no_grad()
def draw_normal(part: torch.Tensor, std: float, *, seed: int, name: str, first: int = 0, at_once: int = 2**18):
    """Fill part, in place, with elements first, first + 1, ... of a parameter: normal, cut off at three times std.

    An element is a function of the seed, the parameter's name and its own index alone: torch's generators would make it depend
    on the device and on what else the rank draws. at_once elements are computed together: so many stay in a CPU's cache.
    """
    key, flat = _key(seed, name), part.view(-1)
    for start in range(0, len(flat), at_once):
        piece = flat[start : start + at_once]
        index = torch.arange(first + start, first + start + len(piece), device=part.device)
        # Of the 53 bits that fp64 holds, an odd number of halves: uniform in (-1, 1), its ends and 0 excluded.
        uniform = (_splitmix64(index, key) >> 11).double().add_(0.5).mul_(2**-52)
        piece.copy_(uniform.mul_(math.erf(3 / math.sqrt(2))).erfinv_().mul_(math.sqrt(2) * std))


def _key(seed: int, name: str) -> int:
    """An int64 of its own for each parameter and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big", signed=True)


def _splitmix64(index: torch.Tensor, key: int) -> torch.Tensor:
    """The index-th of the 64-bit numbers that SplitMix64 makes of a key; index, of int64, is overwritten."""
    bits = index.mul_(-0x61C8864680B583EB).add_(key)  # constants above 2^63 stand as the int64 of the same bits
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        shifted = bits >> shift  # copies of the sign come in from the left
        bits.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return bits


def problems_of_types(architecture) -> list[str]:
    """A line for each field that does not hold its annotated type; an int may stand for a float, a bool for neither."""
    problems = []
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        allowed = (int, float) if field.type is float else field.type
        if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
            problems.append(f"{field.name}={value!r} is not {field.type.__name__}")
    return problems
