"""Triton kernels: the position and the content part together; λ, scores and expanded tables stay in registers.

    y[b,n,h,v] = Σ_k q[b,n,h,k] · (λc[b,k,v] + Σ_{m,u} R[t(m) - t(n)][k,u] V[b,m,v,u])

The order is the paper's. A program owns N queries and B examples: its λ, (query, k) by (example, v), is one product
over the contexts, because the batch shares the table; q is applied to it in registers. `scores` needs fewer
multiply-adds, (k + v)·h for k·v: 1/2 at v = 16, 1/3.2 at v = 64. But it must turn s from one query's (b, h) rows to one
example's (n, h) rows between two thin products, on the half-rate instruction, while tiles of 256 x 128 feed wgmma and
read 16 bytes of V a clock from L2 (about 40 are to be had) and the table (17 KB at scope 23) from L1.

Contexts come from the box that a tile's queries see together, clipped to the map; what lies outside is not visited.
The backward pass builds λ again for dq, and dλ = Σ_h q·dy for dV and dR. dR is one product per tile of offsets, summed
over the map in registers and then over partial tiles, as many as an H200 has multiprocessors or as cover the table.
There are no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambdanets.ops.problem import Position, Problem, autocast_dtype, ends

_TRITON = find_spec("triton") is not None
_EMULATED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once, so it must be set from the start
_PROGRAMS = 132  # partial tiles of dR: the multiprocessors of an H200, wherever it runs, so that sums are the same


def why_not(p: Problem) -> str | None:
    """Why the kernels cannot take this problem, with its sizes, or None."""
    if not _TRITON:
        return "Triton is not installed"
    if p.device != "cuda" and not _EMULATED:
        return f"it runs on cuda, not on {p.device} (started with TRITON_INTERPRET=1, Python emulates it)"
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
    if p.k > 64 or p.h > 16:
        return f"its tiles hold k up to 64 and h up to 16, and k = {p.k}, h = {p.h}"
    if min(p.b, p.h, p.k, p.v, p.u) < 1:
        return f"there is nothing to compute: b={p.b} h={p.h} k={p.k} v={p.v} u={p.u}"
    # dR's partial sums hold the table, its k a power of two, at most 32 times over.
    largest = max(p.b * p.n * max(p.h * p.k, p.h * p.v, p.v * p.u), 32 * math.prod(p.table) * (2 * p.k + 16) * p.u)
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
        return Tiles(256, 128, 64, 256, 64, 128 * 256, 64, 8, stages)
    if precision == "tf32":
        return Tiles(128, 64, 32, 64, 32, 64 * 128, 32, 4, stages)
    return Tiles(64, 64, 32, 64, 32, 64 * 64, 16, 4, 3)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(x: int, least: int = 1) -> int:
    return max(least, 1 << (x - 1).bit_length())


class Strips(NamedTuple):
    """A map cut into strips of columns, each strip into tiles of positions, row by row."""

    columns: int  # of a strip
    tiles_each: int
    tiles: int


@lru_cache(maxsize=1024)
def _strips(height: int, width: int, ry: int, rx: int, positions: int) -> Strips:
    """Cut the map into strips of columns, and these row by row into tiles, so that the boxes they see are smallest:
    whole rows where all is visible, near squares where the window is small."""

    def cost(strip: int) -> int:
        tiles = range(0, height * strip, positions)
        rows = sum(
            min(height, (i + positions - 1) // strip + ry // 2 + 1) - max(0, i // strip - ry // 2) for i in tiles
        )
        strips = range(0, width, strip)
        return rows * sum(min(width, x + strip + rx // 2) - max(0, x - rx // 2) for x in strips)

    strip = min([width, *[s for s in (2, 4, 8, 16, 32, 64, 128) if s < width]], key=cost)
    per_strip = _ceil(height * strip, positions)
    return Strips(strip, per_strip, per_strip * _ceil(width, strip))


class Shifts(NamedTuple):
    """The offsets from a row of N queries to a box of Y x X contexts, in down x across tiles from (low_y, low_x) on."""

    N: int
    Y: int
    X: int
    low_y: int
    low_x: int
    down: int
    across: int


@lru_cache(maxsize=1024)
def _shifts(height: int, width: int, ry: int, rx: int, h: int, K: int, pairs: int) -> Shifts:
    """The cut whose tiles meet the map least often."""

    def cut(N: int, X: int) -> tuple[int, Shifts]:
        Y, rows = pairs // (N * K) // X, _ceil(width, N)
        low_y, low_x = -min(ry // 2, height - 1), -min(rx // 2, (rows - 1) * N)
        down = range(low_y, min(ry // 2, height - 1) + 1, Y)
        across = range(low_x, min(rx // 2 + N - 1, width - 1) + 1, X)
        met = sum(min(height, height - s) - max(0, 1 - s - Y) for s in down)
        met *= sum(min(rows, (width - 1 - s) // N + 1) - max(0, N - s - X) // N for s in across)
        return met * N * Y * X, Shifts(N, Y, X, low_y, low_x, len(down), len(across))

    # Wide enough for the tensor cores, and no more rows of heads than registers hold.
    rows = [N for N in (1, 2, 4, 8, 16) if 64 <= N * K <= 256 and N * _pow2(h) <= 128]
    cuts = [cut(N, X) for N in rows for X in (8, 16, 32, 64, 128) if pairs >= X * N * K]
    return min(cuts, key=lambda c: c[0])[1]


class Split(NamedTuple):
    """Examples x values in tiles of B x V; `parts` cover (b, v)."""

    B: int
    V: int
    parts: int


class Groups(NamedTuple):
    """N queries in G groups, each one product q·dy of depth N/G·H >= 16."""

    N: int
    H: int
    G: int


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

    def split(self, columns: int) -> Split:
        V = min(columns, _pow2(self.v, 16))
        B = min(columns // V, _pow2(self.b))
        return Split(B, V, _ceil(self.b, B) * _ceil(self.v, V))

    def groups(self, N: int) -> Groups:
        together = min(N, max(1, 16 // _pow2(self.h)))
        return Groups(N, _pow2(self.h, 16 // together), N // together)


# --- operators ----------------------------------------------------------------------------------------------------


def _launch(name: str, programs: int, launched: Tiles, **arguments: Any) -> None:
    """Run a kernel; its tensors are made contiguous."""
    from lambdanets.ops import fused_kernels  # only here is Triton imported

    arguments = {x: a.contiguous() if isinstance(a, Tensor) else a for x, a in arguments.items()}
    options = {"num_warps": launched.warps, "num_stages": launched.stages, "enable_fp_fusion": True}
    out = arguments["out"]
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        getattr(fused_kernels, name)[(programs,)](**arguments, **options)


def _sizes(x: Tensor, hkvu: Sequence[int], grid: Sequence[int], table: Sequence[int]) -> Sizes:
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 2**18
    (height, width), (ry, rx), (h, k, v, u) = (1, *grid)[-2:], (1, *table[: len(grid)])[-2:], hkvu
    tiles = _tiles(x.dtype, precision, shared)
    return Sizes(x.shape[0], height * width, h, k, v, u, height, width, ry, rx, precision, tiles)


def _lambda(s: Sizes, given: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, out: Tensor) -> None:
    N, part = max(1, s.tiles.rows // s.K), s.split(s.tiles.columns)
    cut = _strips(s.height, s.width, s.ry, s.rx, N)
    _launch(
        "lambda_kernel", cut.tiles * part.parts, s.tiles,
        given=given, values=values.movedim(3, 1), table=table.movedim(-1, 0),
        lam_c=given if lam_c is None else lam_c.float(), out=out,
        b=s.b, n=s.n, u=s.u, height=s.height, width=s.width, ry=s.ry, rx=s.rx,
        strip=cut.columns, per_strip=cut.tiles_each, tiles=cut.tiles,
        h=s.h, k=s.k, v=s.v, B=part.B, V=part.V, N=N, M=s.tiles.contexts, K=s.K,
        CONTENT=lam_c is not None, GRADIENT=out.dim() == 5, precision=s.precision,
    )  # fmt: skip


@torch.library.custom_op("lambdanets::fused", mutates_args=())
def _fused(q: Tensor, values: Tensor, table: Tensor, lam_c: Tensor | None, grid: Sequence[int]) -> Tensor:
    out = q.new_empty(*q.shape[:3], values.shape[2])
    _lambda(_sizes(q, (*q.shape[2:], *values.shape[2:]), grid, table.shape), q, values, table, lam_c, out)
    return out


@torch.library.custom_op("lambdanets::fused_dq", mutates_args=())
def _fused_dq(values: Tensor, table: Tensor, lam_c: Tensor | None, dy: Tensor, grid: Sequence[int]) -> Tensor:
    s = _sizes(dy, (dy.shape[2], table.shape[-2], *values.shape[2:]), grid, table.shape)
    chunks = _ceil(s.v, s.split(s.tiles.columns).V)
    out = dy.new_empty(chunks, *dy.shape[:3], s.k, dtype=dy.dtype if chunks == 1 else torch.float32)
    _lambda(s, dy, values, table, lam_c, out)
    return out.view(out.shape[1:]) if chunks == 1 else out.sum(0).to(dy.dtype)


@torch.library.custom_op("lambdanets::fused_dvalues", mutates_args=())
def _fused_dvalues(q: Tensor, table: Tensor, dy: Tensor, grid: Sequence[int]) -> Tensor:
    s = _sizes(q, (*q.shape[2:], dy.shape[3], table.shape[-1]), grid, table.shape)
    group, part = s.groups(max(1, s.tiles.queries // s.K)), s.split(s.tiles.columns)
    M = min(s.tiles.positions, _pow2(s.n, 64))
    while M > 64 and 2 * _ceil(s.n, M) * part.parts * s.u <= _PROGRAMS:
        M //= 2  # a smaller tile does its dλ for fewer contexts, but else multiprocessors would be idle
    cut = _strips(s.height, s.width, s.ry, s.rx, M)
    out = q.new_empty(s.b, s.u, s.n, s.v)
    _launch(
        "values_kernel", cut.tiles * part.parts * s.u, s.tiles,
        q=q, table=table.movedim(-1, 0), dy=dy, out=out,
        b=s.b, n=s.n, u=s.u, height=s.height, width=s.width, ry=s.ry, rx=s.rx,
        strip=cut.columns, per_strip=cut.tiles_each, tiles=cut.tiles, parts=part.parts,
        h=s.h, k=s.k, v=s.v, B=part.B, V=part.V, M=M, N=group.N, K=s.K, H=group.H, G=group.G, precision=s.precision,
    )  # fmt: skip
    return out.movedim(1, 3).contiguous()


@torch.library.custom_op("lambdanets::fused_dtable", mutates_args=())
def _fused_dtable(q: Tensor, values: Tensor, dy: Tensor, grid: Sequence[int], table: Sequence[int]) -> Tensor:
    s = _sizes(q, (*q.shape[2:], *values.shape[2:]), grid, table)
    cut, part = _shifts(s.height, s.width, s.ry, s.rx, s.h, s.K, s.tiles.pairs), s.split(s.tiles.depth)
    group, tall, wide = s.groups(cut.N), cut.down * cut.Y, cut.across * cut.X
    shifts = cut.down * cut.across * s.u
    splits = max(1, min(_PROGRAMS // shifts, s.height * _ceil(s.width, cut.N) * part.parts))
    sums = q.new_empty(splits, s.u, tall, wide, cut.N * s.K, dtype=torch.float32)
    out = q.new_empty(s.u, *table, s.k)
    _launch(
        "table_kernel", splits * shifts, s.tiles,
        q=q, values=values.movedim(3, 1), dy=dy, out=sums,
        b=s.b, n=s.n, u=s.u, height=s.height, width=s.width, low_y=cut.low_y, low_x=cut.low_x,
        down=cut.down, across=cut.across, splits=splits, parts=part.parts,
        h=s.h, k=s.k, v=s.v, B=part.B, V=part.V, N=cut.N, Y=cut.Y, X=cut.X, K=s.K, H=group.H, G=group.G,
        precision=s.precision,
    )  # fmt: skip
    _launch(
        "fold_kernel", _ceil(s.u * s.ry * s.rx, 16), s.tiles,
        sums=sums, out=out, u=s.u, ry=s.ry, rx=s.rx, low_y=cut.low_y, low_x=cut.low_x, tall=tall, wide=wide,
        splits=splits, k=s.k, N=cut.N, K=s.K, M=16,
    )  # fmt: skip
    return out.movedim(0, -1).contiguous()


@torch.library.custom_op("lambdanets::fused_dcontent", mutates_args=())
def _fused_dcontent(q: Tensor, dy: Tensor) -> Tensor:
    s = _sizes(q, (*q.shape[2:], dy.shape[3], 1), (q.shape[1],), (1,))
    V, out = s.split(s.tiles.columns).V, q.new_empty(s.b, s.k, s.v, dtype=torch.float32)
    _launch(
        "content_kernel", s.b * _ceil(s.v, V), s.tiles,
        q=q, dy=dy, out=out, n=s.n, h=s.h, k=s.k, v=s.v, V=V, K=s.K, M=2 * s.tiles.contexts, precision=s.precision,
    )  # fmt: skip
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
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, values, table = q.to(dtype), values.to(dtype), table.to(dtype)
    return _fused(q, values, table, lam_c, list(grid))


def run(p: Position, block: int) -> Tensor:
    assert p.table is not None
    return fused(p.q, p.values, p.table, p.lam_c, p.grid)


def cost(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.window * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    return macs, ends(p) * p.dtype.itemsize, 0
