"""A layer's 1x1 projections as one product, the batch norms after them, the memory formats of its maps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambdanets.ops.problem import applied, autocast_dtype, sizes
from lambdanets.untouched import why_called

_SMALL_MAP = 20 * 20  # positions up to which a matrix product is faster than a convolution of a channels_last map


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """A projection (channels out, ...) and the batch norm after it, in evaluation, as one: weight and bias.

    norm   a batch norm with running statistics, or None or nn.Identity, which change nothing
    """
    if norm is None or isinstance(norm, nn.Identity):
        return weight, bias
    wide = torch.promote_types(weight.dtype, torch.float32)  # rounded once
    mean, var, gain, offset = (
        getattr(norm, name).to(wide) for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = (var + norm.eps).rsqrt() * gain
    shift = offset - mean * scale
    if bias is not None:
        shift = shift + bias * scale
    return (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype), shift.to(weight.dtype)


def stack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[nn.Module | None]
) -> tuple[Tensor, Tensor | None]:
    """Several projections of one map as one, each with its norm folded in: weight, and bias if there is any."""
    folded = [fold(*part) for part in zip(weights, biases, norms, strict=True)]
    weight = torch.cat([w for w, _ in folded])
    if all(b is None for _, b in folded):
        return weight, None
    return weight, torch.cat([weight.new_zeros(len(w)) if b is None else b for w, b in folded])


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[nn.Module | None]
) -> Sequence[Tensor]:
    """Several 1x1 projections of one map as one product, each with the batch norm after it.

    x        (b, dim, *map)
    weights  (channels out, dim) each; biases (channels out,) or None; norms in training mode run, others are folded
             into the product
    returns  (b, positions, channels out) each
    """
    training = any(norm is not None and norm.training for norm in norms)
    weight, bias = stack(weights, biases, [None] * len(weights) if training else norms)
    parts: Sequence[Tensor] = product(x, weight, bias).split([sizes(w)[0] for w in weights], 1)
    if training:  # contiguous: batch norm takes up to three times as long on a slice
        maps = [y.unflatten(2, x.shape[2:]).contiguous() for y in parts]
        parts = [(y if norm is None else normed(norm, y)).flatten(2) for y, norm in zip(maps, norms, strict=True)]
    return [y.transpose(-2, -1) for y in parts]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 projection of a map (b, dim, *map) by weights (channels out, dim): (b, channels out, positions)."""
    # torch.jit.trace records with gradients and checks without: one way, then, for both.
    training, cpu = torch.is_grad_enabled() or torch.jit.is_tracing(), x.device.type == "cpu"
    if cpu and not training and (x.is_contiguous() or math.prod(sizes(x)[2:]) <= _SMALL_MAP):
        # Position by position, as it is read next. In 16 bits the library would copy the weights for each example.
        rows = x.flatten(2).transpose(-2, -1)
        if rows.is_contiguous() or (autocast_dtype(x) or x.dtype).itemsize < 4:
            return F.linear(rows.contiguous(), weight, bias).transpose(-2, -1)
        every = weight.t().expand(x.shape[0], -1, -1)
        return (torch.bmm(rows, every) if bias is None else torch.baddbmm(bias, rows, every)).transpose(-2, -1)
    if not x.is_contiguous() or (training and (not cpu or torch.compiler.is_compiling())):
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return convolve(x, weight[(...,) + (None,) * (x.dim() - 2)], bias).flatten(2)
    # The map is read where it lies: a convolution copies it to its own layout and back.
    x = x.flatten(2)
    if not training:
        every = weight.expand(x.shape[0], -1, -1)
        return torch.bmm(every, x) if bias is None else torch.baddbmm(bias[:, None], every, x)
    dtype = autocast_dtype(x)
    if dtype is not None:  # autocast does not reach the gradients
        x, weight = x.to(dtype), weight.to(dtype)
    y = applied(_Product, x, weight)
    return y if bias is None else y + bias[:, None].to(y.dtype)


class _Product(torch.autograd.Function):
    """Weights (channels out, dim) times x (b, dim, positions): half the time of a 1x1 convolution and its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(weight.expand(x.shape[0], -1, -1), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.bmm(weight.t().contiguous().expand(x.shape[0], -1, -1), grad)
        if ctx.needs_input_grad[1]:
            if x.dtype.itemsize >= 4:
                dweight = torch.bmm(x, grad.mT).sum(0).t()
            else:  # one product over all examples: a sum of rounded ones would be worse
                dweight = grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).t()
        return dx, dweight


def as_one_call(layer: Any, *inputs: Any) -> Tensor:
    """`layer.evaluate(*inputs)`: where `torch.fx` follows a model it sees this call, as `fx.wrap` tells it in the files
    that use it, and not what lies behind, which depends on the sizes of real maps."""
    y: Tensor = layer.evaluate(*inputs)
    return y


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x, so that a map leaves a layer as it came: contiguous or channels_last."""
    given = _format(x)
    return y if given is None else y.contiguous(memory_format=given)


def _format(x: Tensor) -> torch.memory_format | None:
    """Contiguous, channels_last, or None where it is neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else None


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), whose gradient is handed to it in the memory format of x.

    The gradient comes back position by position. PyTorch's batch norm (2.15, CPU) takes up to 40 times as long where
    the two formats differ; and where b is 1, so that the strides could be those of several, it takes them for the wrong
    one: silently other gradients, of the weights too.
    """
    y: Tensor = norm(x)
    if y.requires_grad and not torch.compiler.is_compiling():  # compiled code has its own
        given = torch.contiguous_format if x.shape[0] == 1 else _format(x)
        if given is not None:
            # Where a second derivative needs no gradient here, it hands over None.
            y.register_hook(lambda grad: None if grad is None else grad.contiguous(memory_format=given))
    return y


def projected(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution without norm, as a product where nobody has replaced or hooked it: (b, channels out, H·W)."""
    if why_called(conv):
        y: Tensor = conv(x)
        return y.flatten(2)
    return product(x, conv.weight.flatten(1), conv.bias)
