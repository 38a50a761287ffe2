"""Batch norm over the images of all processes, on a CPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lambdanets.untouched import BATCH_NORM


class _SumOverRanks(torch.autograd.Function):
    """y = Σ_rank x, the same on every rank; so dL/dx = Σ_rank dL/dy."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = x.contiguous().clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class _SyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance in training are those of all ranks' images together, on any device.

        mean = Σ x / count,  var = Σ (x - mean)² / count,  sums over images, positions and ranks

    torch.nn.SyncBatchNorm runs on GPUs only. Two passes, sums in float64: as exact as one process's. It adds no state,
    so that a module becomes one by its `__class__` alone (`sync_batch_norm`).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs (b, C, ...) and got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not (dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        others = [0, *range(2, x.dim())]
        own = torch.cat([x.sum(others, dtype=torch.float64), x.new_tensor([x.numel() // x.shape[1]]).double()])
        sums = _SumOverRanks.apply(own)
        count = sums[-1].detach()
        shape = (1, -1, *[1] * (x.dim() - 2))
        if count == 0:  # no rank has a sample (a detector without an object): the statistics stay, all gradients are 0
            return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
        if count < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        mean = sums[:-1] / count
        x = x - mean.to(x.dtype).view(shape)
        var = _SumOverRanks.apply((x * x).sum(others, dtype=torch.float64)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), float(share))
                self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), float(share))
        y = x * (var + self.eps).rsqrt().to(x.dtype).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


class _SyncBatchNormAct(_SyncBatchNorm):
    """The same in the place of timm's `BatchNormAct2d`, which drops and activates after it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose batch norms use the statistics of all ranks' batches: torch's on GPUs, ours on the CPU.

    The state dict keeps its names and shapes. Local statistics are another training run: on two ranks the loss of a
    step differs by percents. Raises ValueError for a batch norm of another class than torch's and timm's: what else it
    computes would be lost.
    """
    known = (*BATCH_NORM, BatchNormAct2d, nn.SyncBatchNorm)
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in known:
            what = f"{path} is a {type(module).__name__}, which may compute more than a batch norm"
            raise ValueError(f"statistics of all processes: {what}: keep local ones, or freeze them")
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(model)  # timm's: torch's would drop timm's activations
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = _SyncBatchNormAct if isinstance(module, BatchNormAct2d) else _SyncBatchNorm
    return model
