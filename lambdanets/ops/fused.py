"""Triton kernels: the position and the content part together; what is built stays in registers.

    y[b,n,h,v] = Σ_k q[b,n,h,k] · (λc[b,k,v] + Σ_{m,u} R[t(m) - t(n)][k,u] V[b,m,v,u])

Order: the paper's. A program owns N queries and B examples. Its λ, with (query, k) on one side and (example, v) on the
other, is one tensor-core product over the contexts, because the table is shared by the batch; q is applied to it in
registers. Per multiply-add this is the cheapest order on Hopper although `scores` has (k + v)·h / (k·v) of them (1/2 at
v = 16, 1/3.2 at v = 64): 256 x 128 tiles feed wgmma, while scores must turn [(b,h), m] of every query into [(n,h), m] of
every example between two products of 16 rows. A tile reads 16 bytes of V per clock from L2 (about 40 are there); the
table (17 KB at scope 23, bfloat16) stays in L1.

Contexts come from the box that the tile's queries see together, clipped to the map: what lies outside is never visited.
The backward pass builds λ again for dq, and dλ = Σ_h q·dy for dV and dR. dR is one product per tile of offsets, summed
over the queries in registers, then over at most 132 partial tiles: no atomics, every sum has a fixed order.

In the kernels a lower-case letter is a size, upper case is the power of two that a program takes of it. Second
derivatives are not there: they raise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch without Triton; `why_not` says so
    triton = None

if TYPE_CHECKING:
    from .lambda_op import Problem

_jit: Any = triton.jit if triton is not None else lambda f: f
_ON_CPU = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # triton.jit reads it once, here
_WIDEN: Any = tl.constexpr(_ON_CPU) if triton is not None else False
_PROGRAMS = 132  # partial sums of dR: one tile for each multiprocessor of an H100 or H200, wherever it runs


def why_not(p: Problem) -> str | None:
    """Why the kernels cannot take this problem, with its sizes, or None."""
    if triton is None:
        return "Triton is not installed"
    if p.device != "cuda" and not _ON_CPU:
        return f"it runs on CUDA and the problem is on {p.device}; TRITON_INTERPRET=1 before the import emulates it"
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, and the problem is {p.dtype}"
    if p.table is None or p.grid is None:
        return "it needs a relative table on a grid, and got " + ("embeddings" if p.embeddings else "no positions")
    if len(p.grid) > 2:
        return f"it takes grids of 1 or 2 axes, and got {p.grid}"
    if p.grid != p.context_grid:
        return f"the query grid {p.grid} and the context grid {p.context_grid} differ"
    if p.mask is not None:
        return "a mask by query would have to be read for every pair of positions"
    if p.k > 64:
        return f"its tiles hold a key depth up to 64, and k = {p.k}"
    if p.h > 32:
        return f"its tiles hold up to 32 heads, and h = {p.h}"
    if min(p.b, p.n, p.h, p.k, p.v, p.u) < 1:
        return f"nothing to compute: b={p.b} n={p.n} h={p.h} k={p.k} v={p.v} u={p.u}"
    largest = max(p.b * p.n * p.h * p.k, p.b * p.n * p.h * p.v, p.b * p.n * p.v * p.u, math.prod(p.table) * p.k * p.u)
    if largest >= 2**31 or p.n >= 2**22:
        return f"it counts with 32 bits: the largest tensor has {largest:,} numbers (2³¹), the map {p.n:,} (2²²)"
    return None


class Tiles(NamedTuple):
    """What one program takes of each axis in the three kernels, and how it is launched."""

    rows: int  # λ: queries x k,
    columns: int  # examples x v,
    contexts: int  # and contexts per step
    positions: int  # dV: contexts; the columns are those of λ,
    queries: int  # and queries x k per step
    pairs: int  # dR: (queries x k) x contexts,
    depth: int  # and examples x v per step
    warps: int
    stages: int


def _tiles(dtype: torch.dtype, precision: str) -> Tiles:
    """The rule: full Hopper tiles for 16 bits, a quarter for tf32, and what fits registers without tensor cores."""
    if dtype != torch.float32:
        return Tiles(256, 128, 64, 128, 64, 128 * 256, 64, 8, 3)
    if precision == "tf32":
        return Tiles(128, 64, 32, 64, 32, 64 * 128, 32, 4, 3)
    return Tiles(64, 64, 16, 64, 16, 64 * 64, 16, 4, 2)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(x: int, least: int = 1) -> int:
    return max(least, 1 << (x - 1).bit_length())


class Sizes(NamedTuple):
    """The sizes of one call: the paper's letters, the map and the table with two axes, and the blocks."""

    b: int
    n: int
    h: int
    k: int
    v: int
    u: int
    height: int
    width: int
    ry: int
    rx: int
    precision: str
    tiles: Tiles

    @property
    def K(self) -> int:
        return _pow2(self.k, 16)

    def heads(self, N: int) -> dict[str, int]:
        """H, and the G groups of N queries whose products with dy are separate: depth N/G·H is 16 or more."""
        H = _pow2(self.h)
        together = min(N, max(1, 16 // H))
        return {"H": max(H, 16 // together), "G": N // together}

    def split(self, columns: int) -> tuple[int, int]:
        """(B, V): examples and values of a tile with at most this many columns."""
        V = min(columns, _pow2(self.v, 16))
        return min(columns // V, _pow2(self.b)), V

    def parts(self, columns: int) -> int:
        """Tiles that cover (b, v)."""
        B, V = self.split(columns)
        return _ceil(self.b, B) * _ceil(self.v, V)

    def strips(self, positions: int) -> tuple[int, int, int]:
        """Cut the map into strips of columns and these, row by row, into tiles: (columns, tiles of a strip, tiles).

        The tile whose box of visible contexts is smallest: whole rows where everything is visible, near squares where
        the window is small.
        """
        return _strips(self.height, self.width, self.ry, self.rx, positions)


@lru_cache(maxsize=1024)
def _strips(height: int, width: int, ry: int, rx: int, positions: int) -> tuple[int, int, int]:
    def cost(strip: int) -> int:
        box = min(height, _ceil(positions, strip) + ry - 1) * min(width, strip + rx - 1)
        return _ceil(height * strip, positions) * _ceil(width, strip) * box

    strip = min([width, *[s for s in (2, 4, 8, 16) if s < width]], key=cost)
    tiles = _ceil(height * strip, positions)
    return strip, tiles, tiles * _ceil(width, strip)


class Shifts(NamedTuple):
    """How the offsets between a row of N queries and a box of Y x X contexts are cut into tiles for dR."""

    N: int
    Y: int
    X: int
    low_y: int  # the first offset of box and row
    low_x: int
    down: int  # tiles
    across: int


@lru_cache(maxsize=1024)
def _shifts(height: int, width: int, ry: int, rx: int, K: int, area: int) -> Shifts:
    """The cut with the fewest products of tiles that touch the map, counted."""

    def cut(N: int, X: int) -> tuple[int, Shifts]:
        Y = area // (N * K) // X
        last = (_ceil(width, N) - 1) * N  # where the last row of queries begins
        low_y, high_y = -min(ry // 2, height - 1), min(ry // 2, height - 1)
        low_x, high_x = -min(rx // 2, last), min(rx // 2 + N - 1, width - 1)
        down, across = _ceil(high_y - low_y + 1, Y), _ceil(high_x - low_x + 1, X)
        touched_y = sum(min(height, height - s) - max(0, 1 - s - Y) for s in range(low_y, high_y + 1, Y))
        touched_x = sum(
            min(_ceil(width, N) - 1, (width - 1 - s) // N) - max(0, N - s - X) // N + 1
            for s in range(low_x, high_x + 1, X)
        )
        return touched_y * touched_x * N * Y * X, Shifts(N, Y, X, low_y, low_x, down, across)

    cuts = [cut(N, X) for N in (4, 8, 16) for X in (8, 16, 32) if 64 <= N * K <= 256 and area // (N * K) // X >= 1]
    return min(cuts or [cut(1, 16)])[1]


# --- kernels ------------------------------------------------------------------------------------------------------


@_jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    if _WIDEN:  # the interpreter keeps bfloat16 as bare bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@_jit
def _place(
    tile: tl.tensor, count: tl.constexpr, strip: tl.tensor, per_strip: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """The first position of a tile inside its strip, and the strip's left edge and columns."""
    left = tile // per_strip * strip
    return tile % per_strip * count, left, tl.minimum(strip, width - left)


@_jit
def _box(
    first: tl.tensor,
    count: tl.constexpr,
    left: tl.tensor,
    across: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    ry: tl.tensor,
    rx: tl.tensor,
) -> tl.tensor:
    """The positions of the map within half a table of a tile: top row, rows, left column, columns."""
    top = tl.maximum(first // across - ry // 2, 0)
    bottom = tl.minimum((first + count - 1) // across + ry // 2, height - 1)
    start = tl.maximum(left - rx // 2, 0)
    stop = tl.minimum(left + across - 1 + rx // 2, width - 1)
    return top, tl.maximum(bottom - top + 1, 0), start, stop - start + 1


@_jit
def _lambda_kernel(
    q: tl.tensor, values: tl.tensor, table: tl.tensor, lam_c: tl.tensor, dy: tl.tensor, out: tl.tensor,
    b: tl.tensor, n: tl.tensor, u: tl.tensor, height: tl.tensor, width: tl.tensor, ry: tl.tensor, rx: tl.tensor, strip: tl.tensor, per_strip: tl.tensor, tiles: tl.tensor,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
    B: tl.constexpr, V: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    CONTENT: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """λ of N queries and B examples; then y = Σ_k q·λ, or with GRADIENT dq = Σ_v λ·dy (a partial sum for each V)."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across = _place(tile, N, strip, per_strip, height, width)
    top, rows, start, columns = _box(first, N, left, across, height, width, ry, rx)
    area, inverse = rows * columns, 1.0 / columns

    c = tl.arange(0, N * K)
    qy, qx = (first + c // K) // across, left + (first + c // K) % across  # (N·K)
    table_column = c % K - (qy * rx + qx) * k
    w = tl.arange(0, B * V)
    wb, wv = first_b + w // V, first_v + w % V
    value_column, real = wb * (u * n * v) + wv, (wb < b) & (wv < v)  # (B·V)

    # The axis that the last sum runs over lies along a thread's registers: k for y, v for dq.
    acc = tl.zeros((N * K, B * V) if GRADIENT else (B * V, N * K), tl.float32)
    for i in range(u):
        for step in range(0, area, M):
            j = step + tl.arange(0, M)
            my = ((j + 0.5) * inverse).to(tl.int32)  # j // columns, exact below 2²²
            mx = start + j - my * columns
            my += top
            dy_, dx_ = my[:, None] - qy[None, :] + ry // 2, mx[:, None] - qx[None, :] + rx // 2
            seen = (dy_ >= 0) & (dy_ < ry) & (dx_ >= 0) & (dx_ < rx) & (j < area)[:, None] & (c % K < k)[None, :]
            table_row = ((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k)
            e = tl.load(table + table_row[:, None] + table_column[None, :], seen, 0.0, cache_modifier=".ca")  # (M, N·K)
            value_row = (my * width + mx) * v + i * (n * v)
            x = tl.load(values + value_row[:, None] + value_column[None, :], (j < area)[:, None] & real[None, :], 0.0)
            if GRADIENT:
                acc = _dot(tl.trans(e), x, acc, PRECISION)
            else:
                acc = _dot(tl.trans(x), e, acc, PRECISION)

    nn = first + tl.arange(0, N)
    at = nn // across * width + left + nn % across
    nn_real = nn < height * across  # (N)
    bb, vv, kk = first_b + tl.arange(0, B), first_v + tl.arange(0, V), tl.arange(0, K)
    lam_real = real[:, None] & (kk < k)[None, :]
    if CONTENT:
        lam = tl.load(lam_c + (wb * (k * v) + wv)[:, None] + kk[None, :] * v, lam_real, 0.0)  # (B·V, K)
        if GRADIENT:
            acc = tl.reshape(tl.reshape(acc, (N, K, B * V)) + tl.trans(lam)[None, :, :], (N * K, B * V))
        else:
            acc = tl.reshape(tl.reshape(acc, (B * V, N, K)) + lam[:, None, :], (B * V, N * K))
    for i in range(h):
        if GRADIENT:
            head = (bb[None, :] * n + at[:, None]) * h + i  # (N, B)
            ok = nn_real[:, None] & (bb < b)[None, :]
            g = tl.load(dy + head[:, :, None] * v + vv[None, None, :], ok[:, :, None] & (vv < v)[None, None, :], 0.0)
            d = tl.sum(tl.reshape(acc, (N, K, B, V)) * g.to(tl.float32)[:, None, :, :], 3)  # (N, K, B)
            into = out + part % chunks * (b * n * h * k) + head[:, None, :] * k + kk[None, :, None]
            tl.store(into, d.to(out.dtype.element_ty), ok[:, None, :] & (kk < k)[None, :, None])
        else:
            head = (bb[:, None] * n + at[None, :]) * h + i  # (B, N)
            ok = (bb < b)[:, None] & nn_real[None, :]
            g = tl.load(q + head[:, :, None] * k + kk[None, None, :], ok[:, :, None] & (kk < k)[None, None, :], 0.0)
            y = tl.sum(tl.reshape(acc, (B, V, N, K)) * g.to(tl.float32)[:, None, :, :], 3)  # (B, V, N)
            into = out + head[:, None, :] * v + vv[None, :, None]
            tl.store(into, y.to(out.dtype.element_ty), ok[:, None, :] & (vv < v)[None, :, None])


@_jit
def _dlam(
    q: tl.tensor, dy: tl.tensor, at: tl.tensor, seen: tl.tensor, first_b: tl.tensor, first_v: tl.tensor,
    b: tl.tensor, n: tl.tensor, h: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
    B: tl.constexpr, V: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dλ[b,n,k,v] = Σ_h q·dy of B examples and N queries, (B·V, N·K), or TURNED (N·K, B·V).

    A product of depth h alone would waste the tensor cores. N/G queries share one: their heads follow each other in
    its depth, and q is laid out block by block with zeros between. `at`, `seen`: (B·N·H), the position of each row.
    """
    r = tl.arange(0, B * N * H)  # (B, G, N/G, H)
    rb, head = first_b + r // (N * H), r % H
    seen = seen & (head < h) & (rb < b)
    row = (rb * n + at) * h + head
    vv, c = first_v + tl.arange(0, V), tl.arange(0, N // G * K)
    d = tl.load(dy + row[:, None] * v + vv[None, :], seen[:, None] & (vv < v)[None, :], 0.0)  # (B·N·H, V)
    own = (r // H % (N // G))[:, None] == (c // K)[None, :]
    w = tl.load(q + row[:, None] * k + (c % K)[None, :], own & seen[:, None] & (c % K < k)[None, :], 0.0)
    if B * G == 1:
        if TURNED:
            lam = _dot(tl.trans(w), d, tl.zeros((N * K, V), tl.float32), PRECISION)
        else:
            lam = _dot(tl.trans(d), w, tl.zeros((V, N * K), tl.float32), PRECISION)
    else:
        d = tl.reshape(d, (B * G, N // G * H, V))
        w = tl.reshape(w, (B * G, N // G * H, N // G * K))
        if TURNED:
            lam = _dot(tl.trans(w, (0, 2, 1)), d, tl.zeros((B * G, N // G * K, V), tl.float32), PRECISION)
            lam = tl.permute(tl.reshape(lam, (B, G, N // G * K, V)), (1, 2, 0, 3))
            lam = tl.reshape(lam, (N * K, B * V))
        else:
            lam = _dot(tl.trans(d, (0, 2, 1)), w, tl.zeros((B * G, V, N // G * K), tl.float32), PRECISION)
            lam = tl.permute(tl.reshape(lam, (B, G, V, N // G * K)), (0, 2, 1, 3))
            lam = tl.reshape(lam, (B * V, N * K))
    return lam.to(q.dtype.element_ty)


@_jit
def _values_kernel(
    q: tl.tensor, table: tl.tensor, dy: tl.tensor, out: tl.tensor,
    b: tl.tensor, n: tl.tensor, u: tl.tensor, height: tl.tensor, width: tl.tensor, ry: tl.tensor, rx: tl.tensor,
    strip: tl.tensor, per_strip: tl.tensor, tiles: tl.tensor, parts: tl.tensor,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
    B: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV[b,m,v,i] = Σ_{n,k} E[n,m,k,i] dλ[b,n,k,v] for M contexts, B examples and one i of the intra-depth."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i, part = part // parts, part % parts
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across = _place(tile, M, strip, per_strip, height, width)
    top, rows, start, columns = _box(first, M, left, across, height, width, ry, rx)
    area = rows * columns

    mm = first + tl.arange(0, M)
    my, mx = mm // across, left + mm % across
    table_row = ((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k)  # (M)
    c, r = tl.arange(0, N * K), tl.arange(0, B * N * H)
    acc = tl.zeros((B * V, M), tl.float32)
    for step in range(0, area, N):
        j = step + c // K
        qy, qx = top + j // columns, start + j % columns  # (N·K)
        dy_, dx_ = my[:, None] - qy[None, :] + ry // 2, mx[:, None] - qx[None, :] + rx // 2
        seen = (dy_ >= 0) & (dy_ < ry) & (dx_ >= 0) & (dx_ < rx) & ((j < area) & (c % K < k))[None, :]
        table_column = c % K - (qy * rx + qx) * k
        e = tl.load(table + table_row[:, None] + table_column[None, :], seen, 0.0, cache_modifier=".ca")  # (M, N·K)
        j = step + r // H % N
        at = (top + j // columns) * width + start + j % columns
        lam = _dlam(q, dy, at, j < area, first_b, first_v, b, n, h, k, v, B, V, N, K, H, G, False, PRECISION)
        acc = _dot(lam, tl.trans(e), acc, PRECISION)

    w = tl.arange(0, B * V)
    wb, wv = first_b + w // V, first_v + w % V
    into = out + ((wb * u + i) * (n * v) + wv)[:, None] + ((my * width + mx) * v)[None, :]
    tl.store(into, acc.to(out.dtype.element_ty), ((wb < b) & (wv < v))[:, None] & (mm < height * across)[None, :])


@_jit
def _table_kernel(
    q: tl.tensor, values: tl.tensor, dy: tl.tensor, out: tl.tensor,
    b: tl.tensor, n: tl.tensor, u: tl.tensor, height: tl.tensor, width: tl.tensor, low_y: tl.tensor, low_x: tl.tensor,
    down: tl.tensor, across: tl.tensor, splits: tl.tensor, parts: tl.tensor,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
    B: tl.constexpr, V: tl.constexpr, N: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{b,v,n} V[b,m,v,i] dλ[b,n,k,v] where m - n is fixed: rows of N queries against boxes of Y x X contexts.

    A program owns one shift between row and box and meets every row of the map, so that all it meets is summed in its
    registers; `_fold_kernel` adds what belongs to the same offset. out (splits, u, down·Y, across·X, N·K), float32.
    """
    pid = tl.program_id(0)
    shift_x = low_x + pid % across * X
    shift_y = low_y + pid // across % down * Y
    i = pid // across // down % u
    split = pid // across // down // u
    # Rows of queries whose box touches the map; nothing is negative when it is divided.
    y_first = tl.maximum(0, 1 - shift_y - Y)
    y_count = tl.minimum(height, height - shift_y) - y_first
    x_first = tl.maximum(0, N - shift_x - X) // N
    x_count = tl.minimum((width + N - 1) // N - 1, (width - 1 - shift_x) // N) - x_first + 1
    total = tl.maximum(y_count, 0) * tl.maximum(x_count, 0) * parts
    share = (total + splits - 1) // splits

    chunks: tl.constexpr = (v + V - 1) // V
    r, m = tl.arange(0, B * N * H), tl.arange(0, Y * X)
    w = tl.arange(0, B * V)
    acc = tl.zeros((N * K, Y * X), tl.float32)
    for step in range(split * share, tl.minimum(total, split * share + share)):
        part, row = step % parts, step // parts
        first_b, first_v = part // chunks * B, part % chunks * V
        y, x = y_first + row // x_count, (x_first + row % x_count) * N
        my, mx = y + shift_y + m // X, x + shift_x + m % X
        wb, wv = first_b + w // V, first_v + w % V
        there = (my >= 0) & (my < height) & (mx >= 0) & (mx < width)
        value_row = (my * width + mx) * v + i * (n * v)
        value_column = wb * (u * n * v) + wv
        s = tl.load(
            values + value_row[:, None] + value_column[None, :], there[:, None] & ((wb < b) & (wv < v))[None, :], 0.0
        )  # (Y·X, B·V)
        column = x + r // H % N
        lam = _dlam(
            q,
            dy,
            y * width + column,
            column < width,
            first_b,
            first_v,
            b,
            n,
            h,
            k,
            v,
            B,
            V,
            N,
            K,
            H,
            G,
            True,
            PRECISION,
        )
        acc = _dot(lam, tl.trans(s), acc, PRECISION)

    c = tl.arange(0, N * K)
    line = ((split * u + i) * (down * Y) + pid // across % down * Y + m // X) * (across * X) + pid % across * X + m % X
    tl.store(out + (line * (N * K))[None, :] + c[:, None], acc)


@_jit
def _fold_kernel(
    sums: tl.tensor, out: tl.tensor, u: tl.tensor, ry: tl.tensor, rx: tl.tensor, low_y: tl.tensor, low_x: tl.tensor,
    height: tl.tensor, width: tl.tensor, splits: tl.tensor, k: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dR[o,k,i] = Σ over splits and the N queries of a row of what `_table_kernel` found at shift o + query."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (u, ry, rx)
    kk = tl.arange(0, K)
    i, y, x = o // (ry * rx), o // rx % ry - ry // 2 - low_y, o % rx - rx // 2 - low_x
    acc = tl.zeros((BLOCK, K), tl.float32)
    for split in range(splits):
        for query in tl.static_range(N):
            ok = (o < u * ry * rx) & (y >= 0) & (y < height) & (x + query >= 0) & (x + query < width)
            line = ((split * u + i) * height + y) * width + x + query
            acc += tl.load(sums + (line * (N * K) + query * K)[:, None] + kk[None, :], ok[:, None], 0.0)
    tl.store(
        out + (o * k)[:, None] + kk[None, :],
        acc.to(out.dtype.element_ty),
        (o < u * ry * rx)[:, None] & (kk < k)[None, :],
    )


@_jit
def _content_kernel(
    q: tl.tensor, dy: tl.tensor, out: tl.tensor, rows: tl.tensor, k: tl.constexpr, v: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dλc[b,k,v] = Σ_{n,h} q·dy for one example; rows are (n, h)."""
    chunks: tl.constexpr = (v + V - 1) // V
    example = tl.program_id(0) // chunks
    vv, kk = tl.program_id(0) % chunks * V + tl.arange(0, V), tl.arange(0, K)
    acc = tl.zeros((V, K), tl.float32)
    for step in range(0, rows, ROWS):
        r = step + tl.arange(0, ROWS)
        row = example * rows + r
        d = tl.load(dy + row[:, None] * v + vv[None, :], (r < rows)[:, None] & (vv < v)[None, :], 0.0)
        w = tl.load(q + row[:, None] * k + kk[None, :], (r < rows)[:, None] & (kk < k)[None, :], 0.0)
        acc = _dot(tl.trans(d), w, acc, PRECISION)
    tl.store(out + example * (k * v) + kk[None, :] * v + vv[:, None], acc, (kk < k)[None, :] & (vv < v)[:, None])


# --- operators ----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, programs: int, s: Sizes, arguments: dict[str, Any], blocks: dict[str, Any]) -> None:
    on = arguments["out"].device
    with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
        kernel[(programs,)](
            **arguments, **blocks, PRECISION=s.precision, num_warps=s.tiles.warps, num_stages=s.tiles.stages,
            enable_fp_fusion=True,
        )  # fmt: skip


def _sizes(b: int, h: int, k: int, v: int, u: int, grid: Sequence[int], sides: Sequence[int], x: Tensor) -> Sizes:
    height, width = (1, *grid)[-2:]
    ry, rx = (1, *sides[: len(grid)])[-2:]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    return Sizes(b, height * width, h, k, v, u, height, width, ry, rx, precision, _tiles(x.dtype, precision))


def _by_depth(x: Tensor, axis: int) -> Tensor:
    """Values (b, m, v, u) and tables (r..., k, u) with u before the positions: k and v lie together in memory."""
    return x.movedim(-1, axis).contiguous()


@torch.library.custom_op("lambdanets::fused", mutates_args=())
def _fused(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    b, n, h, k = q.shape
    v, u = values.shape[2:]
    out = q.new_empty(b, n, h, v)
    _lambda(_sizes(b, h, k, v, u, grid, table.shape, q), values, table, lam_c, out, q=q)
    return out


@torch.library.custom_op("lambdanets::fused_dq", mutates_args=())
def _fused_dq(values: Tensor, table: Tensor, lam_c: Tensor | None, dy: Tensor, grid: Sequence[int]) -> Tensor:
    b, n, h, v = dy.shape
    k, u = table.shape[-2:]
    s = _sizes(b, h, k, v, u, grid, table.shape, dy)
    chunks = _ceil(v, s.split(s.tiles.columns)[1])
    out = dy.new_empty(chunks, b, n, h, k, dtype=torch.float32 if chunks > 1 else dy.dtype)
    _lambda(s, values, table, lam_c, out, dy=dy)
    return out[0] if chunks == 1 else out.sum(0).to(dy.dtype)


def _lambda(
    s: Sizes, values: Tensor, table: Tensor, lam_c: Tensor | None, out: Tensor,
    *, q: Tensor | None = None, dy: Tensor | None = None,
) -> None:  # fmt: skip
    N = max(1, s.tiles.rows // s.K)
    B, V = s.split(s.tiles.columns)
    strip, per_strip, tiles = s.strips(N)
    given = q if q is not None else dy
    assert given is not None
    given = given.contiguous()
    _launch(
        _lambda_kernel, tiles * s.parts(s.tiles.columns), s,
        {"q": given, "values": _by_depth(values, 1), "table": _by_depth(table, 0), "dy": given, "out": out,
         "lam_c": given if lam_c is None else lam_c.float().contiguous(), "b": s.b, "n": s.n, "u": s.u,
         "height": s.height, "width": s.width, "ry": s.ry, "rx": s.rx, "strip": strip, "per_strip": per_strip,
         "tiles": tiles},
        {"h": s.h, "k": s.k, "v": s.v, "B": B, "V": V, "N": N, "M": s.tiles.contexts, "K": s.K,
         "CONTENT": lam_c is not None, "GRADIENT": q is None},
    )  # fmt: skip


@torch.library.custom_op("lambdanets::fused_dvalues", mutates_args=())
def _fused_dvalues(q: Tensor, table: Tensor, dy: Tensor, grid: Sequence[int]) -> Tensor:
    b, n, h, k = q.shape
    v, u = dy.shape[3], table.shape[-1]
    s = _sizes(b, h, k, v, u, grid, table.shape, q)
    N = max(1, s.tiles.queries // s.K)
    B, V = s.split(s.tiles.columns)
    strip, per_strip, tiles = s.strips(s.tiles.positions)
    parts = s.parts(s.tiles.columns)
    out = q.new_empty(b, u, n, v)
    _launch(
        _values_kernel, tiles * parts * u, s,
        {"q": q.contiguous(), "table": _by_depth(table, 0), "dy": dy.contiguous(), "out": out, "b": b, "n": n, "u": u,
         "height": s.height, "width": s.width, "ry": s.ry, "rx": s.rx, "strip": strip, "per_strip": per_strip,
         "tiles": tiles, "parts": parts},
        {"h": h, "k": k, "v": v, "B": B, "V": V, "M": s.tiles.positions, "N": N, "K": s.K, **s.heads(N)},
    )  # fmt: skip
    return out.permute(0, 2, 3, 1).reshape(b, n, v, u)


@torch.library.custom_op("lambdanets::fused_dtable", mutates_args=())
def _fused_dtable(q: Tensor, values: Tensor, dy: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    b, n, h, k = q.shape
    v, u = values.shape[2:]
    s = _sizes(b, h, k, v, u, grid, sides, q)
    cut = _shifts(s.height, s.width, s.ry, s.rx, s.K, s.tiles.pairs)
    B, V = s.split(s.tiles.depth)
    parts = s.parts(s.tiles.depth)
    splits = max(1, min(_PROGRAMS // (cut.down * cut.across * u), s.height * _ceil(s.width, cut.N) * parts))
    sums = q.new_empty(splits, u, cut.down * cut.Y, cut.across * cut.X, cut.N * s.K, dtype=torch.float32)
    shift = {"low_y": cut.low_y, "low_x": cut.low_x, "splits": splits, "u": u}
    _launch(
        _table_kernel, splits * u * cut.down * cut.across, s,
        {"q": q.contiguous(), "values": _by_depth(values, 1), "dy": dy.contiguous(), "out": sums, "b": b, "n": n,
         "height": s.height, "width": s.width, "down": cut.down, "across": cut.across, "parts": parts, **shift},
        {"h": h, "k": k, "v": v, "B": B, "V": V, "N": cut.N, "Y": cut.Y, "X": cut.X, "K": s.K, **s.heads(cut.N)},
    )  # fmt: skip
    out = q.new_empty(u, *sides, k)
    block = 16
    _launch(
        _fold_kernel, _ceil(u * s.ry * s.rx, block), s,
        {"sums": sums, "out": out, "ry": s.ry, "rx": s.rx, "height": cut.down * cut.Y, "width": cut.across * cut.X,
         **shift},
        {"k": k, "N": cut.N, "K": s.K, "BLOCK": block},
    )  # fmt: skip
    return out.movedim(0, -1).reshape(*sides, k, u)


@torch.library.custom_op("lambdanets::fused_dlam_c", mutates_args=())
def _fused_dlam_c(q: Tensor, dy: Tensor) -> Tensor:
    b, n, h, k = q.shape
    v = dy.shape[3]
    s = _sizes(b, h, k, v, 1, (n,), (1,), q)
    V = s.split(s.tiles.columns)[1]
    out = q.new_empty(b, k, v, dtype=torch.float32)
    _launch(
        _content_kernel, b * _ceil(v, V), s,
        {"q": q.contiguous(), "dy": dy.contiguous(), "out": out, "rows": n * h},
        {"k": k, "v": v, "V": V, "K": s.K, "ROWS": 2 * s.tiles.contexts},
    )  # fmt: skip
    return out


@_fused.register_fake
def _(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[2])


@_fused_dq.register_fake
def _(values: Tensor, table: Tensor, lam_c: Tensor | None, dy: Tensor, grid: Sequence[int]) -> Tensor:
    return dy.new_empty(*dy.shape[:3], table.shape[-2])


@_fused_dvalues.register_fake
def _(q: Tensor, table: Tensor, dy: Tensor, grid: Sequence[int]) -> Tensor:
    return q.new_empty(*q.shape[:2], dy.shape[3], table.shape[-1])


@_fused_dtable.register_fake
def _(q: Tensor, values: Tensor, dy: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    return q.new_empty(*sides, q.shape[3], values.shape[3])


@_fused_dlam_c.register_fake
def _(q: Tensor, dy: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[3], dy.shape[3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.grid = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    q, values, table, lam_c = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _fused_dq(values, table, lam_c, dy, ctx.grid) if wanted[0] else None,
        _fused_dvalues(q, table, dy, ctx.grid) if wanted[1] else None,
        _fused_dtable(q, values, dy, ctx.grid, table.shape[: len(ctx.grid)]) if wanted[2] else None,
        _fused_dlam_c(q, dy).to(lam_c.dtype) if lam_c is not None and wanted[3] else None,
        None,
    )


_fused.register_autograd(_gradients, setup_context=_save)


def fused(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Apply the lambda of every position, and that of the content, without writing either to memory.

        y[b,n,h,v] = Σ_k q[b,n,h,k] · (λc[b,k,v] + Σ_{m,u} R[t(m) - t(n)][k,u] V[b,m,v,u])

    q       (b, n, h, k)
    values  (b, n, v, u), on the same grid as the queries
    table   (r_1, ..., r_d, k, u), d = 1 or 2, every r odd, offset 0 in the middle, zero outside
    lam_c   (b, k, v), float32: the content lambda; None leaves it out
    grid    d sizes whose product is n
    returns (b, n, h, v), dtype of q (under autocast, the autocast dtype)

    float32, bfloat16 or float16 inputs, one dtype; every sum is in float32 and has a fixed order, so equal inputs give
    equal bits. float32 is multiplied as tf32 only where `torch.backends.cuda.matmul` allows it. λ and y are rounded
    once, dλ once more. Sizes are those that `lambda_op` checks, and `why_not` of the problem is None.
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, values, table = q.to(dtype), values.to(dtype), table.to(dtype)
    return _fused(q, values, table, lam_c, list(grid))
