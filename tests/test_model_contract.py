"""What every model family promises, at toy size: see torchtitan_bio/models/__init__.py."""

import dataclasses
import importlib

import pytest
import torch
import toy_family

from torchtitan_bio import models
from torchtitan_bio.data.batch import Batch


def language_batch():
    tokens = torch.randint(0, 256, (2, 25), dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, 9, 24, 48], dtype=torch.int32)
    return Batch({"tokens": tokens[:, :-1], "labels": tokens[:, 1:].short(), "cu_seqlens": cu_seqlens}, {"next_token": 48})


FAMILIES = {name: importlib.import_module(path) for name, path in models.FAMILIES.items()} | {"toy": toy_family}
BATCHES = {"llama3": language_batch, "toy": toy_family.example_batch}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def batch(request, family):
    return BATCHES[request.node.callspec.params["family"]]()


@pytest.fixture
def model(family):
    model = family.Model(family.FLAVORS["debug"])
    model.init_weights(seed=1)
    return model


def test_every_family_has_a_batch_to_be_tested_with():
    assert set(BATCHES) == set(FAMILIES)


def test_loss_terms_are_those_that_the_data_count(model, batch):
    assert set(model(batch.inputs)) == set(batch.counts)


def test_loss_terms_are_fp32_scalars_that_sum_over_samples(model, batch):
    inputs = {name: value for name, value in batch.inputs.items() if name != "cu_seqlens"}
    whole = model(inputs)
    parts = [model({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(len(inputs["tokens"]))]
    for term, total in whole.items():
        assert total.shape == () and total.dtype == torch.float32
        torch.testing.assert_close(total, sum(part[term] for part in parts), rtol=1e-5, atol=0)


def test_every_parameter_gets_a_gradient_that_is_not_zero(model, batch):
    sum(model(batch.inputs).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_every_block_is_reached_by_forward_and_shares_no_parameter_with_another(model, batch):
    blocks = model.blocks()
    reached = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda module, inputs, output, number=number: reached.append(number))
    model(batch.inputs)
    assert reached == list(range(len(blocks)))
    names = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(names) == len(set(names))
    layer_parameters = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("layers.")}
    assert layer_parameters == set(names)


def test_a_model_has_no_buffers(model):
    """to_empty leaves them uninitialised, and mixed precision rounds them."""
    assert [name for name, _ in model.named_buffers()] == []


def test_a_model_built_on_meta_and_then_filled_equals_one_built_in_place(family, model, batch):
    with torch.device("meta"):
        later = family.Model(family.FLAVORS["debug"])
    assert all(parameter.is_meta for parameter in later.parameters())
    later.to_empty(device="cpu")
    later.init_weights(seed=1)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), later.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for term, total in model(batch.inputs).items():
        assert torch.equal(total, later(batch.inputs)[term])


def test_initial_values_depend_on_seed_and_name_alone(family, model):
    parts, bounds = {}, {}
    for name, parameter in model.named_parameters():
        parts[name] = parameter.detach().clone().zero_()
        bounds[id(parameter)] = name, parameter.numel() // 3, 2 * parameter.numel() // 3

    def middle(parameter):
        name, start, stop = bounds[id(parameter)]
        return parts[name].view(-1)[start:stop], start

    torch.rand(100)
    model.init_weights(seed=1, own_part=middle)
    for name, parameter in model.named_parameters():
        _, start, stop = bounds[id(parameter)]
        assert torch.equal(parts[name].flatten()[start:stop], parameter.flatten()[start:stop]), name
        assert not parts[name].flatten()[:start].any() and not parts[name].flatten()[stop:].any()
    different = family.Model(family.FLAVORS["debug"])
    different.init_weights(seed=2)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), different.parameters(), strict=True)]
    assert sum(changed) >= len(changed) / 2  # norms are ones whatever the seed


def test_logits_have_a_row_of_the_vocabulary_for_each_token(family, model, batch):
    logits = model.logits(batch.inputs)
    assert logits.shape == (*batch.inputs["tokens"].shape, family.FLAVORS["debug"].vocab_size)


def test_flops_are_linear_in_the_length_of_a_document(family):
    count = [family.flops_per_token(family.FLAVORS["debug"], seq_len) for seq_len in (1000, 2000, 3000)]
    assert count[0] > 0 and count[2] - count[1] == pytest.approx(count[1] - count[0])


def test_an_architecture_is_frozen_and_holds_plain_numbers(family):
    for architecture in family.FLAVORS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            architecture.dim = 1
        assert all(type(value) in (int, float, bool, str) for value in dataclasses.asdict(architecture).values())


def test_resolve_replaces_the_numbers_of_a_flavor():
    architecture = models.resolve("llama3", "debug", {"num_layers": 5, "rope_theta": 1000})
    base = FAMILIES["llama3"].FLAVORS["debug"]
    assert architecture == dataclasses.replace(base, num_layers=5, rope_theta=1000)
    assert len(models.build("llama3", architecture).blocks()) == 5


def test_resolve_reports_every_problem_at_once_and_what_was_meant():
    with pytest.raises(ValueError) as caught:
        models.resolve("llama3", "8b", {"dimm": 4, "num_layer": 2, "num_heads": "4", "norm_eps": True})
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    for wanted in (
        "did you mean '8B'",
        "did you mean 'dim'",
        "did you mean 'num_layers'",
        "num_heads='4' is not int",
        "norm_eps",
    ):
        assert any(wanted in line for line in lines), wanted
    with pytest.raises(ValueError, match="did you mean 'llama3'"):
        models.resolve("lama3", "debug", {})


def test_resolve_reports_numbers_that_do_not_fit_each_other():
    with pytest.raises(ValueError) as caught:
        models.resolve("llama3", "debug", {"dim": 30, "num_kv_heads": 3, "rope_low_freq_factor": 4.0})
    assert len(str(caught.value).split("\n")) == 3
    for overrides in (
        {"dim": 0},
        {"norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"ffn_dim": -1},
        {"vocab_size": 2.5},
    ):
        with pytest.raises(ValueError, match=next(iter(overrides))):
            models.resolve("llama3", "debug", overrides)
    with pytest.raises(ValueError, match="60 / 4 = 15 is odd"):
        models.resolve("llama3", "debug", {"dim": 60})
