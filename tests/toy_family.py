"""The smallest family that keeps the contract with two loss terms: the next token, and how far away the window's end is."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_bio.data.batch import IGNORED, Batch
from torchtitan_bio.models import layers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    dim: int = 8
    num_layers: int = 2
    vocab_size: int = 16


FLAVORS = {"debug": Architecture()}


def flops_per_token(architecture, seq_len):
    a = architecture
    return 6.0 * (a.num_layers * a.dim**2 + a.dim * (a.vocab_size + 1))


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.mix(x.cumsum(dim=1)))


class Model(nn.Module):
    def __init__(self, architecture, attend=None):
        super().__init__()
        a = architecture
        self.embedding = nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.ModuleList(Layer(a.dim) for _ in range(a.num_layers))
        self.next_token = nn.Linear(a.dim, a.vocab_size, bias=False)
        self.distance = nn.Linear(a.dim, 1, bias=False)

    def blocks(self):
        return list(self.layers)

    def init_weights(self, seed, own_part=layers.whole):
        for name, parameter in self.named_parameters():
            part, first = own_part(parameter)
            layers.draw_normal(part, 0.3, seed=seed, name=name, first=first)

    def forward(self, inputs):
        x = self._hidden(inputs)
        known = inputs["distances"] != IGNORED
        misses = torch.where(known, self.distance(x)[..., 0].float() - inputs["distances"], 0.0)
        return {
            "next_token": layers.token_loss(x, self.next_token.weight, inputs["labels"]),
            "distance": misses.square().sum(),
        }

    def logits(self, inputs):
        return F.linear(self._hidden(inputs), self.next_token.weight)

    def _hidden(self, inputs):
        x = self.embedding(inputs["tokens"].long())
        for block in self.layers:
            x = block(x)
        return x


def example_batch(batch_size=3, seq_len=10):
    tokens = torch.randint(0, 16, (batch_size, seq_len + 1), dtype=torch.uint8)
    distances = torch.arange(seq_len, 0, -1).repeat(batch_size, 1)
    distances[torch.rand(batch_size, seq_len) < 0.5] = IGNORED
    inputs = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].short(), "distances": distances}
    return Batch(inputs, {"next_token": batch_size * seq_len, "distance": int((distances != IGNORED).sum())})
