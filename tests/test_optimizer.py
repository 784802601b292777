import pytest
import torch
from torch import nn

from torchtitan_bio import optimizer

SCHEDULE = dict(steps=100, warmup_steps=10, decay_type="linear", decay_ratio="auto", min_lr_factor=0.1)


def curve(**changes):
    settings = SCHEDULE | changes
    return [optimizer.lr_factor(step, **settings) for step in range(settings["steps"])]


def test_warmup_rises_in_equal_steps_to_the_peak():
    assert curve()[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_ends_at_the_floor_on_the_last_update(shape):
    factors = curve(decay_type=shape)
    assert factors[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(factors[9:], factors[10:], strict=False))


def test_halfway_a_cosine_is_halfway_down():
    assert curve(decay_type="cosine", warmup_steps=0)[49] == pytest.approx(0.55)


def test_a_constant_rate_stays_at_the_peak():
    assert set(curve(decay_type="constant")[10:]) == {1.0}


def test_warmup_stable_decay_holds_the_peak_until_the_last_fifth():
    factors = curve(decay_ratio=0.2)
    assert set(factors[9:80]) == {1.0} and factors[80] < 1.0 and factors[-1] == pytest.approx(0.1)


def test_a_warmup_longer_than_the_run_is_shortened_to_it():
    assert curve(steps=4, warmup_steps=1000) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_norms_biases_and_embeddings_do_not_decay():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "linear": nn.Linear(2, 2), "norm": nn.RMSNorm(2)})
    decayed, kept = optimizer.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [model["linear"].weight]
    assert kept["weight_decay"] == 0.0 and len(kept["params"]) == 3


def test_a_model_with_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        optimizer.build(model, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1)


def test_adamw_with_decay_equals_the_formula():
    """A float64 reference of two updates, decoupled decay included."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False).double()
    weight, gradient = model.weight.detach().clone(), torch.randn(3, 3, dtype=torch.float64)
    adamw = optimizer.build(model, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2):
        model.weight.grad = gradient.clone()
        adamw.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)
