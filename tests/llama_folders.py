"""Small Llama folders as Hugging Face's and Meta's own tools leave them, made without a line of our converters."""

import json

import torch

SHAPES = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=8, vocab_size=300)
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "mha": dict(num_key_value_heads=8),
    "gqa4": dict(num_key_value_heads=2, rope_parameters=LLAMA_31),
    "gqa8_tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
}


def hf_model(kind, dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES | KINDS[kind] | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def save_hf(folder, kind, dtype=torch.float32, max_shard_size="5GB", **changes):
    model = hf_model(kind, dtype, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def tensors_of(folder):
    """Every tensor in the safetensors files of a folder, by the safetensors package."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def save_meta(folder, num_shards, dtype=torch.float32, by_words=True):
    """(params, whole tensors) of Meta's layout in so many shards; the embedding is cut by words or by channels."""
    folder.mkdir(parents=True)
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32, "ffn_dim_multiplier": 0.9}
    params |= {"vocab_size": 300 if by_words else -1, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
    generator = torch.Generator().manual_seed(1)
    shapes = {"tok_embeddings.weight": (300, 64), "output.weight": (300, 64), "norm.weight": (64,)}
    for i in range(2):
        attention = {"wq": (64, 64), "wk": (32, 64), "wv": (32, 64), "wo": (64, 64)}
        feed_forward = {"w1": (160, 64), "w2": (64, 160), "w3": (160, 64)}  # 0.9 * 170 = 153, up to a multiple of 32
        shapes |= {f"layers.{i}.attention.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"layers.{i}.feed_forward.{name}.weight": shape for name, shape in feed_forward.items()}
        shapes |= {f"layers.{i}.{name}.weight": (64,) for name in ("attention_norm", "ffn_norm")}
    whole = {name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    by_column = ("wo.weight", "w2.weight") if by_words else ("wo.weight", "w2.weight", "tok_embeddings.weight")
    for shard in range(num_shards):
        part = {}
        for name, tensor in whole.items():
            pieces = [tensor] * num_shards
            if "norm" not in name:
                pieces = tensor.chunk(num_shards, 1 if name.endswith(by_column) else 0)
            part[name] = pieces[shard].clone()
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return params, whole
