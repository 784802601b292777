"""Sampling against a plain loop that runs the whole sequence through the model for every token, and against probabilities."""

import dataclasses

import numpy as np
import pytest
import torch
from small_llama import SMALL, lively

from torchtitan_bio.data import keyed
from torchtitan_bio.models.kv_cache import KVCache
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.science import sampling

TOLERANCE = 1e-5  # relative to the largest logit, in fp32
SPIKES = dataclasses.replace(SMALL, vocab_size=256)
SCALED = {"rope_scaling_factor": 8.0, "rope_original_context": 32}
CPU = torch.device("cpu")


def cache_for(architecture, **sizes):
    a = architecture
    kernel = sampling.choose_kernel(CPU, torch.float32, a.head_dim)
    numbers = {"num_layers": a.num_layers, "num_kv_heads": a.num_kv_heads, "head_dim": a.head_dim}
    return KVCache(kernel, **numbers, **sizes, dtype=torch.float32, device=CPU)


def sampler_for(model, **settings):
    kernel = sampling.choose_kernel(CPU, torch.float32, model.architecture.head_dim)
    return sampling.Sampler(model=model, kernel=kernel, dtype=torch.float32, device=CPU, **settings)


def some_counts(neurons, bins, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (neurons, bins)).astype(np.uint8)


def encode(counts):
    return sampling.encode(counts[None])


def fed(cache, model, tokens, bounds):
    return torch.cat([cache.feed(model, tokens[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)], dim=1)


# ---- The cache


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 4}, {"num_kv_heads": 1}, SCALED, {"tie_embeddings": True}, {"rope_theta": 5e5}],
    ids=["grouped", "ungrouped", "one kv head", "llama3 scaling", "tied", "theta"],
)
def test_cached_logits_equal_the_whole_forward_pass_wherever_chunks_end(changes):
    architecture = dataclasses.replace(SPIKES, **changes)
    model = lively(Model(architecture))
    tokens = torch.randint(0, 256, (3, 97), dtype=torch.uint8)
    tokens[:, :41] = tokens[0, :41]  # what the three share is cached and read once
    expected = model.logits({"tokens": tokens})
    shared = cache_for(architecture, batch=1, capacity=41)
    ours = fed(shared, model, tokens[:1], (0, 7, 8, 39, 41))
    assert (ours - expected[:1, :41]).abs().max() < TOLERANCE * expected.abs().max()
    own = cache_for(architecture, batch=3, capacity=56, before=shared)
    ours = fed(own, model, tokens, (41, 42, 43, 45, 46, 63, 96, 97))
    assert (ours - expected[:, 41:]).abs().max() < TOLERANCE * expected.abs().max()


def test_a_full_cache_refuses_more_tokens_and_stays_as_it_is():
    model = lively(Model(SPIKES))
    tokens = torch.randint(0, 256, (1, 9), dtype=torch.uint8)
    cache = cache_for(SPIKES, batch=1, capacity=8)
    cache.feed(model, tokens[:, :7])
    with pytest.raises(ValueError, match="7 of at most 8 tokens; 2 more"):
        cache.feed(model, tokens[:, 7:])
    last = cache.feed(model, tokens[:, 7:8])[:, -1]
    assert torch.allclose(last, model.logits({"tokens": tokens[:, :8]})[:, -1], atol=1e-4)


# ---- Rollouts


def one_by_one(model, counts, bins, number, *, seed, temperature=1.0, top_k=None, first_bin=0):
    """A rollout by the definition, in NumPy's float64: no cache, no batch, a whole forward pass for every token."""
    n, tokens = len(counts), encode(counts)[0].tolist()
    chance = keyed.uniform((first_bin + bins) * n, seed, sampling.ROLLOUTS, number)[first_bin * n :]
    for place in range(bins * n):
        if len(tokens) % (n + 1) == 0:
            tokens.append(255)
        with torch.no_grad():
            logits = model.logits({"tokens": torch.tensor([tokens], dtype=torch.uint8)})[0, -1, :255]
        logits = logits.double().numpy() / temperature
        if top_k:
            logits[np.argsort(logits)[:-top_k]] = -np.inf
        shares = np.exp(logits - logits.max())
        cumulative = np.cumsum(shares / shares.sum())
        tokens.append(int(np.searchsorted(cumulative, chance[place] * cumulative[-1], side="right")))
    tokens = np.array(tokens[counts.size + counts.shape[1] :]).reshape(bins, n + 1)
    assert (tokens[:, 0] == 255).all()
    return tokens[:, 1:].T


@pytest.mark.parametrize(
    "neurons, context, settings",
    [(5, 6, {}), (1, 9, {"temperature": 0.7}), (4, 0, {"top_k": 3})],
    ids=["plain", "one neuron, cold", "no prompt, top-k"],
)
def test_rollouts_equal_a_loop_without_cache_and_without_batch(neurons, context, settings):
    model, counts = lively(Model(SPIKES)), some_counts(neurons, context)
    sampler = sampler_for(model, seed=3, chunk_tokens=11, **settings)
    prompt = sampler.read(encode(counts), neurons)
    ours = sampler.roll_out(prompt, bins=6, rollouts=[4, 0])
    for drawn, number in zip(ours, (4, 0), strict=True):
        assert (drawn == one_by_one(model, counts, 6, number, seed=3, **settings)).all()
    assert (ours[0] != ours[1]).any()


def test_a_rollout_is_the_same_in_any_batch():
    model, counts = lively(Model(SPIKES)), some_counts(5, 6)
    sampler = sampler_for(model)
    prompt = sampler.read(encode(counts), 5)
    together = sampler.roll_out(prompt, bins=5, rollouts=list(range(6)))
    for split in ([[0], [1], [2], [3], [4], [5]], [[0, 1, 2, 3], [4, 5]], [[5, 3], [1, 0, 2, 4]]):
        for group in split:
            assert (sampler.roll_out(prompt, bins=5, rollouts=group) == together[group]).all()


def test_rollouts_of_prompts_of_their_own_are_those_that_share_each():
    model, prompts = lively(Model(SPIKES)), np.stack([some_counts(4, 5, seed) for seed in range(3)])
    sampler = sampler_for(model, chunk_tokens=7)
    together = sampler.roll_out(sampler.read(sampling.encode(prompts), 4), bins=4, rollouts=[0, 1, 2])
    for number, counts in enumerate(prompts):
        alone = sampler.roll_out(sampler.read(encode(counts), 4), bins=4, rollouts=[number])
        assert (together[number] == alone[0]).all()


@pytest.mark.parametrize("context, window", [(3, 6), (9, 6), (0, 5), (2, 1)])
def test_a_window_goes_on_from_its_last_half_when_it_is_full(context, window):
    model, prompts = lively(Model(SPIKES)), np.stack([some_counts(3, context)] * 2)
    sampler = sampler_for(model, seed=5)
    seen = sampling.visible(prompts, window)
    prompt = sampler.read(sampling.encode(seen[:1]), 3)
    drawn = sampler.go_on(seen, prompt, bins=11, rollouts=[0, 7], window_bins=window)
    assert drawn.shape == (2, 3, 11)
    for number, ours in zip((0, 7), drawn, strict=True):
        history, seen_by_model = prompts[0], []
        while history.shape[1] < context + 11:
            known = history if history.shape[1] < window else history[:, history.shape[1] - window // 2 :]
            leg = min(window - known.shape[1], context + 11 - history.shape[1])
            first_bin = history.shape[1] - context
            more = one_by_one(model, known.astype(np.uint8), leg, number, seed=5, first_bin=first_bin)
            history = np.concatenate((history, more), axis=1)
            seen_by_model.append(known.shape[1] + leg)
        assert (ours == history[:, context:]).all() and max(seen_by_model) == window and len(seen_by_model) > 1


def test_more_bins_leave_the_first_ones_as_they_are_and_another_seed_does_not():
    model, counts = lively(Model(SPIKES)), some_counts(3, 4)
    prompt = sampler_for(model).read(encode(counts), 3)
    few, more = (sampler_for(model).roll_out(prompt, bins=bins, rollouts=[0, 1]) for bins in (2, 7))
    assert (more[:, :, :2] == few).all()
    assert (sampler_for(model, seed=1).roll_out(prompt, bins=7, rollouts=[0, 1]) != more).any()


def test_a_separator_or_a_token_that_is_no_count_is_never_drawn():
    model = lively(Model(dataclasses.replace(SPIKES, vocab_size=300)))
    with torch.no_grad():  # it wants nothing else
        model.norm.weight.fill_(1)
        model.tok_embeddings.weight[:, 0] = 30
        model.output.weight[255:, 0] += 5
    logits = model.logits({"tokens": torch.randint(0, 255, (2, 20))})
    assert (logits.argmax(-1) >= 255).all()
    sampler = sampler_for(model)
    drawn = sampler.roll_out(sampler.read(encode(some_counts(3, 2)), 3), bins=4, rollouts=[0, 1])
    assert drawn.shape == (2, 3, 4) and drawn.max() <= 254


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"temperature": 0.5, "top_k": 5}], ids=str)
def test_counts_are_drawn_with_the_probabilities_of_the_model(settings):
    model, num_rollouts = lively(Model(SPIKES)), 20_000
    sampler = sampler_for(model, **settings)
    prompt = sampler.read(encode(some_counts(1, 3)), 1)
    scores = prompt.logits[0, :255].double() / settings.get("temperature", 1)
    if "top_k" in settings:
        scores[scores.argsort()[: -settings["top_k"]]] = -torch.inf
    expected = scores.softmax(0).numpy()
    drawn = sampler.roll_out(prompt, bins=1, rollouts=list(range(num_rollouts)))[:, 0, 0]
    seen = np.bincount(drawn, minlength=255)
    assert (seen[expected == 0] == 0).all()
    often = expected * num_rollouts >= 10
    chi_square = (((seen - expected * num_rollouts) ** 2)[often] / (expected * num_rollouts)[often]).sum()
    degrees = often.sum() - 1
    assert often.sum() >= 5 and chi_square < degrees + 5 * np.sqrt(2 * degrees)


# ---- Refusals


def test_a_prompt_that_does_not_end_at_a_bin_is_refused():
    sampler, tokens = sampler_for(lively(Model(SPIKES))), encode(some_counts(5, 3))
    with pytest.raises(ValueError, match="must end at a bin's edge: 17 tokens are 2 bins of a separator and 5 neurons, and 5"):
        sampler.read(tokens[:, :-1], 5)
    for wrong in (tokens.roll(1), torch.where(torch.arange(18) == 7, 255, tokens)):
        with pytest.raises(ValueError, match="separator, 255, at every 6th token and nowhere else"):
            sampler.read(wrong.to(torch.uint8), 5)


def test_settings_that_cannot_work_are_refused_together():
    with pytest.raises(ValueError) as refusal:
        sampler_for(Model(SPIKES), temperature=0.0, top_k=256)
    assert "temperature=0.0" in str(refusal.value) and "top_k=256 does not lie in 1 .. 255" in str(refusal.value)
    with pytest.raises(ValueError, match="vocab_size=61 has no separator"):
        sampler_for(Model(SMALL))
