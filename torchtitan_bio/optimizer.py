"""AdamW with decay where it belongs, and the learning rate as one pure function of the step."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; norms, biases and embeddings do not."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2 and id(parameter) not in embeddings]
    kept = [parameter for parameter in trainable if parameter.ndim < 2 or id(parameter) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build(model: nn.Module, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float):
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("every parameter is frozen: nothing is left to train")
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def lr_factor(
    step: int, *, steps: int, warmup_steps: int, decay_type: str, decay_ratio: float | str, min_lr_factor: float
) -> float:
    """The share of the peak rate for update number `step`, counted from 0, of `steps`.

    Linear warm-up reaches 1 at update warmup_steps - 1; then a plateau; the last decay_ratio of the run falls to min_lr_factor,
    which the last update has.
    """
    warmup_steps = min(warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = steps - warmup_steps if decay_ratio == "auto" else min(round(decay_ratio * steps), steps - warmup_steps)
    done = step + 1 - (steps - decay_steps)
    if decay_type == "constant" or done <= 0:
        return 1.0
    progress = min(done / decay_steps, 1.0)
    fall = progress if decay_type == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - min_lr_factor) * fall


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr
