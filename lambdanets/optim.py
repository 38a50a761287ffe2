"""What moves the weights: which of them decay, the learning rate as a function of the step, the running average."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.optim import Lamb, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lambdanets.recipes import Recipe


def parameter_groups(model: nn.Module, weight_decay: float, *, everything: bool = False) -> list[dict]:
    """The model's trainable parameters in two groups: those that decay and those that do not. One with `everything`.

    No decay on parameters of one dimension (biases, batch norm) and on the names of `model.no_weight_decay()`, the
    relative tables: a table is N(0, 1) by the paper's initialisation, and decay would shrink the positions away.
    A parameter shared by several layers is in one group, once.
    """
    if everything:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    named = getattr(model, "no_weight_decay", set)
    groups: list[dict] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=named())
    return groups


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`; its rate is set before every step from `learning_rate`."""
    groups = parameter_groups(model, recipe.weight_decay, everything=recipe.decay_everything)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(recipe.momentum, 0.999))
    if recipe.optimizer == "lamb":  # its own clipping would hide ours
        return Lamb(groups, lr=recipe.peak_lr, betas=(recipe.momentum, 0.999), max_grad_norm=None)
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum)


def learning_rate(step: int, peak_lr: float, *, warmup_steps: int, total_steps: int) -> float:
    """The rate of that step: linear up to the peak, then half a cosine that reaches 0 after the last step.

        (step + 1) / warmup_steps * peak_lr                                               step < warmup_steps
        (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2 * peak_lr   otherwise

    step  0 for the first. The warm-up starts at peak_lr / warmup_steps, not at 0, which would waste the first step.

    >>> [round(learning_rate(s, 1.0, warmup_steps=2, total_steps=6), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    part = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))


def ema_decay(step: int, decay: float) -> float:
    """The decay of that step: min(decay, (1 + step) / (10 + step)), so that a short run forgets its first weights.

    A decay of 0.9999 remembers 10,000 steps; a run of 900 would end as the average of its own beginning. TensorFlow's
    ExponentialMovingAverage has the same warm-up (num_updates).

    >>> [round(ema_decay(s, 0.99), 3) for s in (0, 10, 900, 10_000)]
    [0.1, 0.55, 0.99, 0.99]
    """
    return min(decay, (1 + step) / (10 + step))


class RunningAverage:
    """An exponential moving average of a model's parameters and batch statistics; `module` holds it, in eval mode.

    Not timm's ModelEmaV3: it walks the state dict, where a table shared by several layers stands several times, and
    would average that table several times a step.
    decay = 0 keeps the last weights. After `shard` a process averages its own part, and `module` is as old as the last
    call of `whole`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._own = _tensors(self.module)

    def shard(self, model: nn.Module) -> None:
        """Divide the average among the processes as the model's parameters are."""
        self._own = [part_like(own, new) for own, new in zip(self._own, _tensors(model), strict=True)]

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """The module, up to date. All processes call it."""
        for value, own in zip(_tensors(self.module), self._own, strict=True):
            if isinstance(own, DTensor):
                value.copy_(own.full_tensor())
        return self.module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """average <- d * average + (1 - d) * model with d = `ema_decay(step)`; whole numbers are copied."""
        new_share = 1 - ema_decay(step, self.decay)
        own, new = ([_local(t) for t in tensors] for tensors in (self._own, _tensors(model)))
        floats = [i for i, t in enumerate(own) if t.is_floating_point()]
        torch._foreach_lerp_([own[i] for i in floats], [new[i] for i in floats], new_share)
        for average, value in zip(own, new, strict=True):
            if not average.is_floating_point():
                average.copy_(value)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]  # each shared one once


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def part_like(t: Tensor, like: Tensor) -> Tensor:
    """`t`, the same on every process, divided among them as `like` is, if `like` is."""
    if not isinstance(like, DTensor):
        return t
    return distribute_tensor(t.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def whole(value: Any, *, keep: bool = True) -> Any:
    """A nested state with every divided tensor put together again; all processes call it, in the same order.

    keep   False: the tensors are dropped as soon as another process has them
    """
    if isinstance(value, DTensor):
        together = value.full_tensor()
        return together if keep else None
    if isinstance(value, dict):
        return type(value)((key, whole(item, keep=keep)) for key, item in value.items())
    if isinstance(value, list):
        return [whole(item, keep=keep) for item in value]
    return value
