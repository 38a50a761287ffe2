"""What moves the weights: which of them decay, the learning rate as a function of the step, the running average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.optim import Lamb, param_groups_weight_decay
from torch import nn

from lambdanets.recipes.recipe import TrainingRecipe


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


def optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`; its rate is set before every step from `learning_rate`."""
    groups = parameter_groups(model, recipe.weight_decay, everything=recipe.decay_everything)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(recipe.momentum, 0.999))
    if recipe.optimizer == "lamb":  # its own clipping would hide ours
        return Lamb(groups, lr=recipe.peak_lr, betas=(recipe.momentum, 0.999), max_grad_norm=None)
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum)


def learning_rate(
    step: int, peak_lr: float, *, warmup_steps: int, total_steps: int, drops: Sequence[float] | None = None
) -> float:
    """The rate of that step: linear up to the peak, then half a cosine that reaches 0 after the last step.

        (step + 1) / warmup_steps * peak_lr                                               step < warmup_steps
        (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2 * peak_lr   otherwise

    drops  in place of the cosine: the parts of the run after each of which the rate is a tenth of what it was

    step  0 for the first. The warm-up starts at peak_lr / warmup_steps, not at 0, which would waste the first step.

    >>> [round(learning_rate(s, 1.0, warmup_steps=2, total_steps=6), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    >>> [round(learning_rate(s, 1.0, warmup_steps=2, total_steps=6, drops=(0.5, 0.8)), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.1, 0.1, 0.01]
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    if drops is not None:
        return peak_lr * 0.1 ** sum(step >= round(drop * total_steps) for drop in drops)
    part = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
