"""λ as a convolution of V with the table as kernel: the order for small windows on large maps (paper, appendix B.1).

The values' channels are folded into the batch, so the convolution has one input channel (u of them) and k outputs.
Libraries vectorise over channels: forward, k = 16 outputs are what they like, but the two gradients have one channel
where they want sixteen, and ran at 1/13 of the forward's speed. Here both are forward-like convolutions:

dV      a tile of 4 x 4 pixels makes 16 output channels of a convolution of stride 4; the kernel is the table, shifted
        16 ways
dR      small tables: the library's. Small maps: a convolution whose kernel is dλ and whose channels are the (b·v)
        images. Large maps: V shifted 4 x 4 ways makes 16 input channels, with a kernel a quarter the table's side
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import Position, content_grad

_TILE = 4  # pixels a side: 16 channels, a vector of float32
_OWN_GRADIENT_SIDE = 20  # smaller maps fit tiles badly
_SMALL_TABLE = 121  # offsets up to which the library's weight gradient is the faster one
_SMALL_MAP = 1024  # positions up to which dλ can be a kernel


def conv(p: Position, block: int) -> Tensor:
    """λ as a convolution of V with the table as kernel, v folded into the batch, then y = q·λ."""
    assert p.table is not None
    b, m, v, u = p.values.shape
    d, k = len(p.grid), p.q.shape[3]
    kernel = p.table.permute(d, d + 1, *range(d))  # (k, u, r...)
    # Offsets that no pair of positions has would only multiply padding.
    cut = [max(0, (r - 1) // 2 - (s - 1)) for r, s in zip(kernel.shape[2:], p.grid, strict=True)]
    kernel = F.pad(kernel, [-c for c in reversed(cut) for _ in range(2)])
    image = p.values.permute(0, 2, 3, 1).reshape(b * v, u, *p.grid)
    if d == 2 and image.device.type == "cpu" and min(p.grid) >= _OWN_GRADIENT_SIDE:
        lam = _Convolve.apply(image, kernel)
    else:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
        lam = convolve(image, kernel, padding=[(r - 1) // 2 for r in kernel.shape[2:]])
    return _Apply.apply(p.q, lam.reshape(b, v, k, m), p.lam_c)


class _Convolve(torch.autograd.Function):
    """conv2d of (images, u, H, W) with (k, u, r_y, r_x), same size, and the gradients above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(image, kernel, padding=_half(kernel))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        image, kernel = ctx.saved_tensors
        grad = grad.contiguous()
        needs_image, needs_kernel = ctx.needs_input_grad
        return (
            _image_grad(kernel, grad) if needs_image else None,
            _kernel_grad(image, kernel, grad) if needs_kernel else None,
        )


def _half(kernel: Tensor) -> list[int]:
    return [(r - 1) // 2 for r in kernel.shape[2:]]


def _image_grad(kernel: Tensor, grad: Tensor) -> Tensor:
    """grad (images, k, H, W) -> (images, u, H, W), a tile of pixels at a time."""
    t, (H, W), (half_y, half_x) = _TILE, grad.shape[2:], _half(kernel)
    turned = kernel.flip(2, 3).transpose(0, 1)  # (u, k, r_y, r_x)
    shifted = [F.pad(turned, (j, t - 1 - j, i, t - 1 - i)) for i in range(t) for j in range(t)]
    rest_y, rest_x = -H % t, -W % t
    padded = F.pad(grad, (half_x, half_x + rest_x, half_y, half_y + rest_y))
    tiles = F.conv2d(padded, torch.stack(shifted, 1).flatten(0, 1), stride=t)  # (images, u·t·t, H/t, W/t)
    return F.pixel_shuffle(tiles, t)[:, :, :H, :W]


def _kernel_grad(image: Tensor, kernel: Tensor, grad: Tensor) -> Tensor:
    """(images, u, H, W), (images, k, H, W) -> (k, u, r_y, r_x)."""
    (r_y, r_x), half = kernel.shape[2:], _half(kernel)
    if r_y * r_x <= _SMALL_TABLE:
        return _library(grad, image, kernel, 1, half)
    H, W = grad.shape[2:]
    if H * W <= _SMALL_MAP:
        return F.conv2d(image.transpose(0, 1), grad.transpose(0, 1), padding=half).transpose(0, 1)
    t, k, u = _TILE, kernel.shape[0], kernel.shape[1]
    far_y, far_x = -(-r_y // t), -(-r_x // t)
    padded = F.pad(image, (half[1], half[1] + far_x * t - r_x, half[0], half[0] + far_y * t - r_y))
    tall, wide = H + (far_y - 1) * t, W + (far_x - 1) * t
    shifts = [padded[:, :, i : i + tall, j : j + wide] for i in range(t) for j in range(t)]
    like = kernel.new_empty(k, t * t * u, far_y, far_x)
    out = _library(grad, torch.cat(shifts, 1), like, t, [0, 0])
    out = out.reshape(k, t, t, u, far_y, far_x).permute(0, 3, 4, 1, 5, 2)
    return out.reshape(k, u, far_y * t, far_x * t)[:, :, :r_y, :r_x]


def _library(grad: Tensor, image: Tensor, kernel: Tensor, dilation: int, padding: list[int]) -> Tensor:
    """PyTorch's own weight gradient; of `kernel` only the shape is read."""
    backward = torch.ops.aten.convolution_backward
    only = [False, True, False]
    return backward(grad, image, kernel, None, [1, 1], padding, [dilation] * 2, False, [0, 0], 1, only)[1]


class _Apply(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + λ[b,v,k,n]).

    In float32 on a CPU one key at a time: λ stays as the convolution left it, where a product a position would move
    it. Two-byte numbers would be rounded k times over, and are multiplied position by position.
    """

    @staticmethod
    def forward(q: Tensor, lam: Tensor, lam_c: Tensor | None) -> Tensor:
        if lam.device.type != "cpu" or lam.dtype.itemsize < 4:
            y = torch.einsum("bnhk,bvkn->bnhv", q, lam)
            return y if lam_c is None else y + torch.einsum("bnhk,bkv->bnhv", q, lam_c)
        queries = q.permute(0, 2, 3, 1)  # (b, h, k, n)
        queries = queries if queries.stride(3) == 1 else queries.contiguous()
        b, v, k, n = lam.shape
        y = q.new_zeros(b, q.shape[2], v, n) if lam_c is None else lam_c.transpose(1, 2)[:, None] @ queries
        for i in range(k):
            y.addcmul_(queries[:, :, i, None], lam[:, None, :, i])  # (b, h, 1, n), (b, 1, v, n)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, lam, lam_c = ctx.saved_tensors
        dq = torch.einsum("bnhv,bvkn->bnhk", grad, lam)
        dlam, dlam_c = torch.einsum("bnhk,bnhv->bvkn", q, grad), None
        if lam_c is not None:
            dlam_c, dq_c = content_grad(q, lam_c, grad)
            dq = dq + dq_c
        return dq, dlam, dlam_c

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], q: Tensor, lam: Tensor, lam_c: Tensor | None) -> tuple[Tensor, int]:
        """A mapped axis joins the batch."""
        size = info.batch_size

        def joined(x: Tensor | None, at: int | None) -> Tensor | None:
            if x is None:
                return None
            return (x.expand(size, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)

        every = [joined(x, at) for x, at in zip((q, lam, lam_c), in_dims, strict=True)]
        return _Apply.apply(*every).unflatten(0, (size, -1)), 0
