"""The Llama: against transformers', against itself packed, chunked, recomputed and compiled, and against arithmetic."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_bio import attention, models
from torchtitan_bio.models import layers, llama3
from torchtitan_bio.models.llama3 import FLAVORS, Architecture, Model

TOLERANCE = 1e-5  # relative to the tensor's largest value, in fp32
SMALL = Architecture(dim=48, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=80, vocab_size=61, rope_theta=100.0)
SCALED = {"rope_scaling_factor": 8.0, "rope_original_context": 32}


def with_lively_weights(model, seed=0):
    """Weights that leave no norm at 1 and attention far from uniform, so that an error in either shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1 + 0.3 * noise)
    return model


def example(batch=2, tokens=64, vocab_size=61, cu_seqlens=None):
    drawn = torch.randint(0, vocab_size, (batch, tokens + 1))
    labels = drawn[:, 1:].short()
    labels[:, ::7] = layers.IGNORED
    return {"tokens": drawn[:, :-1].to(torch.uint8), "labels": labels, "cu_seqlens": cu_seqlens}


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train_once(model, inputs):
    """The loss and its gradients by parameter name."""
    model.zero_grad()
    loss = model(inputs)["next_token"]
    loss.backward()
    return {"loss": loss.detach()} | gradients_of(model)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name in ours:
        error = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error <= tolerance, f"{name}: {error:.2g}"


# ---- transformers as the oracle


def halves(weight, num_heads):
    """Rows of interleaved pairs reordered to transformers' halves."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def as_transformers_names(tensors, a):
    within = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    outside = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    renamed = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, number, part = stem.split(".", 2)
            heads = {"attention.wq": a.num_heads, "attention.wk": a.num_kv_heads}.get(part)
            renamed[f"model.layers.{number}.{within[part]}.weight"] = halves(tensor, heads) if heads else tensor
        else:
            renamed[f"{outside[stem]}.weight"] = tensor
    return renamed


def transformers_model(a):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_theta": a.rope_theta, "rope_type": "default"}
    if a.rope_scaling_factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": a.rope_scaling_factor,
            "low_freq_factor": a.rope_low_freq_factor,
            "high_freq_factor": a.rope_high_freq_factor,
            "original_max_position_embeddings": a.rope_original_context,
        }
    config = LlamaConfig(
        hidden_size=a.dim,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        intermediate_size=a.ffn_dim,
        vocab_size=a.vocab_size,
        rms_norm_eps=a.norm_eps,
        max_position_embeddings=256,
        rope_parameters=rope,
        tie_word_embeddings=a.tie_embeddings,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 4}, {"num_kv_heads": 1}, SCALED, {"tie_embeddings": True}, {"rope_theta": 5e5, "norm_eps": 1e-2}],
    ids=["grouped", "ungrouped", "one kv head", "llama3 scaling", "tied", "theta and eps"],
)
def test_logits_and_gradients_equal_those_of_transformers(changes):
    a = dataclasses.replace(SMALL, **changes)
    ours, theirs, inputs = with_lively_weights(Model(a)), transformers_model(a), example()
    missing, unexpected = theirs.load_state_dict(as_transformers_names(ours.state_dict(), a), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if a.tie_embeddings else [])
    their_logits = theirs(inputs["tokens"].long()).logits
    assert_close({"logits": ours.logits(inputs)}, {"logits": their_logits})
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), inputs["labels"].long().flatten(), reduction="sum")
    their_loss.backward()
    mine = train_once(ours, inputs)
    assert_close({"loss": mine.pop("loss")}, {"loss": their_loss.detach()})
    assert_close(as_transformers_names(mine, a), gradients_of(theirs))


def test_rope_scaling_changes_the_logits():
    """Otherwise the comparison above would say nothing of it."""
    inputs = example()
    plain, scaled = (with_lively_weights(Model(dataclasses.replace(SMALL, **changes))) for changes in ({}, SCALED))
    assert (plain.logits(inputs) - scaled.logits(inputs)).abs().max() > 0.1


# ---- Rotary positions


def test_the_rope_table_tells_131072_positions_apart_in_a_bf16_model():
    seen = []

    model = Model(dataclasses.replace(FLAVORS["debug"], num_layers=1), lambda q, k, v, **options: q).to(torch.bfloat16)
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    with torch.no_grad():
        model.logits({"tokens": torch.zeros(1, 131072, dtype=torch.uint8)})
    cos, sin = seen[0]
    assert cos.dtype == sin.dtype == torch.float32
    assert len(torch.unique(torch.cat((cos, sin), dim=-1)[:, 0], dim=0)) == 131072


def test_rotated_queries_and_keys_meet_at_an_angle_that_depends_on_their_distance_alone():
    rope = layers.rope_table(64, layers.rope_frequencies(16, 100.0))
    q, k = (layers.rotate(torch.randn(16).expand(1, 64, 1, 16), rope)[0, :, 0] for _ in range(2))
    scores = q @ k.T
    for distance in (0, 1, 20):
        along = torch.diagonal(scores, -distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-4)


# ---- Packing, causality


def test_packed_documents_equal_separate_ones():
    model, bounds = with_lively_weights(Model(SMALL)), [0, 1, 20, 64, 90, 128]
    inputs = example(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    packed = train_once(model, inputs) | {"logits": model.logits(inputs).detach().flatten(0, 1)}
    model.zero_grad()
    total, logits = 0.0, []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        alone = {name: inputs[name].flatten()[None, start:stop] for name in ("tokens", "labels")}
        loss = model(alone)["next_token"]
        loss.backward()
        total += loss.detach()
        logits.append(model.logits(alone).detach()[0])
    assert_close(packed, {"loss": total, **gradients_of(model), "logits": torch.cat(logits)})


def test_boundaries_of_rows_alone_are_the_same_as_none():
    model = with_lively_weights(Model(SMALL))
    plain = example()
    rows = plain | {"cu_seqlens": torch.tensor([0, 64, 128], dtype=torch.int32)}
    assert torch.equal(model.logits(plain), model.logits(rows))


def test_a_token_changes_no_logit_before_it_and_none_of_another_document():
    model = with_lively_weights(Model(SMALL))
    inputs = example(batch=1, cu_seqlens=torch.tensor([0, 25, 50, 64], dtype=torch.int32))
    before = model.logits(inputs)
    for position in (0, 24, 25, 40):
        changed = inputs | {"tokens": inputs["tokens"].clone()}
        changed["tokens"][0, position] = (changed["tokens"][0, position] + 1) % 61
        moved = (model.logits(changed) != before).any(-1)[0].nonzero().flatten()
        end = 25 if position < 25 else 50
        assert moved.min() == position and moved.max() == end - 1


# ---- The loss


@pytest.mark.parametrize("at_once", [61, 61 * 50, 61 * 128], ids=["a token", "uneven chunks", "all"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_chunked_loss_equals_the_plain_one(at_once, tie_embeddings, monkeypatch):
    model, inputs = with_lively_weights(Model(dataclasses.replace(SMALL, tie_embeddings=tie_embeddings))), example()
    plain = train_once(model, inputs)
    monkeypatch.setattr(layers.token_loss, "__defaults__", (at_once,))
    assert_close(train_once(model, inputs), plain)


def test_the_chunked_loss_never_holds_all_logits():
    hidden, weight = torch.randn(1, 4096, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    labels, kept = torch.randint(0, 512, (1, 4096)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        layers.token_loss(hidden, weight, labels, at_once=512 * 64)
    assert max(kept) < 512 * 4096 / 10


def test_the_weights_gradient_in_bf16_does_not_get_worse_with_the_number_of_chunks():
    hidden, weight = torch.rand(1, 2048, 8), torch.randn(32, 8)
    labels = torch.randint(0, 32, (1, 2048))

    def gradient(dtype, at_once):
        ours = weight.bfloat16().to(dtype).requires_grad_()
        layers.token_loss(hidden.bfloat16().to(dtype), ours, labels, at_once=at_once).backward()
        return ours.grad.float()

    exact = gradient(torch.float32, 2**30)
    error = (gradient(torch.bfloat16, 32 * 4) - exact).abs().max() / exact.abs().max()
    assert error < 1e-2  # 512 chunks, each rounded to bf16 on its own; summed in bf16 they would lose whole bits


def test_a_batch_without_targets_has_loss_0_and_gradients_0():
    model, inputs = with_lively_weights(Model(SMALL)), example()
    inputs["labels"].fill_(layers.IGNORED)
    result = train_once(model, inputs)
    assert all((tensor == 0).all() for tensor in result.values())


# ---- Sizes and first values


def num_parameters(architecture):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Model(architecture).parameters())


def test_flavors_have_the_sizes_that_their_names_say():
    counts = {name: num_parameters(architecture) for name, architecture in FLAVORS.items()}
    assert counts["8B"] == 6_981_685_248 and counts["quickstart"] == 174_528
    for name, wanted in {"250M": 0.25e9, "870M": 0.87e9, "2B": 2.04e9}.items():
        assert counts[name] == pytest.approx(wanted, rel=0.01)
    # With the language vocabulary, the 8B is Meta's.
    language = dataclasses.replace(FLAVORS["8B"], vocab_size=128256)
    assert num_parameters(language) == 8_030_261_248


def test_large_flavors_have_metas_feed_forward_width():
    for name in ("250M", "870M", "1B", "2B", "8B"):
        a = FLAVORS[name]
        assert a.ffn_dim == -(-int(1.3 * int(2 * 4 * a.dim / 3)) // 1024) * 1024


def test_parameters_are_named_as_metas():
    names = {name for name, _ in Model(FLAVORS["debug"]).named_parameters()}
    inside = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    inside += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    expected = {f"layers.{number}.{part}.weight" for number in (0, 1) for part in inside}
    assert names == expected | {"tok_embeddings.weight", "norm.weight", "output.weight"}


def test_first_values_do_not_depend_on_which_other_parameters_exist():
    small, large = (Model(dataclasses.replace(SMALL, num_layers=count)) for count in (2, 4))
    for model in (large, small):
        model.init_weights(seed=7)
    others = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        if not name.endswith(("wo.weight", "w2.weight")):  # scaled by the depth
            assert torch.equal(parameter, others[name]), name


def test_the_logits_of_a_new_model_have_a_spread_of_1():
    for tie_embeddings in (False, True):
        model = Model(dataclasses.replace(FLAVORS["quickstart"], tie_embeddings=tie_embeddings))
        model.init_weights(seed=0)
        assert model.logits(example(4, 256, 256)).std().item() == pytest.approx(1, abs=0.1)


# ---- Recomputed, compiled, in bf16, sharded


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit():
    model, inputs = with_lively_weights(Model(SMALL)), example(cu_seqlens=torch.tensor([0, 20, 64, 128], dtype=torch.int32))
    straight = train_once(model, inputs)
    for block in model.blocks():
        forward = block.forward
        block.forward = lambda *arguments, forward=forward: checkpoint(forward, *arguments, use_reentrant=False)
    again = train_once(model, inputs)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def compiled_blocks(model, **options):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend=counter, **options)
    return counter


def test_a_block_compiles_without_a_graph_break_and_gives_the_same_gradients():
    kernel = attention.choose("auto", device="cpu", dtype=torch.float32, head_dim=SMALL.head_dim)
    model, inputs = with_lively_weights(Model(SMALL, kernel)), example()
    eager = train_once(model, inputs)
    compiled_blocks(model, fullgraph=True)
    assert_close(train_once(model, inputs), eager)


def test_new_documents_in_every_batch_do_not_compile_anew():
    kernel = attention.choose("auto", device="cpu", dtype=torch.float32, head_dim=SMALL.head_dim)
    model = with_lively_weights(Model(SMALL, kernel))
    batches = [[0, 64, 128], [0, 20, 64, 128], [0, 64, 90, 128], [0, 10, 20, 64, 128]]
    batches += [[0, 64, *range(65, 65 + more), 128] for more in range(2, 6)]
    inputs = [example(cu_seqlens=torch.tensor(bounds, dtype=torch.int32)) for bounds in batches]
    eager = [train_once(model, each) for each in inputs]
    counter = compiled_blocks(model)
    frames = []
    for each, expected in zip(inputs, eager, strict=True):
        assert_close(train_once(model, each), expected)
        frames.append(counter.frame_count)
    # One graph without documents, then one for a first number of them, then one for every number.
    assert frames[2] == frames[1] and len(set(frames[3:])) == 1, frames


def test_in_bf16_the_residual_stream_is_bf16_and_the_loss_fp32():
    kernel = attention.choose("auto", device="cpu", dtype=torch.bfloat16, head_dim=SMALL.head_dim)
    model, inputs = (
        with_lively_weights(Model(SMALL, kernel)),
        example(cu_seqlens=torch.tensor([0, 20, 64, 128], dtype=torch.int32)),
    )
    exact, stream = model(inputs)["next_token"], []
    model.to(torch.bfloat16)
    for block in model.blocks():
        block.register_forward_hook(lambda module, arguments, output: stream.append(output.dtype))
    loss = model(inputs)["next_token"]
    assert stream == [torch.bfloat16] * 2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


def sharded_in_bf16(rank):
    """What the blocks of an FSDP2 model are handed, and its loss."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, seen = Model(SMALL), []
    model.init_weights(seed=0)
    torch.manual_seed(0)
    inputs = example()
    exact = model(inputs)["next_token"].item()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        block.attention.attend = lambda q, k, v, **options: seen.append(q.dtype) or attention.TORCH_CHOICE(q, k, v, **options)
        block.register_forward_pre_hook(lambda module, arguments: seen.extend([arguments[0].dtype, arguments[1][0].dtype]))
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    loss = model(inputs)["next_token"]
    loss.backward()
    gradients = all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    return seen, loss.item(), exact, gradients


def test_under_fsdp_mixed_precision_positions_stay_fp32_and_the_rest_is_bf16():
    for seen, loss, exact, gradients in on_ranks(2, sharded_in_bf16):
        assert seen == [torch.bfloat16, torch.float32, torch.bfloat16] * 2
        assert loss == pytest.approx(exact, rel=1e-2)
        assert gradients


# ---- FLOPs


def test_flops_are_those_that_torch_counts_for_the_matrices_and_half_of_full_attention():
    a, tokens = dataclasses.replace(SMALL, vocab_size=64), 64
    model, inputs = Model(a, lambda q, k, v, **options: attention.by_definition(q, k, v)), example(1, tokens)
    model.init_weights(seed=0)
    with FlopCounterMode(display=False) as counter:
        model(inputs)["next_token"].backward()
    half_of_attention = 6 * a.num_layers * a.dim * tokens * tokens
    counted = counter.get_total_flops() - half_of_attention
    assert llama3.flops_per_token(a, tokens) * tokens == counted


def test_the_8b_at_131072_tokens_costs_145_gigaflops_a_token():
    a = FLAVORS["8B"]
    assert llama3.flops_per_token(a, 131072) / 1e9 == pytest.approx(144.96, abs=0.01)
    assert (llama3.flops_per_token(a, 131072) - llama3.flops_per_token(a, 0)) / 1e9 == pytest.approx(103.08, abs=0.01)


def test_resolve_gives_the_language_llama_that_a_warm_start_needs():
    overrides = {"vocab_size": 128256, "rope_scaling_factor": 8, "rope_theta": 500000.0}
    a = models.resolve("llama3", "8B", overrides)
    assert (a.vocab_size, a.rope_scaling_factor, a.head_dim) == (128256, 8, 128)
