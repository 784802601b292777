"""What a checkpoint holds: tensors under flat names, "model.<parameter>" and "optimizer.<parameter>.<moment>".

Nothing else: a hyperparameter belongs to the config, and DCP would store any other value as a pickle.
"""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    # A forward without backward leaves the gathered parameters of FSDP's root in place, which the optimizer does not know.
    # state_dict() puts the shards back.
    model.state_dict()
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and saved buffers, sharing memory with the model. A tied weight comes once, under its first name."""
    tensors = {name: parameter.detach() for name, parameter in parameters_by_name(model).items()}
    saved = model.state_dict()
    tensors |= {plain_name(name): buffer for name, buffer in model.named_buffers() if name in saved}
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, sharing memory with it. What has made no step yet gets its zero state first."""
    names = {parameter: name for name, parameter in parameters_by_name(model).items()}
    fill_with_zero_state(optimizer)
    tensors = {}
    for parameter in trained(optimizer):
        if parameter not in names:
            raise ValueError(f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model")
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"optimizer state {key!r} of {names[parameter]} is {value!r}; only tensors can be saved")
            tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def trained(optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def fill_with_zero_state(optimizer):
    """The state of a parameter before its first step, made by the optimizer's own step at rate 0 and then zeroed."""
    fresh = [parameter for parameter in trained(optimizer) if not optimizer.state.get(parameter)]
    if not fresh:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = {parameter: parameter.grad for parameter in trained(optimizer)}
    for parameter in gradients:
        parameter.grad = None
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    for parameter in fresh:
        for value in optimizer.state[parameter].values():
            value.zero_()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{name: {"shape": [...], "dtype": "float32"}}, the same on every rank."""
    return {name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)} for name, tensor in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_non_finite(tensors: dict[str, torch.Tensor]):
    broken = [name for name, tensor in tensors.items() if not is_finite(local(tensor))]
    if broken:
        raise ValueError(f"not saved: {enumerate_names(broken)} hold values that are not finite")


def is_finite(tensor: torch.Tensor) -> bool:
    # No sum is finite that has a term which is not. It takes one pass and no memory; only where finite terms overflow it does
    # the slow way decide.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def copy_to_cpu(tensors: dict[str, torch.Tensor], earlier: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that training may not touch, shards staying shards.

    earlier: what this returned before, whose memory is used again where it fits; new memory costs more than the copying.
    """
    copies = {}
    for name, tensor in tensors.items():
        copy = earlier.get(name)
        if copy is None or not is_alike(copy, tensor):
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        local(copy).copy_(local(tensor.detach()), non_blocking=True)
        copies[name] = copy
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def is_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether one can be copied into the other, shard by shard."""
    of_left, of_right = (
        (each.shape, each.dtype, getattr(each, "placements", None), getattr(each, "device_mesh", None))
        for each in (left, right)
    )
    return of_left == of_right


def num_bytes(model: nn.Module, moment_bytes: int = 4) -> int:
    """Size of one checkpoint with AdamW, all ranks together: two moments for what is trained, and 2 KiB of framing a tensor."""
    total = 0
    for parameter in model.parameters():
        sizes = [parameter.element_size(), *([moment_bytes] * 2 if parameter.requires_grad else [])]
        total += sum(math.prod(parameter.shape) * size + 2048 for size in sizes)
    return total


def enumerate_names(names: list[str]) -> str:
    """Ten names and a count."""
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more ({len(names)} in all)" if len(names) > 10 else "")
