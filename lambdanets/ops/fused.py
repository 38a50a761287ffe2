"""Triton kernels: the position and the content part together; λ, scores and expanded tables stay in registers.

    y[b,n,h,v] = Σ_k q[b,n,h,k] · (λc[b,k,v] + Σ_{m,u} R[t(m) - t(n)][k,u] V[b,m,v,u])

The order is the paper's. A program owns N queries and B examples: its λ, (query, k) by (example, v), is one product over
the contexts, because the batch shares the table; q is applied to it in registers. `scores` needs fewer multiply-adds,
(k + v)·h for k·v: 1/2 at v = 16, 1/3.2 at v = 64. But it must turn s from one query's (b, h) rows to one example's
(n, h) rows between two thin products, on the half-rate instruction, while here tiles of 256 x 128 feed wgmma, reading
16 bytes of V a clock from L2 (about 40 are to be had) and the table (17 KB at scope 23) from L1.

Contexts come from the box that a tile's queries see together, clipped to the map; what lies outside is not visited.
The backward pass builds λ again for dq, and dλ = Σ_h q·dy for dV and dR. dR is one product per tile of offsets, summed
over the map in registers and then over partial tiles, 132 or the table's own number. No atomics: equal bits every time.

In the kernels lower case is a size and upper case the power of two that a program takes of it.
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
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # PyTorch without Triton: `why_not` says so
    triton = None

if TYPE_CHECKING:
    from .lambda_op import Problem

_jit: Any = triton.jit if triton is not None else lambda f: f
_EMULATED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # triton.jit reads it now, not later
_WIDEN: Any = tl.constexpr(_EMULATED) if triton is not None else False
_PROGRAMS = 132  # partial tiles of dR: the multiprocessors of an H200, wherever it runs, so that sums are the same


def why_not(p: Problem) -> str | None:
    """Why the kernels cannot take this problem, with its sizes, or None."""
    if triton is None:
        return "Triton is not installed"
    if p.device != "cuda" and not _EMULATED:
        return f"it runs on cuda, not on {p.device} (TRITON_INTERPRET=1, set before the import, emulates it slowly)"
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {str(p.dtype)[6:]}"
    if p.table is None or p.grid is None:
        return "it needs a relative table on a grid, and got " + ("embeddings" if p.embeddings else "no positions")
    if len(p.grid) > 2:
        return f"it takes grids of 1 or 2 axes, and got {p.grid}"
    if p.grid != p.context_grid:
        return f"the query grid {p.grid} and the context grid {p.context_grid} differ"
    if p.mask is not None:
        return f"a mask by query, here {p.n} x {p.m}, is not read by the kernels"
    if p.k > 64 or p.h > 32:
        return f"its tiles hold k up to 64 and h up to 32, and k = {p.k}, h = {p.h}"
    if min(p.b, p.h, p.k, p.v, p.u) < 1:
        return f"there is nothing to compute: b={p.b} h={p.h} k={p.k} v={p.v} u={p.u}"
    # dR's partial sums hold the table at most 32 times over.
    largest = max(p.b * p.n * max(p.h * p.k, p.h * p.v, p.v * p.u), 32 * math.prod(p.table) * _pow2(p.k, 16) * p.u)
    if largest >= 2**31 or p.n >= 2**20:
        return f"it counts in 32 bits: up to 2³¹ numbers a tensor and 2²⁰ positions, here {largest:,} and {p.n:,}"
    return None


# --- tiles --------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """What one program takes of each axis, and how it is launched."""

    rows: int  # λ: queries x k,
    columns: int  # examples x v (of dV and dλc too),
    contexts: int  # and contexts a step
    positions: int  # dV: contexts,
    queries: int  # and queries x k a step
    pairs: int  # dR: (queries x k) x contexts,
    depth: int  # and examples x v a step
    warps: int
    stages: int


@lru_cache(maxsize=64)
def _tiles(dtype: torch.dtype, precision: str, shared_bytes: int) -> Tiles:
    """The rule: Hopper's full tiles for 16 bits, a quarter for tf32, and what fits registers without tensor cores.

    Three stages need 147 KB of shared memory; where a program cannot have it, two need 98 KB.
    """
    stages = 3 if shared_bytes >= 150_000 else 2
    if dtype != torch.float32:
        return Tiles(256, 128, 64, 128, 64, 128 * 256, 64, 8, stages)
    if precision == "tf32":
        return Tiles(128, 64, 32, 64, 32, 64 * 128, 32, 4, stages)
    return Tiles(64, 64, 32, 64, 16, 64 * 64, 16, 4, 2)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(x: int, least: int = 1) -> int:
    return max(least, 1 << (x - 1).bit_length())


@lru_cache(maxsize=1024)
def _strips(height: int, width: int, ry: int, rx: int, positions: int) -> dict[str, int]:
    """Cut the map into strips of columns, and these row by row into tiles: whole rows where all is visible, near
    squares where the window is small; whatever makes the boxes that the tiles see smallest."""

    def cost(strip: int) -> int:
        box = min(height, _ceil(positions, strip) + ry - 1) * min(width, strip + rx - 1)
        return _ceil(height * strip, positions) * _ceil(width, strip) * box

    strip = min([width, *[s for s in (2, 4, 8, 16) if s < width]], key=cost)
    per_strip = _ceil(height * strip, positions)
    return {"strip": strip, "per_strip": per_strip, "tiles": per_strip * _ceil(width, strip)}


@lru_cache(maxsize=1024)
def _shifts(height: int, width: int, ry: int, rx: int, K: int, pairs: int) -> dict[str, int]:
    """Cut the offsets between a row of N queries and a box of Y x X contexts into down x across tiles from (low_y, low_x)
    on: the cut whose tiles meet the map least often."""

    def cut(N: int, X: int) -> tuple[int, dict[str, int]]:
        Y, rows = pairs // (N * K) // X, _ceil(width, N)
        low_y, low_x = -min(ry // 2, height - 1), -min(rx // 2, (rows - 1) * N)
        down = range(low_y, min(ry // 2, height - 1) + 1, Y)
        across = range(low_x, min(rx // 2 + N - 1, width - 1) + 1, X)
        met = sum(min(height, height - s) - max(0, 1 - s - Y) for s in down)
        met *= sum(min(rows, (width - 1 - s) // N + 1) - max(0, N - s - X) // N for s in across)
        return met * N * Y * X, {
            "N": N, "Y": Y, "X": X, "low_y": low_y, "low_x": low_x, "down": len(down), "across": len(across)
        }  # fmt: skip

    sizes = [(N, X) for N in (1, 2, 4, 8, 16) for X in (8, 16, 32) if min(64, 16 * K) <= N * K <= max(256, K)]
    return min((cut(N, X) for N, X in sizes if pairs // (N * K) >= X), key=lambda c: c[0])[1]


class Sizes(NamedTuple):
    """The sizes of one call: the paper's letters, map and table as two axes, the multiplication, and the tiles."""

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

    def split(self, columns: int) -> dict[str, int]:
        """B examples x V values of a tile, and how many parts cover (b, v)."""
        V = min(columns, _pow2(self.v, 16))
        B = min(columns // V, _pow2(self.b))
        return {"B": B, "V": V, "parts": _ceil(self.b, B) * _ceil(self.v, V)}

    def groups(self, N: int) -> dict[str, int]:
        """N queries in G groups, each one product q·dy of depth N/G·H >= 16."""
        together = min(N, max(1, 16 // _pow2(self.h)))
        return {"N": N, "H": _pow2(self.h, 16 // together), "G": N // together}


# --- kernels ------------------------------------------------------------------------------------------------------


@_jit
def _dot(a, b, acc, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    if _WIDEN:  # the interpreter holds bfloat16 as bare bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=precision)


@_jit
def _tile(tile, N: tl.constexpr, strip, per_strip, height, width, ry, rx):  # type: ignore[no-untyped-def]
    """First position of a tile in its strip, the strip's left and columns; top, rows, left and columns of its box."""
    left = tile // per_strip * strip
    first, across = tile % per_strip * N, tl.minimum(strip, width - left)
    top = tl.maximum(first // across - ry // 2, 0)
    bottom = tl.minimum((first + N - 1) // across + ry // 2, height - 1)
    start = tl.maximum(left - rx // 2, 0)
    stop = tl.minimum(left + across - 1 + rx // 2, width - 1)
    return first, left, across, top, tl.maximum(bottom - top + 1, 0), start, stop - start + 1


@_jit
def _near(my, mx, qy, qx, ry, rx):  # type: ignore[no-untyped-def]
    """Whether the table reaches from query to context: (m), (n) -> (m, n)."""
    y, x = my[:, None] - qy[None, :] + ry // 2, mx[:, None] - qx[None, :] + rx // 2
    return (y >= 0) & (y < ry) & (x >= 0) & (x < rx)


@_jit
def _lambda_kernel(  # type: ignore[no-untyped-def]
    given, values, table, lam_c, out, b, n, u, height, width, ry, rx, strip, per_strip, tiles,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CONTENT: tl.constexpr, GRADIENT: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """λ of N queries and B examples, then y = Σ_k q·λ; or, GRADIENT, dq = Σ_v λ·dy, a partial sum for each V."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across, top, rows, start, columns = _tile(tile, N, strip, per_strip, height, width, ry, rx)
    area, inverse = rows * columns, 1.0 / columns
    c, w = tl.arange(0, N * K), tl.arange(0, B * V)
    qy, qx = (first + c // K) // across, left + (first + c // K) % across  # (N·K)
    wb, wv = first_b + w // V, first_v + w % V  # (B·V)
    real = (wb < b) & (wv < v)

    # The axis that the last sum runs over, k for y and v for dq, must lie along the registers of a thread.
    acc = tl.zeros((N * K, B * V) if GRADIENT else (B * V, N * K), tl.float32)
    for i in range(u):
        for step in range(0, area, M):
            j = step + tl.arange(0, M)
            my = ((j + 0.5) * inverse).to(tl.int32)  # j // columns: exact below 2²⁰, and much cheaper
            mx = start + j - my * columns
            my += top
            seen = _near(my, mx, qy, qx, ry, rx) & (j < area)[:, None] & (c % K < k)[None, :]
            at = table + (((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k))[:, None]
            e = tl.load(at + (c % K - (qy * rx + qx) * k)[None, :], seen, 0.0, cache_modifier=".ca")  # (M, N·K)
            at = values + ((my * width + mx) * v + i * (n * v))[:, None]
            x = tl.load(at + (wb * (u * n * v) + wv)[None, :], (j < area)[:, None] & real[None, :], 0.0)  # (M, B·V)
            acc = _dot(tl.trans(e), x, acc, precision) if GRADIENT else _dot(tl.trans(x), e, acc, precision)

    nn, bb, vv, kk = first + tl.arange(0, N), first_b + tl.arange(0, B), first_v + tl.arange(0, V), tl.arange(0, K)
    place, here = nn // across * width + left + nn % across, nn < height * across
    if CONTENT:
        at = lam_c + (wb * (k * v) + wv)[:, None] + kk[None, :] * v
        lam = tl.load(at, real[:, None] & (kk < k)[None, :], 0.0)  # (B·V, K)
        if GRADIENT:
            acc = tl.reshape(acc, (N, K, B * V)) + tl.trans(lam)[None, :, :]
        else:
            acc = tl.reshape(acc, (B * V, N, K)) + lam[:, None, :]
    for i in range(h):
        if GRADIENT:
            head, ok = (bb[None, :] * n + place[:, None]) * h + i, here[:, None] & (bb < b)[None, :]  # (N, B)
            at = given + head[:, :, None] * v + vv[None, None, :]
            g = tl.load(at, ok[:, :, None] & (vv < v)[None, None, :], 0.0).to(tl.float32)
            d = tl.sum(tl.reshape(acc, (N, K, B, V)) * g[:, None, :, :], 3)
            at = out + part % chunks * (b * n * h * k) + head[:, None, :] * k + kk[None, :, None]
            tl.store(at, d.to(out.dtype.element_ty), ok[:, None, :] & (kk < k)[None, :, None])
        else:
            head, ok = (bb[:, None] * n + place[None, :]) * h + i, (bb < b)[:, None] & here[None, :]  # (B, N)
            at = given + head[:, :, None] * k + kk[None, None, :]
            g = tl.load(at, ok[:, :, None] & (kk < k)[None, None, :], 0.0).to(tl.float32)
            y = tl.sum(tl.reshape(acc, (B, V, N, K)) * g[:, None, :, :], 3)
            at = out + head[:, None, :] * v + vv[None, :, None]
            tl.store(at, y.to(out.dtype.element_ty), ok[:, None, :] & (vv < v)[None, :, None])


@_jit
def _dlam(  # type: ignore[no-untyped-def]
    q, dy, place, seen, first_b, first_v, b, n, h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr,
    V: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, TURNED: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """dλ[b,n,k,v] = Σ_h q·dy of B examples and N queries, (B·V, N·K), or TURNED (N·K, B·V).

    A product of depth h would starve the tensor cores, so N/G queries share one: the heads of all are its depth, and
    q lies in it block by block with zeros between. place, seen: (B·N·H), the position of each row and if it exists.
    """
    r, c, vv = tl.arange(0, B * N * H), tl.arange(0, N // G * K), first_v + tl.arange(0, V)
    head, rb = r % H, first_b + r // (N * H)
    row, seen = (rb * n + place) * h + head, seen & (head < h) & (rb < b)
    d = tl.load(dy + row[:, None] * v + vv[None, :], seen[:, None] & (vv < v)[None, :], 0.0)  # (B·N·H, V)
    own = (r // H % (N // G))[:, None] == (c // K)[None, :]
    w = tl.load(q + row[:, None] * k + (c % K)[None, :], own & seen[:, None] & (c % K < k)[None, :], 0.0)
    if B * G == 1:
        if TURNED:
            lam = _dot(tl.trans(w), d, tl.zeros((N * K, V), tl.float32), precision)
        else:
            lam = _dot(tl.trans(d), w, tl.zeros((V, N * K), tl.float32), precision)
    else:
        d = tl.reshape(d, (B * G, N // G * H, V))
        w = tl.reshape(w, (B * G, N // G * H, N // G * K))
        if TURNED:
            lam = _dot(tl.trans(w, (0, 2, 1)), d, tl.zeros((B * G, N // G * K, V), tl.float32), precision)
            lam = tl.permute(tl.reshape(lam, (B, G, N // G * K, V)), (1, 2, 0, 3))
        else:
            lam = _dot(tl.trans(d, (0, 2, 1)), w, tl.zeros((B * G, V, N // G * K), tl.float32), precision)
            lam = tl.permute(tl.reshape(lam, (B, G, V, N // G * K)), (0, 2, 1, 3))
        lam = tl.reshape(lam, (N * K, B * V) if TURNED else (B * V, N * K))
    return lam.to(q.dtype.element_ty)


@_jit
def _values_kernel(  # type: ignore[no-untyped-def]
    q, table, dy, out, b, n, u, height, width, ry, rx, strip, per_strip, tiles, parts,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dV[b,m,v,i] = Σ_{n,k} E[n,m,k,i] dλ[b,n,k,v] of M contexts, B examples and one i of the intra-depth."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles % parts
    i = tl.program_id(0) // tiles // parts
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across, top, rows, start, columns = _tile(tile, M, strip, per_strip, height, width, ry, rx)
    m, c, r, w = tl.arange(0, M), tl.arange(0, N * K), tl.arange(0, B * N * H), tl.arange(0, B * V)
    my, mx = (first + m) // across, left + (first + m) % across
    from_context = table + (((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k))[:, None]
    area = rows * columns
    acc = tl.zeros((B * V, M), tl.float32)
    for step in range(0, area, N):
        j = step + c // K
        qy, qx = top + j // columns, start + j % columns  # (N·K)
        seen = _near(my, mx, qy, qx, ry, rx) & ((j < area) & (c % K < k))[None, :]
        to_query = (c % K - (qy * rx + qx) * k)[None, :]
        e = tl.load(from_context + to_query, seen, 0.0, cache_modifier=".ca")  # (M, N·K)
        j = step + r // H % N
        place = (top + j // columns) * width + start + j % columns
        lam = _dlam(q, dy, place, j < area, first_b, first_v, b, n, h, k, v, B, V, N, K, H, G, False, precision)
        acc = _dot(lam, tl.trans(e), acc, precision)
    wb, wv = first_b + w // V, first_v + w % V
    at = out + ((wb * u + i) * (n * v) + wv)[:, None] + ((my * width + mx) * v)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), ((wb < b) & (wv < v))[:, None] & (first + m < height * across)[None, :])


@_jit
def _table_kernel(  # type: ignore[no-untyped-def]
    q, values, dy, out, b, n, u, height, width, low_y, low_x, down, across, splits, parts,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Σ_{b,v,n} V[b,m,v,i] dλ[b,n,k,v] at a fixed shift from a row of N queries to a box of Y x X contexts.

    A program owns one shift and meets every row whose box touches the map, or its split of them.
    out (splits, u, down·Y, across·X, N·K), float32; `_fold_kernel` adds what belongs to the same offset.
    """
    shift = tl.program_id(0)
    to_x, shift = shift % across * X, shift // across
    to_y, shift = shift % down * Y, shift // down
    i, split = shift % u, shift // u
    y_first = tl.maximum(0, 1 - low_y - to_y - Y)
    y_count = tl.minimum(height, height - low_y - to_y) - y_first
    x_first = tl.maximum(0, N - low_x - to_x - X) // N  # rows of queries start at multiples of N
    x_count = tl.minimum((width + N - 1) // N, (width - 1 - low_x - to_x) // N + 1) - x_first
    total = tl.maximum(y_count, 0) * tl.maximum(x_count, 0) * parts
    share = (total + splits - 1) // splits
    chunks: tl.constexpr = (v + V - 1) // V
    r, m, w, c = tl.arange(0, B * N * H), tl.arange(0, Y * X), tl.arange(0, B * V), tl.arange(0, N * K)
    acc = tl.zeros((N * K, Y * X), tl.float32)
    for step in range(split * share, tl.minimum(total, split * share + share)):
        part, row = step % parts, step // parts
        first_b, first_v = part // chunks * B, part % chunks * V
        y, x = y_first + row // x_count, (x_first + row % x_count) * N
        my, mx = y + low_y + to_y + m // X, x + low_x + to_x + m % X
        wb, wv = first_b + w // V, first_v + w % V
        seen = ((my >= 0) & (my < height) & (mx >= 0) & (mx < width))[:, None] & ((wb < b) & (wv < v))[None, :]
        at = values + ((my * width + mx) * v + i * (n * v))[:, None] + (wb * (u * n * v) + wv)[None, :]
        s = tl.load(at, seen, 0.0)  # (Y·X, B·V)
        x += r // H % N
        lam = _dlam(q, dy, y * width + x, x < width, first_b, first_v, b, n, h, k, v, B, V, N, K, H, G, True, precision)
        acc = _dot(lam, tl.trans(s), acc, precision)
    line = ((split * u + i) * (down * Y) + to_y + m // X) * (across * X) + to_x + m % X
    tl.store(out + (line * (N * K))[None, :] + c[:, None], acc)


@_jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    sums, out, u, ry, rx, low_y, low_x, tall, wide, splits,
    k: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """dR[o,k,i] = Σ over splits, and over the N queries of a row, of `_table_kernel`'s sums at shift o + query."""
    o, kk = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, K)  # o runs over (u, ry, rx)
    i, y, x = o // (ry * rx), o // rx % ry - ry // 2 - low_y, o % rx - rx // 2 - low_x
    acc = tl.zeros((M, K), tl.float32)
    for split in range(splits):
        for query in tl.static_range(N):
            ok = (i < u) & (y >= 0) & (y < tall) & (x + query >= 0) & (x + query < wide)
            line = ((split * u + i) * tall + y) * wide + x + query
            acc += tl.load(sums + (line * (N * K) + query * K)[:, None] + kk[None, :], ok[:, None], 0.0)
    at = out + (o * k)[:, None] + kk[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (i < u)[:, None] & (kk < k)[None, :])


@_jit
def _content_kernel(  # type: ignore[no-untyped-def]
    q, dy, out, n, h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dλc[b,k,v] = Σ_{n,h} q·dy of one example, M of the (n, h) a step."""
    chunks: tl.constexpr = (v + V - 1) // V
    example, kk = tl.program_id(0) // chunks, tl.arange(0, K)
    vv = tl.program_id(0) % chunks * V + tl.arange(0, V)
    acc = tl.zeros((V, K), tl.float32)
    for step in range(0, n * h, M):
        r = step + tl.arange(0, M)
        row, seen = (example * (n * h) + r)[:, None], (r < n * h)[:, None]
        d = tl.load(dy + row * v + vv[None, :], seen & (vv < v)[None, :], 0.0)
        w = tl.load(q + row * k + kk[None, :], seen & (kk < k)[None, :], 0.0)
        acc = _dot(tl.trans(d), w, acc, precision)
    tl.store(out + example * (k * v) + kk[None, :] * v + vv[:, None], acc, (kk < k)[None, :] & (vv < v)[:, None])


# --- operators ----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, programs: int, s: Sizes, **given: Any) -> None:
    """Run a kernel on contiguous tensors: what it names it takes from `given`, else from `s`."""
    named = {x: given[x] if x in given else getattr(s, x) for x in kernel.arg_names}
    named = {x: a.contiguous() if isinstance(a, Tensor) else a for x, a in named.items()}
    options = {"num_warps": s.tiles.warps, "num_stages": s.tiles.stages, "enable_fp_fusion": True}
    with torch.cuda.device(given["out"].device) if given["out"].is_cuda else nullcontext():
        kernel[(programs,)](**named, **options)


def _sizes(x: Tensor, h: int, k: int, v: int, u: int, grid: Sequence[int], table: Sequence[int]) -> Sizes:
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 2**18
    (height, width), (ry, rx) = (1, *grid)[-2:], (1, *table[: len(grid)])[-2:]
    tiles = _tiles(x.dtype, precision, shared)
    return Sizes(x.shape[0], height * width, h, k, v, u, height, width, ry, rx, precision, tiles)


def _lambda(s: Sizes, given: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, out: Tensor) -> None:
    N, part = max(1, s.tiles.rows // s.K), s.split(s.tiles.columns)
    cut = _strips(s.height, s.width, s.ry, s.rx, N)
    _launch(
        _lambda_kernel, cut["tiles"] * part["parts"], s, **cut, **part, N=N, M=s.tiles.contexts, given=given, out=out,
        values=values.movedim(3, 1), table=table.movedim(-1, 0), lam_c=given if lam_c is None else lam_c.float(),
        CONTENT=lam_c is not None, GRADIENT=out.shape[-1] == s.k and out.dim() == 5,
    )  # fmt: skip


@torch.library.custom_op("lambdanets::fused", mutates_args=())
def _fused(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    out = q.new_empty(*q.shape[:3], values.shape[2])
    _lambda(_sizes(q, *q.shape[2:], *values.shape[2:], grid, table.shape), q, values, table, lam_c, out)
    return out


@torch.library.custom_op("lambdanets::fused_dq", mutates_args=())
def _fused_dq(values: Tensor, table: Tensor, lam_c: Tensor | None, dy: Tensor, grid: Sequence[int]) -> Tensor:
    s = _sizes(dy, dy.shape[2], table.shape[-2], *values.shape[2:], grid, table.shape)
    chunks = _ceil(s.v, s.split(s.tiles.columns)["V"])
    out = dy.new_empty(chunks, *dy.shape[:3], s.k, dtype=dy.dtype if chunks == 1 else torch.float32)
    _lambda(s, dy, values, table, lam_c, out)
    return out.view(out.shape[1:]) if chunks == 1 else out.sum(0).to(dy.dtype)


@torch.library.custom_op("lambdanets::fused_dvalues", mutates_args=())
def _fused_dvalues(q: Tensor, table: Tensor, dy: Tensor, grid: Sequence[int]) -> Tensor:
    s = _sizes(q, *q.shape[2:], dy.shape[3], table.shape[-1], grid, table.shape)
    group, part = s.groups(max(1, s.tiles.queries // s.K)), s.split(s.tiles.columns)
    cut = _strips(s.height, s.width, s.ry, s.rx, s.tiles.positions)
    out = q.new_empty(s.b, s.u, s.n, s.v)
    _launch(
        _values_kernel, cut["tiles"] * part["parts"] * s.u, s, **cut, **part, **group, M=s.tiles.positions,
        q=q, table=table.movedim(-1, 0), dy=dy, out=out,
    )  # fmt: skip
    return out.movedim(1, 3).reshape(s.b, s.n, s.v, s.u)


@torch.library.custom_op("lambdanets::fused_dtable", mutates_args=())
def _fused_dtable(q: Tensor, values: Tensor, dy: Tensor, grid: Sequence[int], table: Sequence[int]) -> Tensor:
    s = _sizes(q, *q.shape[2:], *values.shape[2:], grid, table)
    cut, part = _shifts(s.height, s.width, s.ry, s.rx, s.K, s.tiles.pairs), s.split(s.tiles.depth)
    tall, wide, N = cut["down"] * cut["Y"], cut["across"] * cut["X"], cut["N"]
    shifts = cut["down"] * cut["across"] * s.u
    splits = max(1, min(_PROGRAMS // shifts, s.height * _ceil(s.width, N) * part["parts"]))
    sums = q.new_empty(splits, s.u, tall, wide, N * s.K, dtype=torch.float32)
    out = q.new_empty(s.u, *table, s.k)
    cut = {**cut, **s.groups(N), "splits": splits}
    _launch(_table_kernel, splits * shifts, s, **cut, **part, q=q, values=values.movedim(3, 1), dy=dy, out=sums)
    _launch(_fold_kernel, _ceil(s.u * s.ry * s.rx, 16), s, **cut, sums=sums, out=out, tall=tall, wide=wide, M=16)
    return out.movedim(0, -1).reshape(*table, s.k, s.u)


@torch.library.custom_op("lambdanets::fused_dcontent", mutates_args=())
def _fused_dcontent(q: Tensor, dy: Tensor) -> Tensor:
    s = _sizes(q, *q.shape[2:], dy.shape[3], 1, (q.shape[1],), (1,))
    V, out = s.split(s.tiles.columns)["V"], q.new_empty(s.b, s.k, s.v, dtype=torch.float32)
    _launch(_content_kernel, s.b * _ceil(s.v, V), s, q=q, dy=dy, out=out, V=V, M=2 * s.tiles.contexts)
    return out


_fused.register_fake(lambda q, values, table, lam_c, grid: q.new_empty(*q.shape[:3], values.shape[2]))
_fused_dq.register_fake(lambda values, table, lam_c, dy, grid: dy.new_empty(*dy.shape[:3], table.shape[-2]))
_fused_dvalues.register_fake(lambda q, table, dy, grid: q.new_empty(*q.shape[:2], dy.shape[3], table.shape[-1]))
_fused_dtable.register_fake(lambda q, values, dy, grid, table: q.new_empty(*table, q.shape[3], values.shape[3]))
_fused_dcontent.register_fake(lambda q, dy: q.new_empty(q.shape[0], q.shape[3], dy.shape[3], dtype=torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.grid = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    q, values, table, lam_c = ctx.saved_tensors
    wanted, grid = ctx.needs_input_grad, ctx.grid
    return (
        _fused_dq(values, table, lam_c, dy, grid) if wanted[0] else None,
        _fused_dvalues(q, table, dy, grid) if wanted[1] else None,
        _fused_dtable(q, values, dy, grid, table.shape[: len(grid)]) if wanted[2] else None,
        _fused_dcontent(q, dy).to(lam_c.dtype) if lam_c is not None and wanted[3] else None,
        None,
    )


_fused.register_autograd(_gradients, setup_context=_save)


def fused(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Apply to every query its position lambda and the content lambda, and write neither to memory.

        y[b,n,h,v] = Σ_k q[b,n,h,k] · (λc[b,k,v] + Σ_{m,u} R[t(m) - t(n)][k,u] V[b,m,v,u])

    q        (b, n, h, k)
    values   (b, n, v, u), on the grid of the queries
    table    (r_1, ..., r_d, k, u), d = 1 or 2, every r odd, offset 0 in the middle, zero outside
    lam_c    (b, k, v), float32: the content lambda; None leaves it out
    grid     d sizes whose product is n
    returns  (b, n, h, v), dtype of q (under autocast, the autocast dtype)

    float32, bfloat16 or float16, one dtype for q, values and table. Sums are in float32 and in a fixed order: equal
    inputs give equal bits. float32 is multiplied as tf32 where `torch.backends.cuda.matmul` allows that. Only y is
    rounded, and in the backward pass dλ and the gradients. Differentiable once: a second derivative raises. Sizes are
    checked by `lambda_op`; `why_not` of the problem must be None.
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, values, table = q.to(dtype), values.to(dtype), table.to(dtype)
    return _fused(q, values, table, lam_c, list(grid))
