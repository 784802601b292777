"""Llama in three dialects: ours, Hugging Face's and Meta's. Names of tensors, numbers of an architecture, the order of q and k.

Ours has Meta's names and Meta's rotary pairs (0, 1), (2, 3), ...; Hugging Face pairs channel i of a head with channel
i + D / 2, so the rows of its q and k projections lie in another order. `numbers` are those of models.llama3.Architecture.
"""

import math
import re

import torch

HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
}
HF_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")
HF_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # in old files: a function of the config
OF_THE_VOCABULARY = ("tok_embeddings.weight", "output.weight")
HF_ROPE = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
META_ROPE = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192}
# Where params.json says use_scaled_rope and no more: 8, as in Llama 3.1. Llama 3.2's two sizes have 32, which only their
# config.json on the Hub tells; their params.json reads like one of 3.1.
META_ROPE_FACTOR = 8.0
META_ROPE_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}
HF_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def hf_name(name: str) -> str:
    return HF_NAMES[re.sub(r"\.\d+\.", ".*.", name, count=1)].replace("*", "".join(re.findall(r"\d+", name)[:1]))


def is_rotary(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_hf(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A tensor of ours as Hugging Face stores it: in q and k, each head's even rows and then its odd ones."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2) if is_rotary(name) else tensor


def from_hf(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of to_hf; name is ours."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2) if is_rotary(name) else tensor


def meta_split_dim(name: str, shape: tuple[int, ...], dim: int) -> int | None:
    """Along which dimension Meta's model-parallel shards of a tensor lie; None where each holds the whole.

    Llama 3 splits the embedding by words, Llama 1 and 2 by channels: the shape of a shard tells.
    """
    if name == "tok_embeddings.weight":
        return 0 if shape[1] == dim else 1
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def numbers_of_hf(config: dict) -> dict:
    """What a config.json of Hugging Face says; ValueError with all that a Llama of ours cannot be."""
    problems = []
    if config.get("model_type") != "llama":
        raise ValueError(f"config.json: model_type={config.get('model_type')!r}; only llama is understood")
    problems += problems_of_sizes("config.json", config, HF_SIZES)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            problems.append(f"config.json: {key}={config[key]!r} is no table")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            problems.append(f"config.json: {key}=true; the projections here have no bias")
    if "quantization_config" in config:
        problems.append("config.json: quantization_config is there; take the weights that are not quantized")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act={config['hidden_act']!r}; it is silu here")
    if problems:
        raise ValueError("\n".join(problems))
    heads = config["num_attention_heads"]
    if (config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"]:
        given = f"head_dim={config['head_dim']}" if config.get("head_dim") else "a whole number"
        problems.append(
            f"config.json: hidden_size / num_attention_heads = {config['hidden_size']} / {heads} is not {given}, as it must be"
        )
    # transformers 5 writes rope_parameters, 4 writes rope_theta beside rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {}
    if kind == "llama3":
        scaling = {here: rope.get(there) for here, there in HF_ROPE.items()}
        problems += [
            f"config.json: {HF_ROPE[here]} of the rope scaling is missing" for here in scaling if scaling[here] is None
        ]
    elif kind != "default":
        problems.append(f'config.json: rope_type={kind!r}; "default" and "llama3" are understood')
    if problems:
        raise ValueError("\n".join(problems))
    return {
        "dim": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "ffn_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    } | scaling


def hf_config(numbers: dict, *, dtype: str, context: int, carried: dict | None = None) -> dict:
    """The config.json that transformers 4 and 5 read alike.

    context: the longest sequence that the model has seen. carried: of the config.json that the weights once came with, what
    says nothing of the architecture stays (tokens that begin and end a text, for instance).
    """
    rope = {"rope_type": "default"}
    if numbers["rope_scaling_factor"] != 1:
        rope = {"rope_type": "llama3"} | {there: numbers[here] for here, there in HF_ROPE.items()}
        if context <= numbers["rope_original_context"]:  # transformers calls that a mistake; what the scaling is for, then
            context = int(numbers["rope_original_context"] * numbers["rope_scaling_factor"])
    kept = {key: value for key, value in (carried or {}).items() if key in HF_CARRIED}
    return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": context} | {
        **kept,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": numbers["dim"],
        "intermediate_size": numbers["ffn_dim"],
        "num_hidden_layers": numbers["num_layers"],
        "num_attention_heads": numbers["num_heads"],
        "num_key_value_heads": numbers["num_kv_heads"],
        "head_dim": numbers["dim"] // numbers["num_heads"],
        "vocab_size": numbers["vocab_size"],
        "rms_norm_eps": numbers["norm_eps"],
        "rope_theta": numbers["rope_theta"],
        "rope_scaling": rope if len(rope) > 1 else None,
        "rope_parameters": rope | {"rope_theta": numbers["rope_theta"]},
        "tie_word_embeddings": numbers["tie_embeddings"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers called it before 4.56
    }


def numbers_of_params(params: dict, vocab_size: int) -> dict:
    """What Meta's params.json says. vocab_size: of the embedding itself, since Llama 2's file says -1."""
    sizes = {"multiple_of": 256} | params
    if problems := problems_of_sizes("params.json", sizes, ("dim", "n_layers", "n_heads", "multiple_of")):
        raise ValueError("\n".join(problems))
    if not isinstance(params.get("ffn_dim_multiplier") or 1, int | float):
        raise ValueError(f"params.json: ffn_dim_multiplier={params['ffn_dim_multiplier']!r} is no number")
    numbers = {
        "dim": params["dim"],
        "num_layers": params["n_layers"],
        "num_heads": params["n_heads"],
        "num_kv_heads": params.get("n_kv_heads") or params["n_heads"],
        "ffn_dim": meta_ffn_dim(params["dim"], sizes["multiple_of"], params.get("ffn_dim_multiplier")),
        "vocab_size": vocab_size,
        "norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 1e4),
    }
    if params.get("use_scaled_rope"):
        numbers |= META_ROPE | {"rope_scaling_factor": params.get("rope_scaling_factor") or usual_rope_factor(numbers)}
        numbers["rope_high_freq_factor"] = params.get("rope_high_freq_factor") or META_ROPE["rope_high_freq_factor"]
    return numbers


def usual_rope_factor(numbers: dict) -> float:
    return META_ROPE_FACTORS.get((numbers["dim"], numbers["num_layers"]), META_ROPE_FACTOR)


def problems_of_sizes(file: str, settings: dict, keys) -> list[str]:
    """A line for each of these that is no positive whole number."""
    return [
        f"{file}: {key} is missing" if key not in settings else f"{file}: {key}={settings[key]!r} is no positive whole number"
        for key in keys
        if type(settings.get(key)) is not int or settings[key] < 1
    ]


def meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of four times the width, times the multiplier, rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    hidden = hidden if multiplier is None else int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def params_of(numbers: dict) -> dict:
    """Meta's params.json; ValueError where it has no words for a number."""
    params = {
        "dim": numbers["dim"],
        "n_layers": numbers["num_layers"],
        "n_heads": numbers["num_heads"],
        "n_kv_heads": numbers["num_kv_heads"],
        "vocab_size": numbers["vocab_size"],
        "norm_eps": numbers["norm_eps"],
        "rope_theta": numbers["rope_theta"],
    } | _ffn_rule(numbers["dim"], numbers["ffn_dim"])
    if numbers["rope_scaling_factor"] != 1:
        params["use_scaled_rope"] = True  # which Meta's programs before Llama 3.1 do not know
        other = [f"{key}={numbers[key]} (it is {value} there)" for key, value in META_ROPE.items() if numbers[key] != value]
        if other:
            raise ValueError(f"Meta's params.json cannot say {', '.join(other)}; use --format hf")
        if numbers["rope_scaling_factor"] != usual_rope_factor(numbers):
            params["rope_scaling_factor"] = numbers["rope_scaling_factor"]
    return params


def _ffn_rule(dim: int, ffn_dim: int) -> dict:
    """multiple_of and ffn_dim_multiplier from which Meta's rule makes ffn_dim: those of a release where they do."""
    for multiple_of, multiplier in ((256, None), (1024, 1.3), (4096, 1.2), (256, 1.5)):
        if meta_ffn_dim(dim, multiple_of, multiplier) == ffn_dim:
            return {"multiple_of": multiple_of} | ({} if multiplier is None else {"ffn_dim_multiplier": multiplier})
    # The middle between ffn_dim and the number above it is safe from rounding.
    multiplier = (ffn_dim + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
