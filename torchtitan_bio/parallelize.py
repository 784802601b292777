"""From a model on the meta device to one that is recomputed, compiled, sharded and filled: the same calls for 1 rank or 1,000.

Only the contract of a model family is used: blocks() and init_weights(seed, own_part).
"""

import fnmatch
import functools
import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from torchtitan_bio.recompute import HostMemory, KeptAttention, recomputed


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Stop training the parameters whose names match, before sharding; their names."""
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if idle:
        raise ValueError(f"model.freeze: no parameter is called {', '.join(idle)}; names look like {names[0]}, {names[-1]}")
    frozen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    recompute: str,
    compile_blocks: bool,
    reshard_after_forward: bool,
    kept_attention: KeptAttention | None = None,
    inputs_on_host: HostMemory | None = None,
    offload_states: bool = False,
):
    """Wrap and shard the model's blocks, then the rest of it, in place. Parameter names stay what they are.

    recompute is "none", "full" or "keep_attention", which needs the model's own attend as kept_attention. inputs_on_host is
    where the inputs of recomputed blocks wait. offload_states moves parameters, gradients and so the optimizer to the host.

    A block's forward is replaced on the block itself: a wrapping module would put a prefix into every name.
    """
    if recompute not in ("none", "full", "keep_attention"):
        raise ValueError(f"recompute={recompute!r} is not one of none, full, keep_attention")
    if (recompute == "keep_attention") != (kept_attention is not None):
        raise ValueError(
            f"recompute={recompute!r} with kept_attention={kept_attention}: keep_attention needs it, others do not"
        )
    if inputs_on_host and recompute == "none":
        raise ValueError("inputs_on_host needs recomputed blocks: recompute='full' or 'keep_attention', not 'none'")
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    # Inputs are not cast: RoPE tables handed to the blocks must stay fp32, and embeddings already come in the compute type.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload_states else OffloadPolicy()
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for block in model.blocks():
        # Compiled inside, recomputed outside: what is kept or moved is decided between compiled graphs, not within.
        if compile_blocks:
            block.forward = torch.compile(block.forward)
        if recompute != "none":
            block.forward = recomputed(block.forward, kept=kept_attention, inputs=inputs_on_host)
        shard(block, reshard_after_forward=reshard_after_forward)
    # The root's own parameters are used last in forward and first in backward: freeing them between would gather them twice.
    shard(model, reshard_after_forward=False)
    if hasattr(model, "logits"):
        register_fsdp_forward_method(model, "logits")


def materialize(model: nn.Module, device: torch.device, seed: int, *, offload_states: bool = False):
    """Give the sharded meta model memory and its initial weights, which do not depend on the number of ranks."""
    model.to_empty(device="cpu" if offload_states else device)
    model.init_weights(seed, own_part=own_rows)


@torch.no_grad()
def own_rows(parameter: DTensor) -> tuple[torch.Tensor, int]:
    """The rows of a sharded parameter that this rank holds, to be filled in place, and how many elements lie before them."""
    mesh_dim = parameter.placements.index(Shard(0))
    rows_of_a_rank = math.ceil(len(parameter) / parameter.device_mesh.size(mesh_dim))  # the last ranks may have fewer, or none
    rows_before = min(len(parameter), rows_of_a_rank * parameter.device_mesh.get_local_rank(mesh_dim))
    return parameter.to_local(), rows_before * math.prod(parameter.shape[1:])
