"""The running average of a model's weights, which is what is evaluated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lambdanets.training.distributed import part_like


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
    call of `up_to_date`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._own = _tensors(self.module)

    def shard(self, model: nn.Module) -> None:
        """Divide the average among the processes as the model's parameters are."""
        self._own = [part_like(own, new) for own, new in zip(self._own, _tensors(model), strict=True)]

    @torch.no_grad()
    def up_to_date(self) -> nn.Module:
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
