"""λ by way of the frequencies of a map's rows: the order for large windows on large maps.

A convolution along one axis is a product of frequencies, and the Fourier transform of one side of a map is a small
matrix. Only the rows are transformed; down the columns the table stays a banded Toeplitz matrix, one a frequency. So a
convolution with an r x r table becomes three matrix products:

X = A·V    into frequencies, row by row
Z = T·X    T[frequency] is the table, shifted from row to row
λ = S·Z    back from frequencies

N columns are transformed for W that are read, N = W + (r - 1)/2: the others take what wraps around. λ costs N + 2·N/W·
(rows + r - 1) multiply-adds a number, where the convolution takes r². Wide maps are cut into overlapping tiles. The
content lambda, the same at every position, joins Z at frequency 0 and costs nothing.

The transform spreads rounding evenly over a row, so numbers of 16 bits are computed in float32 here.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .eager import Position

ROWS = 8  # of the map at a time: T has rows + r - 1 columns for r that are used, and each block is a call


class Frame(NamedTuple):
    """How a map is transformed.

    rows         worked on at a time
    tiles        pieces of a row
    width        columns of a tile
    read, first  columns of the map that a tile reads, and where the first of them lies
    N            columns in the transform
    """

    rows: int
    tiles: int
    width: int
    read: int
    first: int
    N: int

    @property
    def numbers(self) -> int:
        """Real and imaginary parts of the frequencies of N real numbers, those that are always 0 included."""
        return 2 * (self.N // 2 + 1)


def frame(k: int, u: int, grid: tuple[int, ...], table: tuple[int, ...], itemsize: int) -> Frame:
    """The cheapest on a grid (H, W)."""
    (H, W), (r_y, r_x) = grid, cut(table, grid)
    half, reach = r_x // 2, min(H, ROWS + r_y - 1)
    tiles, width, read, N = 1, W, W, W + half
    for pieces in range(2, W // max(8, half) + 1):
        wide = -(-W // pieces)
        whole = wide + 2 * half
        if pieces * whole * (wide + 2 * reach) < tiles * N * (width + 2 * reach):
            tiles, width, read, N = pieces, wide, whole, whole
    of_row = 2 * N * k * u * (ROWS + r_y - 1) * itemsize  # T's
    rows = max(1, min(ROWS, H, convolution.BLOCK_BYTES // of_row))
    rows = -(-H // -(-H // rows))  # in blocks of nearly the same size
    return Frame(rows, tiles, width, read, 0 if tiles == 1 else -half, N)


def cut(table: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a table without the offsets that no pair of positions has."""
    return tuple(min(r, 2 * s - 1) for r, s in zip(table, grid, strict=True))


def fourier(p: Position, block: int) -> Tensor:
    """λ by frequencies, some rows at a time, then y = q·λ."""
    assert p.table is not None
    if p.q.shape[0] == 0:
        return convolution.conv(p, block)
    (H, W), (b, n, h, k), (v, u) = p.grid, p.q.shape, p.values.shape[2:]
    kernel = p.table.permute(2, 3, 0, 1)  # (k, u, r_y, r_x)
    for axis, side in enumerate(cut(tuple(kernel.shape[2:]), p.grid), start=2):
        kernel = kernel.narrow(axis, (kernel.shape[axis] - side) // 2, side)
    wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    q, values, kernel = p.q.to(wide), p.values.to(wide), kernel.to(wide)
    lam_c = None if p.lam_c is None else p.lam_c.to(wide)
    f = frame(k, u, p.grid, tuple(kernel.shape[2:]), wide.itemsize)
    after = f.tiles * f.width - W
    if f.tiles > 1:  # each tile is an example
        q = F.pad(q.unflatten(1, (H, W)), (0, 0, 0, 0, 0, after)).unflatten(2, (f.tiles, f.width))
        q = q.movedim(2, 1).reshape(b * f.tiles, H * f.width, h, k)
        values = F.pad(values.unflatten(1, (H, W)), (0, 0, 0, 0, -f.first, after - f.first))
        values = values.unfold(2, f.read, f.width).permute(0, 2, 1, 5, 3, 4).reshape(b * f.tiles, H * f.read, v, u)
        lam_c = None if lam_c is None else lam_c.repeat_interleave(f.tiles, 0)
    y = _Fourier.apply(q, values, kernel, lam_c, H, f)
    if f.tiles > 1:
        y = y.view(b, f.tiles, H, f.width, h, v).movedim(1, 2).reshape(b, H, -1, h, v)
        y = y[:, :, :W].reshape(b, n, h, v)
    return y.to(p.q.dtype)


class _Fourier(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + λ[b,n,k,v]), λ = conv2d(V, kernel (k, u, r_y, r_x)).

    q has H x width positions, V has H x read. Saves its inputs and nothing else.
    """

    @staticmethod
    def forward(q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Frame) -> Tensor:
        transform, y = _Transform(values, kernel, lam_c, H, f), q.new_empty(*q.shape[:3], values.shape[2])
        for ex in transform.examples():
            X = transform.analysed(values[ex])
            for rows, here in transform.rows():
                y[ex, here] = torch.matmul(q[ex, here].contiguous(), transform.lambdas(rows, X, ex))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.H, ctx.f = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, values, kernel, lam_c = ctx.saved_tensors
        needs_q, needs_values, needs_kernel, needs_content, *_ = ctx.needs_input_grad
        transform = _Transform(values, kernel, lam_c, ctx.H, ctx.f)
        grads_q: list[Tensor] = []
        grads_values: list[Tensor] = []
        grads_content: list[Tensor] = []
        dT = None
        for ex in transform.examples():
            X, dX, dlam_c = transform.analysed(values[ex]), None, None
            dq: list[Tensor] = []
            for rows, here in transform.rows():
                dy = grad[ex, here].contiguous()
                if needs_q:
                    dq.append(torch.matmul(dy, transform.lambdas(rows, X, ex).mT))
                if not (needs_values or needs_kernel or needs_content):
                    continue
                dZ = transform.lambdas_grad(torch.matmul(q[ex, here].contiguous().mT, dy))
                if needs_content and lam_c is not None:
                    dlam_c = transform.content_grad(dZ, dlam_c)
                if needs_values:
                    dX = transform.analysed_grad(rows, dZ, X, dX)
                if needs_kernel:
                    dT = transform.toeplitz_grad(rows, dZ, X, dT)
            grads_q += [torch.cat(dq, 1)] if dq else []
            grads_values += [transform.values_grad(dX)] if dX is not None else []
            grads_content += [dlam_c] if dlam_c is not None else []
        return (
            torch.cat(grads_q) if grads_q else None,
            torch.cat(grads_values) if grads_values else None,
            None if dT is None else transform.kernel_grad(dT),
            torch.cat(grads_content) if grads_content else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return convolution.folded(_Fourier.apply, info, in_dims, inputs)


class _Transform:
    """The three matrices of a transform, what they are multiplied with, and the gradients of all that.

    Shapes: s examples, w of N // 2 + 1 frequencies, 2 for real and imaginary, y rows, x columns.
    """

    def __init__(self, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Frame) -> None:
        self.b, _, self.v, self.u = values.shape
        self.lam_c, self.H, self.f = lam_c, H, f
        self.k, _, self.r_y, r_x = kernel.shape
        self.into, self.back, self.of_table = _matrices(f, r_x, kernel)
        re, im = (kernel @ self.of_table).unflatten(3, (-1, 2)).permute(4, 3, 0, 2, 1)  # (w, k, r_y, u) each
        both = torch.stack([torch.stack([re, -im], 4), torch.stack([im, re], 4)], 1)  # (w, 2, k, r_y, u, 2)
        # (w, 2, y, k, rows + r_y - 1, u, 2): from the last three to the others
        self.T = both.new_zeros(both.shape[0], 2, f.rows, self.k, f.rows + self.r_y - 1, self.u, 2)
        for i in range(f.rows):
            self.T[:, :, i, :, i : i + self.r_y] = both

    def examples(self) -> list[slice]:
        """All together in a graph being compiled, which a loop would tie to one batch."""
        if torch.compiler.is_compiling():
            return [slice(None)]
        step = convolution.examples(self.b, self.f.rows * self.f.width * self.k * self.v * self.T.itemsize)
        return [slice(lo, lo + step) for lo in range(0, self.b, step)]

    def rows(self) -> Iterator[tuple[tuple[int, int], slice]]:
        """Blocks of rows and the queries in them."""
        for first in range(0, self.H, self.f.rows):
            last = min(self.H, first + self.f.rows)
            yield (first, last), slice(first * self.f.width, last * self.f.width)

    def _reach(self, rows: tuple[int, int]) -> tuple[int, int, int]:
        """Rows of V that a block reads, and T's column for the first of them."""
        first, last, half = *rows, self.r_y // 2
        return max(0, first - half), min(self.H, last + half), max(0, half - first)

    def _toeplitz(self, rows: tuple[int, int]) -> Tensor:
        """(w, 2·y·k, y·u·2)"""
        start, stop, at = self._reach(rows)
        return self.T[:, :, : rows[1] - rows[0], :, at : at + stop - start].flatten(4).flatten(1, 3)

    def _read(self, rows: tuple[int, int], X: Tensor) -> Tensor:
        start, stop, _ = self._reach(rows)
        return X[:, start * self.u * 2 : stop * self.u * 2]

    def analysed(self, values: Tensor) -> Tensor:
        """V (s, H·read, v, u) -> X (w, y·u·2, s·v)."""
        lines = values.reshape(-1, self.f.read, self.v * self.u)
        X = torch.bmm(self.into.expand(lines.shape[0], -1, -1), lines)
        X = X.view(-1, self.H, self.f.numbers // 2, 2, self.v, self.u).permute(2, 1, 5, 3, 0, 4)
        return X.reshape(self.f.numbers // 2, self.H * self.u * 2, -1)

    def values_grad(self, dX: Tensor) -> Tensor:
        dX = dX.view(self.f.numbers // 2, self.H, self.u, 2, -1, self.v).permute(4, 1, 0, 3, 5, 2)
        lines = dX.reshape(-1, self.f.numbers, self.v * self.u)
        lines = torch.bmm(self.into.mT.expand(lines.shape[0], -1, -1), lines)
        return lines.view(-1, self.H * self.f.read, self.v, self.u)

    def lambdas(self, rows: tuple[int, int], X: Tensor, ex: slice) -> Tensor:
        """λ + λc of some rows, (s, y·x, k, v)."""
        Z = torch.bmm(self._toeplitz(rows), self._read(rows, X))  # (w, 2·y·k, s·v)
        if self.lam_c is not None:  # 1/N comes back of what is put in at frequency 0
            constant = Z[0, : Z.shape[1] // 2].unflatten(1, (-1, self.v)).unflatten(0, (-1, self.k))  # (y, k, s, v)
            constant += self.f.N * self.lam_c[ex].transpose(0, 1)
        lam = self.back @ Z.view(self.f.numbers, -1)
        lam = lam.view(self.f.width, rows[1] - rows[0], self.k, -1, self.v)
        return lam.permute(3, 1, 0, 2, 4).flatten(1, 2)

    def lambdas_grad(self, dlam: Tensor) -> Tensor:
        """(s, y·x, k, v) -> dZ (w, 2·y·k, s·v)."""
        dlam = dlam.unflatten(1, (-1, self.f.width)).permute(2, 1, 3, 0, 4)
        dZ = self.back.mT @ dlam.reshape(self.f.width, -1)
        return dZ.view(self.f.numbers // 2, -1, dlam.shape[3] * self.v)

    def content_grad(self, dZ: Tensor, total: Tensor | None) -> Tensor:
        part = self.f.N * dZ[0, : dZ.shape[1] // 2].view(-1, self.k, dZ.shape[2]).sum(0)
        part = part.unflatten(1, (-1, self.v)).transpose(0, 1)
        return part if total is None else total + part

    def analysed_grad(self, rows: tuple[int, int], dZ: Tensor, X: Tensor, total: Tensor | None) -> Tensor:
        part = torch.bmm(self._toeplitz(rows).mT, dZ)
        total = part.new_zeros(X.shape) if total is None else total
        self._read(rows, total).add_(part)
        return total

    def toeplitz_grad(self, rows: tuple[int, int], dZ: Tensor, X: Tensor, total: Tensor | None) -> Tensor:
        part = torch.bmm(dZ, self._read(rows, X).mT)
        total = part.new_zeros(self.T.shape) if total is None else total
        start, stop, at = self._reach(rows)
        here = total[:, :, : rows[1] - rows[0], :, at : at + stop - start]
        here.add_(part.view(here.shape))
        return total

    def kernel_grad(self, dT: Tensor) -> Tensor:
        both = dT[:, :, 0, :, : self.r_y]
        for i in range(1, self.f.rows):
            both = both + dT[:, :, i, :, i : i + self.r_y]  # (w, 2, k, r_y, u, 2)
        re, im = both[:, 0, ..., 0] + both[:, 1, ..., 1], both[:, 1, ..., 0] - both[:, 0, ..., 1]
        return torch.stack([re, im], 4).permute(1, 3, 2, 0, 4).flatten(3) @ self.of_table.mT


def _matrices(f: Frame, r_x: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (2·w, read), S (width, 2·w), and (r_x, 2·w) for the table, which is not turned round as by a convolution."""
    half = r_x // 2
    wide: Any = {"dtype": torch.float64, "device": like.device}
    w = torch.arange(f.N // 2 + 1, **wide)
    x = torch.arange(-half, max(f.first + f.read, half + 1), **wide)
    angle = torch.outer(x, w) % f.N * (2 * math.pi / f.N)
    waves = torch.stack([angle.cos(), -angle.sin()], 2)  # (x, w, 2)
    alone = ((w == 0) | (2 * w == f.N)).to(w)  # the others stand for their conjugates too
    back = waves[half : half + f.width] * ((2 - alone) / f.N)[:, None]
    of_table = waves[: 2 * half + 1].flip(0).flatten(1).to(like)
    into = waves[half + f.first : half + f.first + f.read].flatten(1).to(like)
    return into.mT, back.flatten(1).to(like), of_table
