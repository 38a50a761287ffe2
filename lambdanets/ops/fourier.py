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

The transform spreads rounding over a row: it is relative to the row's largest numbers, not to each result's own. In
float32 that is 1e-7; numbers of 16 bits are computed in float32.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lambdanets.ops import convolution
from lambdanets.ops.problem import Position, Problem, applied, ends, exporting, reachable_offsets, sizes

ROWS = 4  # of the map at a time: T has rows + r - 1 columns for r that are used, and each block is a call


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
    (H, W), (r_y, r_x) = grid, reachable_offsets(table, grid)
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


def row_blocks(H: int, r_y: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Blocks of rows: the first and the one after the last, then the same of the rows of V that they read."""
    half = r_y // 2
    own = [(first, min(H, first + rows)) for first in range(0, H, rows)]
    return [(first, last, max(0, first - half), min(H, last + half)) for first, last in own]


def fourier(p: Position, block: int) -> Tensor:
    """λ by frequencies, some rows at a time, then y = q·λ."""
    if sizes(p.q)[0] == 0 or torch.onnx.is_in_onnx_export():  # whose exporter gets writing into parts wrong
        return convolution.conv(p, block)
    (H, W), (b, n, h, k), (v, u) = p.grid, sizes(p.q), sizes(p.values)[2:]
    kernel = convolution.kernel_of(p)
    q, values, lam_c = p.q, p.values, p.lam_c
    f = frame(k, u, p.grid, sizes(kernel)[2:], _wide(kernel).itemsize)
    after = f.tiles * f.width - W
    if f.tiles > 1:  # each tile is an example
        q = F.pad(q.unflatten(1, (H, W)), (0, 0, 0, 0, 0, after)).unflatten(2, (f.tiles, f.width))
        q = q.movedim(2, 1).reshape(b * f.tiles, H * f.width, h, k)
        values = F.pad(values.unflatten(1, (H, W)), (0, 0, 0, 0, -f.first, after - f.first))
        values = values.unfold(2, f.read, f.width).permute(0, 2, 1, 5, 3, 4).reshape(b * f.tiles, H * f.read, v, u)
        lam_c = None if lam_c is None else lam_c.repeat_interleave(f.tiles, 0)
    inputs = q, values, kernel, lam_c
    if torch.compiler.is_compiling() and not exporting():
        y = _fourier_op(*inputs, H, f)
    elif p.kept is None or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        y = applied(_Fourier, *inputs, H, f)
    else:
        y = _evaluated(q, values, lam_c, _matrices(kernel, H, f, p.kept))
    if f.tiles > 1:
        y = y.view(b, f.tiles, H, f.width, h, v).movedim(1, 2).reshape(b, H, -1, h, v)
        y = y[:, :, :W].reshape(b, n, h, v)
    return y


class _Fourier(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + λ[b,n,k,v]), λ = conv2d(V, kernel (k, u, r_y, r_x)).

    q has H x width positions, V has H x read. Saves its inputs and nothing else.
    """

    @staticmethod
    def forward(q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Frame) -> Tensor:
        return _evaluated(q, values, lam_c, _Matrices(kernel, H, f))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.H, ctx.f = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, values, kernel, lam_c = ctx.saved_tensors
        grads = _gradients(q, values, kernel, lam_c, ctx.H, ctx.f, grad, ctx.needs_input_grad)
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return convolution.folded(_Fourier.apply, info, in_dims, inputs)


def _evaluated(q: Tensor, values: Tensor, lam_c: Tensor | None, by: "_Matrices") -> Tensor:
    y, v = q.new_empty(*q.shape[:3], values.shape[2]), sizes(values)[2]
    for ex in by.examples(values):
        X, constant = by.analysed(values[ex]), None if lam_c is None else by.constant(lam_c[ex])
        for block in by.blocks:
            lam = by.lambdas(block, X, constant, v)
            y[ex, block.queries] = torch.matmul(by.widened(q[ex, block.queries]), lam)
    return y


def _gradients(
    q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Frame, grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of the first four, those that are needed."""
    by = _Matrices(kernel, H, f)
    needs_q, needs_values, needs_kernel, needs_content, *_ = needs
    grads_q: list[Tensor] = []
    grads_values: list[Tensor] = []
    grads_content: list[Tensor] = []
    dT = None
    for ex in by.examples(values):
        X, constant = by.analysed(values[ex]), None if lam_c is None else by.constant(lam_c[ex])
        dq: list[Tensor] = []
        dX = dconstant = None
        for block in by.blocks:
            dy = by.widened(grad[ex, block.queries])
            if needs_q:
                lam = by.lambdas(block, X, constant, values.shape[2])
                dq.append(torch.matmul(dy, lam.mT).to(q.dtype))
                del lam
            if not (needs_values or needs_kernel or needs_content):
                continue
            dZ = by.lambdas_grad(torch.matmul(by.widened(q[ex, block.queries]).mT, dy))
            if needs_content:
                part = by.constant_grad(dZ)
                dconstant = part if dconstant is None else dconstant + part
            if needs_values:
                dX = by.analysed_grad(block, dZ, X, dX)
            if needs_kernel:
                dT = by.toeplitz_grad(block, dZ, X, dT)
        grads_q += [torch.cat(dq, 1)] if dq else []
        grads_values += [by.values_grad(dX, values).to(values.dtype)] if dX is not None else []
        grads_content += [by.content_grad(dconstant, values).to(values.dtype)] if dconstant is not None else []
    return (
        torch.cat(grads_q) if grads_q else None,
        torch.cat(grads_values) if grads_values else None,
        None if dT is None else by.kernel_grad(dT).to(kernel.dtype),
        torch.cat(grads_content) if grads_content else None,
    )


class _Block(NamedTuple):
    """Some rows of the map: their queries, the part of X that they read, and of T, as a matrix and as it lies in T."""

    queries: slice
    read: slice
    toeplitz: Tensor  # (w, 2·y·k, y·u·2)
    rows: int
    columns: slice


class _Matrices:
    """What a table becomes: the three matrices, T cut into blocks, and how to go through them and back.

    Shapes: s examples, w of N // 2 + 1 frequencies, 2 for real and imaginary, y rows, x columns.
    """

    def __init__(self, kernel: Tensor, H: int, f: Frame) -> None:
        self.H, self.f = H, f
        self.k, self.u, self.r_y, r_x = sizes(kernel)
        kernel = kernel.to(_wide(kernel))
        self.into, self.back, self.of_table = _waves(f, r_x, kernel)
        re, im = (kernel @ self.of_table).unflatten(3, (-1, 2)).permute(4, 3, 0, 2, 1)  # (w, k, r_y, u) each
        both = torch.stack([torch.stack([re, -im], 4), torch.stack([im, re], 4)], 1)  # (w, 2, k, r_y, u, 2)
        # (w, 2, y, k, rows + r_y - 1, u, 2): from the last three to the others
        self.T = both.new_zeros(both.shape[0], 2, f.rows, self.k, f.rows + self.r_y - 1, self.u, 2)
        for i in range(f.rows):
            self.T[:, :, i, :, i : i + self.r_y] = both
        self.blocks = [self._block(*ends) for ends in row_blocks(H, self.r_y, f.rows)]

    def _block(self, first: int, last: int, start: int, stop: int) -> _Block:
        half, rows = self.r_y // 2, last - first
        columns = slice(start - first + half, stop - first + half)
        toeplitz = self.T[:, :, :rows, :, columns].flatten(4).flatten(1, 3)
        read = slice(start * self.u * 2, stop * self.u * 2)
        return _Block(slice(first * self.f.width, last * self.f.width), read, toeplitz, rows, columns)

    def examples(self, values: Tensor) -> list[slice]:
        b, _, v, _ = sizes(values)
        return convolution.parts(b, self.f.rows * self.f.width * self.k * v * self.T.itemsize)

    def widened(self, x: Tensor) -> Tensor:
        return x.to(self.T.dtype).contiguous()

    def analysed(self, values: Tensor) -> Tensor:
        """V (s, H·read, v, u) -> X (w, y·u·2, s·v)."""
        v, u = sizes(values)[2:]
        lines = values.to(self.T.dtype).reshape(-1, self.f.read, v * u)
        X = torch.bmm(self.into.expand(lines.shape[0], -1, -1), lines)
        X = X.view(-1, self.H, self.f.numbers // 2, 2, v, u).permute(2, 1, 5, 3, 0, 4)
        return X.reshape(self.f.numbers // 2, self.H * u * 2, -1)

    def values_grad(self, dX: Tensor, values: Tensor) -> Tensor:
        v, u = values.shape[2:]
        dX = dX.view(self.f.numbers // 2, self.H, u, 2, -1, v).permute(4, 1, 0, 3, 5, 2)
        lines = dX.reshape(-1, self.f.numbers, v * u)
        lines = torch.bmm(self.into.mT.expand(lines.shape[0], -1, -1), lines)
        return lines.view(-1, self.H * self.f.read, v, u)

    def constant(self, lam_c: Tensor) -> Tensor:
        """λc (s, k, v) at frequency 0, of which 1/N comes back, (k, s·v)."""
        return (self.f.N * lam_c.to(self.T.dtype).transpose(0, 1)).flatten(1)

    def constant_grad(self, dZ: Tensor) -> Tensor:
        return dZ[0, : dZ.shape[1] // 2].view(-1, self.k, dZ.shape[2]).sum(0)

    def content_grad(self, dconstant: Tensor, values: Tensor) -> Tensor:
        return self.f.N * dconstant.unflatten(1, (-1, values.shape[2])).transpose(0, 1)

    def lambdas(self, block: _Block, X: Tensor, constant: Tensor | None, v: int) -> Tensor:
        """λ + λc of some rows, (s, y·x, k, v)."""
        Z = torch.bmm(block.toeplitz, X[:, block.read])  # (w, 2·y·k, s·v)
        if constant is not None:
            Z[0, : sizes(Z)[1] // 2].view(-1, *constant.shape).add_(constant)
        of_row = Z.view(self.f.numbers, block.rows, -1).transpose(0, 1)
        lam = torch.bmm(self.back.expand(block.rows, -1, -1), of_row)  # row by row: a third less time than at once
        return lam.view(block.rows, self.f.width, self.k, -1, v).permute(3, 0, 1, 2, 4).flatten(1, 2)

    def lambdas_grad(self, dlam: Tensor) -> Tensor:
        """(s, y·x, k, v) -> dZ (w, 2·y·k, s·v)."""
        s, positions, k, v = dlam.shape
        of_row = dlam.view(-1, self.f.width, k * v)
        dZ = torch.bmm(self.back.mT.expand(of_row.shape[0], -1, -1), of_row)
        dZ = dZ.view(s, positions // self.f.width, self.f.numbers // 2, 2, k, v).permute(2, 3, 1, 4, 0, 5)
        return dZ.reshape(self.f.numbers // 2, -1, s * v)

    def analysed_grad(self, block: _Block, dZ: Tensor, X: Tensor, total: Tensor | None) -> Tensor:
        part = torch.bmm(block.toeplitz.mT, dZ)
        total = part.new_zeros(X.shape) if total is None else total
        total[:, block.read].add_(part)
        return total

    def toeplitz_grad(self, block: _Block, dZ: Tensor, X: Tensor, total: Tensor | None) -> Tensor:
        part = torch.bmm(dZ, X[:, block.read].mT)
        total = part.new_zeros(self.T.shape) if total is None else total
        here = total[:, :, : block.rows, :, block.columns]
        here.add_(part.view(here.shape))
        return total

    def kernel_grad(self, dT: Tensor) -> Tensor:
        both = dT[:, :, 0, :, : self.r_y]
        for i in range(1, self.f.rows):
            both = both + dT[:, :, i, :, i : i + self.r_y]  # (w, 2, k, r_y, u, 2)
        re, im = both[:, 0, ..., 0] + both[:, 1, ..., 1], both[:, 1, ..., 0] - both[:, 0, ..., 1]
        return torch.stack([re, im], 4).permute(1, 3, 2, 0, 4).flatten(3) @ self.of_table.mT


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matrices(kernel: Tensor, H: int, f: Frame, kept: dict[Any, Any]) -> _Matrices:
    """Made once of a table that never changes, and kept while BLOCK_BYTES of T have room."""
    key = "fourier", H, f, kernel.dtype
    made: _Matrices | None = kept.get(key)
    if made is None:
        made = kept[key] = _Matrices(kernel, H, f)
        for oldest in list(kept):
            if sum(x.T.nbytes for x in list(kept.values())) > convolution.BLOCK_BYTES:
                kept.pop(oldest, None)
    return made


def _waves(f: Frame, r_x: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


# One operation to a compiler: unrolled it is slow to compile, and twice as slow to run on a map of 64 x 64.


@torch.library.custom_op("lambdanets::fourier", mutates_args=())
def _fourier_op(q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Sequence[int]) -> Tensor:
    return _evaluated(q, values, lam_c, _Matrices(kernel, H, Frame(*f)))


@torch.library.custom_op("lambdanets::fourier_gradients", mutates_args=())
def _gradients_op(
    q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, H: int, f: Sequence[int], grad: Tensor
) -> list[Tensor]:
    needs = True, True, True, lam_c is not None
    every = _gradients(q, values, kernel, lam_c, H, Frame(*f), grad, needs)
    return [g.contiguous() for g in every if g is not None]


@_fourier_op.register_fake
def _(q: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[2])


@_gradients_op.register_fake
def _(q: Tensor, values: Tensor, kernel: Tensor, lam_c: Tensor | None, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, values, kernel, lam_c) if x is not None]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dvalues, dkernel, *rest = _gradients_op(*ctx.saved_tensors, ctx.H, ctx.f, grad)
    return dq, dvalues, dkernel, rest[0] if rest else None, None, None


_fourier_op.register_autograd(_backward, setup_context=_Fourier.setup_context)


def cost(p: Problem, block: int) -> tuple[int, int, int]:
    if p.table is None or p.grid is None or len(p.grid) != 2:
        return 0, 0, 0
    size = max(4, p.dtype.itemsize)  # 16 bits are computed in float32
    (H, _), (r_y, r_x) = p.grid, reachable_offsets(p.table, p.grid)
    f = frame(p.k, p.u, p.grid, p.table, size)
    # Of rows: a block's own and those that it reads.
    pairs = sum((last - first) * (stop - start) for first, last, start, stop in row_blocks(H, r_y, f.rows))
    columns, lam = p.b * f.tiles * p.v, H * f.width * p.k  # λ's, for each of the columns
    macs = columns * f.numbers * (H * f.read * p.u + 2 * pairs * p.k * p.u + H * f.width * p.k)
    macs += p.k * p.u * r_y * r_x * f.numbers + columns * H * f.width * p.h * p.k
    toeplitz = 2 * f.numbers * f.rows * p.k * (f.rows + r_y - 1) * p.u
    X, Z = H * p.u * f.numbers, f.numbers * p.k  # for each of the columns; of one row
    moved = 2 * columns * (2 * X + H * Z + 2 * lam) + toeplitz * (2 + H // f.rows)
    at_once = convolution.examples(p.b * f.tiles, f.rows * f.width * p.k * p.v * size) * p.v
    return macs, moved * size + ends(p) * p.dtype.itemsize, max(toeplitz, at_once * max(X, f.rows * Z)) * size


def why_not(p: Problem) -> str | None:
    if p.table is not None and len(p.grid or ()) != 2:
        return f"it transforms the rows of a map (H, W), and got the grid {p.grid}"
    return convolution.why_not(p)
