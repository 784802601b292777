"""A small Llama with lively weights, its batches, and what the tests of recomputation measure on both."""

import torch

from torchtitan_bio import attention
from torchtitan_bio.models import layers
from torchtitan_bio.models.llama3 import Architecture, Model
from torchtitan_bio.recompute import recomputed

SMALL = Architecture(dim=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=80, vocab_size=61, rope_theta=100.0)
BATCH, TOKENS = 2, 64
DOCUMENTS = torch.tensor([0, 1, 20, 64, 90, 128], dtype=torch.int32)


class Counting:
    """A kernel, and how often each of its sides was asked."""

    def __init__(self, kernel):
        self.kernel, self.counts, self.can_be_kept = kernel, {"plain": 0, "forward": 0, "backward": 0}, kernel.can_be_kept

    def _count(self, what):
        self.counts[what] += 1
        return self.kernel

    def __call__(self, *inputs, **options):
        return self._count("plain")(*inputs, **options)

    def forward_with_lse(self, *inputs):
        return self._count("forward").forward_with_lse(*inputs)

    def backward(self, *inputs):
        return self._count("backward").backward(*inputs)


def kernel(name="auto", dtype=torch.float32):
    return attention.choose(name, device=torch.device("cpu"), dtype=dtype, head_dim=SMALL.head_dim)


def lively(model):
    """Weights with which attention is far from uniform and no norm is 1, so that an error in either shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1 + 0.3 * noise)
    return model


def example(cu_seqlens=None, seed=0):
    drawn = torch.randint(0, 61, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    labels = drawn[:, 1:].short()
    labels[:, ::7] = layers.IGNORED
    return {"tokens": drawn[:, :-1].to(torch.uint8), "labels": labels, "cu_seqlens": cu_seqlens}


def model_with(attend, *, kept=None, inputs=None, ffn_tiles=1, plain=False, num_layers=SMALL.num_layers):
    architecture = Architecture(**{**vars(SMALL), "num_layers": num_layers})
    model = lively(Model(architecture, attend, ffn_tiles))
    for block in [] if plain else model.blocks():
        block.forward = recomputed(block.forward, kept=kept, inputs=inputs)
    return model


def train_once(model, inputs):
    model.zero_grad()
    loss = model(inputs)["next_token"]
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_error(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in ours)
