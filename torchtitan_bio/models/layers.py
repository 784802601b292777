"""Parts that several families share: rotary positions, the token loss, seeded initial values, checks of an architecture.

Letters: B batch, S tokens of a row, H heads, D head dimension, T tokens, V vocabulary.
"""

import dataclasses
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


def rope_table(num_positions: int, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (S, 1, D / 2) in fp32 whatever the model's type: bf16 tells apart 1,409 of 131,072 positions."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(positions, frequencies)[:, None]
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
    return sum(checkpoint(_cross_entropy, part, weight, targets, use_reentrant=False) for part, targets in chunks)


def _cross_entropy(hidden, weight, labels):
    logits = F.linear(hidden, weight.type_as(hidden)).float()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def generator_for(name: str, seed: int, device) -> torch.Generator:
    """Random numbers that depend on the seed and a parameter's name alone, not on the number of ranks or on earlier draws."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def copy_in_place(parameter: torch.nn.Parameter, full: torch.Tensor):
    parameter.copy_(full)


def problems_of_types(architecture) -> list[str]:
    """A line for each field that does not hold its annotated type; an int may stand for a float, a bool for neither."""
    problems = []
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        allowed = (int, float) if field.type is float else field.type
        if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
            problems.append(f"{field.name}={value!r} is not {field.type.__name__}")
    return problems
