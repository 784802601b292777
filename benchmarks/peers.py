"""What this project is compared with, on the same weights: the predecessor's block, told again, and transformers' Llama.

Each keeps the contract of a model family, so that parallelize and train.train_step take it as they take ours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_bio.models.layers import IGNORED
from torchtitan_bio.models.llama3 import Architecture


def summed_loss(logits: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
    labels = inputs["labels"].flatten().long()
    return {"next_token": F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum", ignore_index=IGNORED)}


class EagerNorm(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(a.dim)), a.norm_eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class PredecessorAttention(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.head_dim, self.repeats = a.head_dim, a.num_heads // a.num_kv_heads
        self.wq = nn.Linear(a.dim, a.num_heads * a.head_dim, bias=False)
        self.wk = nn.Linear(a.dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wv = nn.Linear(a.dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wo = nn.Linear(a.num_heads * a.head_dim, a.dim, bias=False)

    def forward(self, x, turns):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv))
        q, k = (
            torch.view_as_real(torch.view_as_complex(part.float().unflatten(-1, (-1, 2))) * turns).flatten(3).type_as(part)
            for part in (q, k)
        )
        k, v = (part.repeat_interleave(self.repeats, dim=2) for part in (k, v))
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class PredecessorBlock(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.attention, self.attention_norm, self.ffn_norm = PredecessorAttention(a), EagerNorm(a), EagerNorm(a)
        shapes = {"w1": (a.dim, a.ffn_dim), "w2": (a.ffn_dim, a.dim), "w3": (a.dim, a.ffn_dim)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x, turns):
        x = x + self.attention(self.attention_norm(x), turns)
        w1, w2, w3 = (self.feed_forward[name] for name in ("w1", "w2", "w3"))
        n = self.ffn_norm(x)
        return x + w2(F.silu(w1(n)) * w3(n))


class Predecessor(nn.Module):
    """Eager norms, complex rotary positions in fp32, keys and values repeated for each query head."""

    def __init__(self, a: Architecture):
        super().__init__()
        self.architecture = a
        self.tok_embeddings = nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.ModuleList(PredecessorBlock(a) for _ in range(a.num_layers))
        self.norm, self.output = EagerNorm(a), nn.Linear(a.dim, a.vocab_size, bias=False)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, inputs: dict) -> dict[str, torch.Tensor]:
        return summed_loss(self.logits(inputs), inputs)

    def logits(self, inputs: dict) -> torch.Tensor:
        a, tokens = self.architecture, inputs["tokens"]
        pairs = torch.arange(0, a.head_dim, 2, device=tokens.device)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), a.rope_theta ** -(pairs / a.head_dim))
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        x = self.tok_embeddings(tokens.long())
        for block in self.layers:
            x = block(x, turns)
        return self.output(self.norm(x))


class Transformers(nn.Module):
    """transformers' LlamaForCausalLM with torch's fused attention; `checkpointed` is its own gradient checkpointing."""

    def __init__(self, a: Architecture, checkpointed: bool):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.architecture = a
        config = LlamaConfig(
            hidden_size=a.dim,
            num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_heads,
            num_key_value_heads=a.num_kv_heads,
            intermediate_size=a.ffn_dim,
            vocab_size=a.vocab_size,
            rms_norm_eps=a.norm_eps,
            rope_parameters={"rope_theta": a.rope_theta, "rope_type": "default"},
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.llama = LlamaForCausalLM(config)
        if checkpointed:
            now, before = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(self.llama, now if hasattr(self.llama, now) else before)({"use_reentrant": False})

    def blocks(self) -> list[nn.Module]:
        return list(self.llama.model.layers)

    def forward(self, inputs: dict) -> dict[str, torch.Tensor]:
        return summed_loss(self.logits(inputs), inputs)

    def logits(self, inputs: dict) -> torch.Tensor:
        return self.llama(input_ids=inputs["tokens"].long()).logits


def transformers_names(weights: dict[str, torch.Tensor], a: Architecture) -> dict[str, torch.Tensor]:
    """Weights under Meta's names as Transformers has them: q and k come from interleaved pairs into halves."""
    names = {
        "tok_embeddings": "embed_tokens",
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
    heads = {"wq": a.num_heads, "wk": a.num_kv_heads}
    renamed = {}
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in heads:
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed["llama.lm_head.weight" if part == "output" else f"llama.model.{name}"] = weight
    return renamed
