"""λ as a convolution of V with the table as kernel: the order for small windows on large maps (paper, appendix B.1).

The values' channels are folded into the batch, so the convolution has one input channel (u of them) and k outputs.
λ is the largest thing: so many examples at a time that theirs stays in the cache and in memory that was used before.
It is not kept for the backward pass, which makes it again.

On a CPU λ has its k side by side (channels_last): there q·λ is one small product a position, and the gradients read it
as the library's matrix routines like it. Only float32 forward does not: the library is faster with planes, and there
q·λ is taken one key at a time, so that λ is never moved. Libraries vectorise over channels, of which the two gradients
have one where they want sixteen (1/13 of the forward's speed). Here both are forward-like convolutions:

dV      a tile of 4 x 4 pixels makes 16 output channels of a convolution of stride 4; the kernel is the table, shifted
        16 ways
dR      small tables: the library's. 16-bit numbers and small maps: a convolution whose kernel is dλ and whose channels
        are the (b·v) images. float32: V shifted 2 x 8 ways makes 16 input channels, the kernel is as much smaller

A table may be larger than the map, as every global one is. There oneDNN's gradient of a kernel reads and writes past
its ends on processors with AVX-512 (PyTorch 2.15: crashes, endless loops, infinities), so the map is padded for it
first: LOG.md, 2026-11-26.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lambdanets.ops.problem import Position, Problem, applied, ends, itemsize_of, reachable_offsets, sizes

BLOCK_BYTES = 8 << 20  # of λ at a time, one example at least: more leaves the cache, and malloc gives it back each time
_TILE = 4  # pixels a side: 16 channels, a vector of float32
_SHIFTS = 2, 8  # down, across: 16 channels as well
_TILED_SIDE = 20  # smaller maps fit tiles badly
_SMALL_TABLE = 121  # offsets up to which the library's weight gradient is the faster one
SMALL_MAP = 60 * 60  # positions up to which dλ is the better kernel (64²: 4 to 18 ms for 4 to 8 of 16 shifts)


def conv(p: Position, block: int) -> Tensor:
    """λ as a convolution of V with the table as kernel, v folded into the batch, then y = q·λ."""
    b, m, v, u = sizes(p.values)
    d, k, kernel = len(p.grid), p.q.shape[3], kernel_of(p).contiguous()
    # One channel: a convolution takes the format of its output from strides that `contiguous` leaves as they are.
    kernel = kernel.flatten(1).view(kernel.shape)
    if d == 2 and p.q.device.type == "cpu" and b > 0 and not torch.jit.is_tracing():
        return applied(_Convolution, p.q, p.values, kernel, p.lam_c, p.grid)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    image = p.values.permute(0, 2, 3, 1).reshape(b * v, u, *p.grid)
    image, padding = _within(image, kernel)
    lam = convolve(image, kernel, padding=padding).reshape(b, v, k, m)
    y = torch.einsum("bnhk,bvkn->bnhv", p.q, lam)
    return y if p.lam_c is None else y + torch.einsum("bnhk,bkv->bnhv", p.q, p.lam_c)


def kernel_of(p: Position) -> Tensor:
    """The table as a kernel (k, u, r...), without the offsets that would only multiply padding."""
    assert p.table is not None
    d = len(p.grid)
    kernel = p.table.permute(d, d + 1, *range(d))
    for axis, side in enumerate(reachable_offsets(sizes(kernel)[2:], p.grid), start=2):
        kernel = kernel.narrow(axis, (sizes(kernel)[axis] - side) // 2, side)
    return kernel


def examples(b: int, bytes_each: int) -> int:
    """How many examples' λ to make at a time: as many as fit BLOCK_BYTES, in blocks of nearly the same size."""
    most = max(1, BLOCK_BYTES // max(1, bytes_each))
    return -(-b // max(1, -(-b // most)))


def parts(b: int, bytes_each: int) -> list[slice]:
    """The examples to work on together: all of them in a graph being compiled, which a loop would tie to one batch."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = examples(b, bytes_each)
    return [slice(lo, lo + step) for lo in range(0, b, step)]


class _Convolution(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + λ[b,n,k,v]), λ = conv2d(V, kernel (k, u, r_y, r_x)), the same size."""

    @staticmethod
    def forward(q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        b, n, h, k = sizes(q)
        apply = _by_key if q.dtype.itemsize >= 4 else _by_position
        v = sizes(values)[2]
        y = q.new_empty(b, h, v, n)
        for block in parts(b, n * k * v * q.itemsize):
            apply(q[block], _lambdas(values[block], kernel, grid), None if lam_c is None else lam_c[block], y[block])
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.grid = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, values, kernel, lam_c = ctx.saved_tensors
        needs_q, needs_values, needs_kernel, needs_content, _ = ctx.needs_input_grad
        (H, W), (b, n, h, k), (v, u) = ctx.grid, q.shape, values.shape[2:]
        # A sum over blocks is in float32 or better.
        exact = q.dtype == torch.float64
        wide = torch.float64 if exact else torch.float32
        grads_q, grads_values, grads_content, grad_kernel = [], [], [], None
        for block in parts(b, n * k * v * q.itemsize):
            part, dy = q[block].contiguous(), grad[block].contiguous()
            s = len(part)
            rows, dy_rows = part.flatten(1, 2), dy.flatten(1, 2)  # (s, n·h, k or v)
            if needs_q:
                lam = _lambdas(values[block], kernel, ctx.grid)
                lam = lam.permute(0, 2, 3, 1).contiguous().view(s, v, n, k).transpose(1, 2)
                if q.dtype.itemsize < 4 or torch.compiler.is_compiling():  # as in `_by_position`
                    dq = torch.matmul(dy, lam)
                else:  # one example at a time nothing is copied
                    dq = torch.stack([torch.bmm(*pair) for pair in zip(dy, lam, strict=True)])
                if lam_c is not None:  # blockwise.content_grad's einsum takes 3 to 8% of a step longer at 56²
                    dq = dq + torch.bmm(dy_rows, lam_c[block].mT).view(s, n, h, k)
                grads_q.append(dq)
            if lam_c is not None and needs_content:
                grads_content.append(torch.bmm(rows.mT, dy_rows))
            if needs_values or needs_kernel:
                dlam = torch.bmm(dy.flatten(0, 1).mT, part.flatten(0, 1)).view(s, n, v, k)
                dlam = dlam.transpose(1, 2).reshape(s * v, H, W, k).permute(0, 3, 1, 2)
                # PyTorch (2.15) has no second derivative of a float64 convolution with one channel in channels_last.
                dlam = dlam.contiguous() if exact else dlam
                if needs_values:
                    dimage = _image_grad(kernel, dlam)
                    grads_values.append(dimage.reshape(s, v, u, n).permute(0, 3, 1, 2))
                if needs_kernel:
                    image = _image(values[block], ctx.grid, not exact)
                    dkernel = _kernel_grad(image, kernel, dlam).to(wide)
                    grad_kernel = dkernel if grad_kernel is None else grad_kernel + dkernel
        return (
            torch.cat(grads_q) if needs_q else None,
            torch.cat(grads_values) if needs_values else None,
            None if grad_kernel is None else grad_kernel.to(kernel.dtype),
            torch.cat(grads_content) if grads_content else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return folded(_Convolution.apply, info, in_dims, inputs)


def folded(apply: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, int]:
    """`vmap` of a function of (q, values, kernel, lam_c or None, ...): a mapped axis joins the batch; where each has a
    kernel of its own, one after the other."""
    size = info.batch_size
    every = [
        x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if at is None else x.movedim(at, 0)
        for x, at in zip(inputs, in_dims, strict=True)
    ]
    tensors, rest = every[:4], every[4:]
    if in_dims[2] is not None:
        own = [apply(*(x if x is None else x[i] for x in tensors), *rest) for i in range(size)]
        return torch.stack(own), 0
    q, values, _, lam_c = (x if x is None else x.flatten(0, 1) for x in tensors)
    return apply(q, values, inputs[2], lam_c, *rest).unflatten(0, (size, -1)), 0


def _image(values: Tensor, grid: tuple[int, ...], channels_last: bool) -> Tensor:
    """(b, m, v, u) -> (b·v, u, H, W), in the memory format that the convolution shall have."""
    b, _, v, u = sizes(values)
    # Of one example a reshape is a strided view: the library would convert it, and choose the format of λ by it.
    if u == 1:  # only the stride of the one channel tells the formats apart
        planes = values[..., 0].mT.reshape(b * v, *grid).contiguous()
        return planes[..., None].permute(0, 3, 1, 2) if channels_last else planes[:, None]
    if not channels_last:
        return values.permute(0, 2, 3, 1).reshape(b * v, u, *grid).contiguous()
    return values.transpose(1, 2).reshape(b * v, *grid, u).contiguous().permute(0, 3, 1, 2)


def _lambdas(values: Tensor, kernel: Tensor, grid: tuple[int, ...]) -> Tensor:
    """λ (b·v, k, H, W): with its k side by side in 16 bits, else as planes, which the library is faster at."""
    return F.conv2d(_image(values, grid, values.dtype.itemsize < 4), kernel, padding=_half(kernel))


def _by_key(q: Tensor, lam: Tensor, lam_c: Tensor | None, y: Tensor) -> None:
    """y (b, h, v, n) = q·(λc + λ) one key at a time, λ (b·v, k, H, W) contiguous."""
    queries = q.permute(0, 2, 3, 1)  # (b, h, k, n)
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    b, _, k, n = sizes(queries)
    lam = lam.reshape(b, -1, k, n)
    if lam_c is None:
        y.zero_()
    else:
        y.copy_(lam_c.transpose(1, 2)[:, None] @ queries)
    for i in range(k):
        y.addcmul_(queries[:, :, i, None], lam[:, None, :, i])  # (b, h, 1, n), (b, 1, v, n)


def _by_position(q: Tensor, lam: Tensor, lam_c: Tensor | None, y: Tensor) -> None:
    """y (b, h, v, n) = q·(λc + λ) a position at a time, λ (b·v, k, H, W) in channels_last. Sums are in float32."""
    b, n, h, k = sizes(q)
    v = sizes(y)[2]
    q = q.contiguous()
    part = q.new_zeros(b, n * h, v) if lam_c is None else torch.bmm(q.flatten(1, 2), lam_c)
    # The library would copy strided matrices itself, one product at a time and twice as slowly.
    lam = lam.permute(0, 2, 3, 1).reshape(b, v, n, k).transpose(1, 2).contiguous()
    part = torch.baddbmm(part.view(b * n, h, v), q.flatten(0, 1), lam.flatten(0, 1).mT)
    y.copy_(part.view(b, n, h, v).permute(0, 2, 3, 1))


def _half(kernel: Tensor) -> list[int]:
    return [(r - 1) // 2 for r in sizes(kernel)[2:]]


def _beyond(image: Tensor, kernel: Tensor) -> bool:
    return any([r > side for r, side in zip(sizes(kernel)[2:], sizes(image)[2:], strict=True)])  # noqa: C419


def _within(image: Tensor, kernel: Tensor) -> tuple[Tensor, list[int]]:
    """The map, and the padding that is left to the library: none where the table is larger than the map."""
    half = _half(kernel)
    if not _beyond(image, kernel):
        return image, half
    return F.pad(image, [p for p in reversed(half) for _ in range(2)]), [0] * len(half)


def _image_grad(kernel: Tensor, grad: Tensor) -> Tensor:
    """grad (images, k, H, W) -> (images, u, H, W), a tile of pixels at a time."""
    t, (H, W), half = _TILE, grad.shape[2:], _half(kernel)
    turned = kernel.flip(2, 3).transpose(0, 1)  # (u, k, r_y, r_x)
    if min(H, W) < _TILED_SIDE:
        return F.conv2d(grad, turned, padding=half)
    shifted = [F.pad(turned, (j, t - 1 - j, i, t - 1 - i)) for i in range(t) for j in range(t)]
    rest_y, rest_x = -H % t, -W % t
    padded = F.pad(grad, (half[1], half[1] + rest_x, half[0], half[0] + rest_y))
    tiles = F.conv2d(padded, torch.stack(shifted, 1).flatten(0, 1), stride=t)  # (images, u·t·t, H/t, W/t)
    return F.pixel_shuffle(tiles, t)[:, :, :H, :W]


def _kernel_grad(image: Tensor, kernel: Tensor, grad: Tensor) -> Tensor:
    """(images, u, H, W), (images, k, H, W) -> (k, u, r_y, r_x)."""
    (k, u, r_y, r_x), half, (H, W) = kernel.shape, _half(kernel), grad.shape[2:]
    library = r_y * r_x <= _SMALL_TABLE or min(H, W) < _TILED_SIDE
    if library:
        largest = _TILED_SIDE**2 if _beyond(image, kernel) else 0
    else:
        largest = SMALL_MAP if grad.dtype.itemsize < 4 else 0
    if largest >= H * W:
        return F.conv2d(image.transpose(0, 1), grad.transpose(0, 1), padding=half).transpose(0, 1)
    if library:
        image, half = _within(image, kernel)
        return _library(grad, image, kernel.new_empty(kernel.shape), [1, 1], half)
    down, across = _SHIFTS
    far_y, far_x = -(-r_y // down), -(-r_x // across)
    padded = F.pad(image, (half[1], half[1] + far_x * across - r_x, half[0], half[0] + far_y * down - r_y))
    tall, wide = H + (far_y - 1) * down, W + (far_x - 1) * across
    shifts = [padded[:, :, i : i + tall, j : j + wide] for i in range(down) for j in range(across)]
    like = kernel.new_empty(k, down * across * u, far_y, far_x)
    out = _library(grad, torch.cat(shifts, 1), like, [down, across], [0, 0])
    out = out.reshape(k, down, across, u, far_y, far_x).permute(0, 3, 4, 1, 5, 2)
    return out.reshape(k, u, far_y * down, far_x * across)[:, :, :r_y, :r_x]


def _library(grad: Tensor, image: Tensor, kernel: Tensor, dilation: list[int], padding: list[int]) -> Tensor:
    """PyTorch's own weight gradient; of `kernel` only the shape is read, and the strides, which must be plain."""
    backward = torch.ops.aten.convolution_backward
    only = [False, True, False]
    return backward(grad, image, kernel, None, [1, 1], padding, dilation, False, [0, 0], 1, only)[1]


def cost(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.window * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    lam = p.n * p.k * p.v
    at_once = examples(p.b, lam * itemsize_of(p)) if p.device == "cpu" and len(p.grid or ()) == 2 else p.b
    return macs, (4 * p.b * lam + ends(p)) * itemsize_of(p), at_once * lam * itemsize_of(p)


def why_not(p: Problem) -> str | None:
    if p.table is None:
        return "it needs a relative table on a grid, and got " + ("embeddings" if p.embeddings else "no positions")
    if p.grid != p.context_grid:
        return f"the query grid {p.grid} and the context grid {p.context_grid} differ"
    if p.mask is not None:
        return "a mask by query cannot be written as one kernel"
    return None
