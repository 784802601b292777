"""Whether two programs make the same logits of the same weights: a conversion is right if they do, whatever its key maps say.

transformers is the judge of a Hugging Face folder, since it is what the folder's users will load it with.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan_bio import models

LARGEST_GAP = 1e-4
"""Of the largest logit. Both sides have the same weights and compute in fp32: only the order of sums differs."""
Program = Callable[[torch.Tensor], torch.Tensor]


def windows(vocab_size: int, seq_len: int = 512) -> dict[str, torch.Tensor]:
    """Tokens (2, seq_len) to compare on: random ones, and spikes of the shipped recording where the vocabulary holds them."""
    generator = torch.Generator().manual_seed(0)
    found = {"random tokens": torch.randint(vocab_size, (2, seq_len), generator=generator)}
    if vocab_size >= 256:
        from torchtitan_bio.data import spikes

        recording = spikes.build(source="embedded:a2929", split="test", seq_len=seq_len)
        found["real spikes"] = recording.collate([recording.sample(i) for i in range(2)]).inputs["tokens"].long()
    return found


@torch.no_grad()
def ours(family: str, architecture, read: Callable[[str], torch.Tensor]) -> Program:
    """Our model with the weights that read(name) gives, in fp32."""
    with torch.device("meta"):
        model = models.build(family, architecture)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return lambda tokens: model.logits({"tokens": tokens})


def of_transformers(folder: Path) -> Program:
    """LlamaForCausalLM.from_pretrained(folder) in fp32; ValueError where it finds a tensor missing or does not know one."""
    need_transformers()
    from transformers import LlamaForCausalLM

    model, found = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise ValueError(f"transformers reports {kind.replace('_', ' ')} in {folder}: {', '.join(map(str, found[kind]))}")
    model = model.float().eval()
    return lambda tokens: model(tokens).logits


def need_transformers():
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--verify compares with transformers, which is not installed: pip install transformers")


@torch.no_grad()
def check(one: Program, other: Program, vocab_size: int) -> list[str]:
    """A line for each kind of window with the largest difference of logits; ValueError where it is above LARGEST_GAP."""
    lines = []
    for kind, tokens in windows(vocab_size).items():
        here, there = one(tokens), other(tokens)
        gap, largest = (here - there).abs().max().item(), here.abs().max().item()
        lines.append(f"largest difference of logits on {kind}: {gap:.2e}, {gap / largest:.1e} of the largest logit")
        if not gap <= LARGEST_GAP * largest:  # a NaN is no agreement
            raise ValueError(f"{lines[-1]}, above {LARGEST_GAP:.0e}")
    return lines
