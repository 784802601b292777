"""A toy model whose checkpoints tests save, damage and load; and the fixtures for that."""

import pytest
import torch
from torch import nn

from torchtitan_bio import distributed
from torchtitan_bio.checkpoint import Checkpointer
from torchtitan_bio.checkpoint.tensors import model_tensors, optimizer_tensors

MODEL_JSON = {"family": "toy", "flavor": "small", "architecture": {"dim": 6, "rope_theta": 1e4, "scaling": {"factor": 8.0}}}


class Toy(nn.Module):
    """Uneven first dimensions, a parameter of one element, a saved buffer, and a weight under two names."""

    def __init__(self, dim=6):
        super().__init__()
        self.embedding = nn.Embedding(5, dim)
        self.layers = nn.ModuleDict({"0": nn.Linear(dim, 3), "1": nn.Linear(3, dim)})
        self.temperature = nn.Parameter(torch.ones(1))
        self.output = nn.Linear(dim, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(3))

    def forward(self, tokens):
        hidden = self.layers["1"](self.layers["0"](self.embedding(tokens)))
        return (self.output(hidden) * self.temperature).square().sum()


def build(world, seed, *, steps=2, frozen=()):
    """A model and its AdamW after a few steps whose gradients do not depend on the number of ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = Toy()
    model.count += seed
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for layer in model.layers.values():
        fully_shard(layer, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.arange(5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def full(model, optimizer):
    """Every tensor in full, as NumPy arrays by name."""
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    whole = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()}
    return {name: tensor.numpy().copy() for name, tensor in whole.items()}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].tobytes() != right[name].tobytes()]
    assert not different


@pytest.fixture(scope="module")
def world():
    yield distributed.start()
    distributed.stop()


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(world, tmp_path, said):
    """save(step, seed) into tmp_path, and the Checkpointer that does it."""

    class Run:
        folder = tmp_path
        checkpoints = Checkpointer(tmp_path, world=world, keep_latest_k="all", say=said.append)

        def save(self, step, seed=1, checkpoints=None):
            (checkpoints or self.checkpoints).save(
                step, *build(world, seed), {"step": step, "next_sample": step * 4}, MODEL_JSON
            )
            return tmp_path / f"step-{step:08d}"

    return Run()


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flip_a_bit(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)
