"""AdamW with decay where it belongs, and the learning rate as one pure function of the step."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; norms, biases and embeddings do not."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2 and id(parameter) not in embeddings]
    kept = [parameter for parameter in trainable if parameter.ndim < 2 or id(parameter) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build(
    model: nn.Module, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, state_dtype: str = "float32"
):
    """AdamW over what is trained. state_dtype "bfloat16" halves the memory of its moments."""
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("every parameter is frozen: nothing is left to train")
    if state_dtype == "float32":
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    if state_dtype != "bfloat16":
        raise ValueError(f"optimizer.state_dtype={state_dtype!r} is not one of float32, bfloat16")
    return RoundedAdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)


class RoundedAdamW(torch.optim.AdamW):
    """torch's fused AdamW with moments that rest in bf16: each step widens one parameter's, computes, and rounds them back."""

    MOMENTS = ("exp_avg", "exp_avg_sq")
    SMALLEST_CHANGE = 2**-7
    """The share of a moment that bf16's 8 bits surely still see. Less, and a moment that should decay stays where it is."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if 1 - beta < self.SMALLEST_CHANGE:
                raise ValueError(
                    f"optimizer.{name}={beta} changes a moment by {1 - beta:.2g} of its value a step, which bfloat16 rounds "
                    f"away below {self.SMALLEST_CHANGE:.2g}: set it to {1 - self.SMALLEST_CHANGE:.3f} or less, or "
                    'optimizer.state_dtype to "float32"'
                )
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)  # which gives each value the type of its parameter
        for state in self.state.values():
            state.update({name: state[name].to(torch.bfloat16) for name in self.MOMENTS if name in state})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "AdamW needs no loss; torch's own callers say closure=None"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict):
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in self.MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        # Each rank updates its own shard; the fused kernel wants parameter, gradient and moments in one type.
        weights, gradient = _local(parameter), _local(parameter.grad)
        rounded = [_local(state[name]) for name in self.MOMENTS]
        first, second = (moment.to(weights.dtype) for moment in rounded)
        beta1, beta2 = group["betas"]
        settings = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        adamw(
            [weights], [gradient], [first], [second], [], [state["step"]], fused=True, amsgrad=False, maximize=False, **settings
        )
        for kept, moment in zip(rounded, (first, second), strict=True):
            kept.copy_(moment)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
