"""From a model on the meta device to one that is recomputed, compiled, sharded and filled: the same calls for 1 rank or 1,000.

Only the contract of a model family is used: blocks() and init_weights(seed, store).
"""

import fnmatch
import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


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
):
    """Wrap and shard the model's blocks, then the rest of it, in place. Parameter names stay what they are.

    A block's forward is replaced on the block itself: a wrapping module would put a prefix into every name.
    """
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    # Inputs are not cast: RoPE tables handed to the blocks must stay fp32, and embeddings already come in the compute type.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.blocks():
        if recompute == "full":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile_blocks:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root's own parameters are used last in forward and first in backward: freeing them between would gather them twice.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if hasattr(model, "logits"):
        register_fsdp_forward_method(model, "logits")


def materialize(model: nn.Module, device: torch.device, seed: int):
    """Give the sharded meta model memory and its initial weights, which do not depend on the number of ranks."""
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(seed, store=keep_shard)


def keep_shard(parameter: nn.Parameter, full: torch.Tensor):
    """Copy into a parameter the part of its full value that this rank holds. Every rank has the full value: nothing is sent."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())
