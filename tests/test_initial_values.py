"""Initial weights: an element is a hash of (seed, name of its parameter, index), normal, and the same wherever it is drawn."""

import hashlib
import math
from statistics import NormalDist

import pytest
import torch
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan_bio import parallelize
from torchtitan_bio.live_memory import LiveMemory
from torchtitan_bio.models import layers
from torchtitan_bio.models.llama3 import Architecture, Model

NAME = "layers.0.attention.wq.weight"
NUM = 2**20
NOISE = 5 / math.sqrt(NUM)  # five standard deviations of the mean of so many values of variance 1


def draw(num=NUM, std=1.0, seed=42, name=NAME, **options):
    values = torch.empty(num)
    layers.draw_normal(values, std, seed=seed, name=name, **options)
    return values


def test_the_first_values_are_these_on_every_machine():
    expected = [0.020015467, 0.0355276316, -0.00146874995, 0.0294012278, -0.00635477528, -0.0165884066]
    assert draw(6, 0.02).tolist() == pytest.approx(expected, rel=2e-7)  # libraries' erfinv may differ in the last bit of fp32


def test_values_are_splitmix64_through_the_inverse_of_the_normal_distribution():
    """The same again in Python's whole numbers, and by the standard library's inverse."""
    state, word = int.from_bytes(hashlib.sha256(f"7 {NAME}".encode()).digest()[:8], "big"), 2**64 - 1
    normal, first = NormalDist(), 10**12
    below = normal.cdf(-3)
    for index, value in enumerate(draw(1000, 0.5, 7, first=first).tolist(), first):
        bits = state + index * 0x9E3779B97F4A7C15 & word
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & word
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & word
        bits ^= bits >> 31
        signed = bits - 2**64 if bits >> 63 else bits
        share = ((signed >> 11) / 2**53) + 0.5  # of 0 .. 1
        assert value == pytest.approx(0.5 * normal.inv_cdf(below + share * (1 - 2 * below)), rel=1e-7, abs=1e-12)


def test_the_distribution_is_the_normal_one_cut_off_at_three_times_std():
    values = draw().double()
    normal = NormalDist()
    inside = 1 - 2 * normal.cdf(-3)
    assert 2.99 < values.max() <= 3 and -3 <= values.min() < -2.99
    variance = 1 - 6 * normal.pdf(3) / inside
    assert values.mean().abs() < NOISE
    assert values.square().mean().item() == pytest.approx(variance, abs=1.5 * NOISE)
    # Kolmogorov and Smirnov: the largest distance between the two distribution functions; 1.95 / sqrt(n) in one of 1,000 cases.
    ordered = values.sort().values
    distribution = (torch.special.ndtr(ordered) - normal.cdf(-3)) / inside
    assert (distribution - torch.arange(NUM) / NUM).abs().max() < 1.95 / math.sqrt(NUM)


@pytest.mark.parametrize(
    "other",
    [
        lambda: draw(seed=43),
        lambda: draw(seed=0),
        lambda: draw(name=NAME.replace("0", "1")),
        lambda: draw(name=NAME.replace("wq", "wk")),
        lambda: draw(first=1),
        lambda: draw(first=4096),
        lambda: draw().flip(0),
    ],
    ids=["next seed", "seed 0", "next layer", "next matrix", "next element", "next row", "other end"],
)
def test_neighbours_are_not_correlated(other):
    values, others = draw().double(), other().double()
    assert (values * others).mean().abs() < NOISE
    assert (values.square() * others.square()).mean() == pytest.approx(values.square().mean() ** 2, abs=3 * NOISE)


def test_no_two_elements_of_a_model_share_their_bits():
    keys = [layers._key(seed, f"layers.{layer}.{NAME}") for seed in range(10) for layer in range(20)]
    bits = torch.cat([layers._splitmix64(torch.arange(5000), key) for key in keys])
    assert len(bits.unique()) == 10 * 20 * 5000


def test_values_depend_neither_on_what_is_drawn_with_them_nor_on_the_pieces():
    whole = draw(10_000)
    for start, stop, at_once in ((0, 10_000, 7), (0, 10_000, 4096), (1234, 8765, 100), (9_999, 10_000, 2**18), (5, 5, 1)):
        assert torch.equal(draw(stop - start, first=start, at_once=at_once), whole[start:stop])
    torch.rand(3)
    assert torch.equal(draw(10_000), whole)


def test_drawing_takes_8_mib_beside_the_tensor_however_large_it_is():
    with LiveMemory() as memory:
        out = torch.empty(3 * 2**20)
        layers.draw_normal(out, 1.0, seed=0, name=NAME)
    assert memory.peak - out.nbytes <= 8 * 2**20


UNEVEN = Architecture(dim=6, num_layers=1, num_heads=3, num_kv_heads=1, ffn_dim=13, vocab_size=61)  # 2 rows of keys on 4 ranks


def sharded_weights(rank, replicate, shard):
    with torch.device("meta"):
        model = Model(UNEVEN)
    mesh = init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    types = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize.parallelize(model, mesh, **types, recompute="none", compile_blocks=False, reshard_after_forward=True)
    parallelize.materialize(model, torch.device("cpu"), seed=3)
    return {name: parameter.full_tensor().detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("replicate", "shard"), [(1, 4), (2, 2), (4, 1), (1, 1)])
def test_ranks_that_hold_unequal_shares_draw_together_what_one_draws_alone(replicate, shard):
    alone = Model(UNEVEN)
    alone.init_weights(seed=3)
    for weights in on_ranks(replicate * shard, sharded_weights, replicate, shard):
        for name, parameter in alone.named_parameters():
            assert torch.equal(torch.from_numpy(weights[name]), parameter), name
