"""A problem: its sizes (`Problem`), its tensors (`Position`), what an order costs on it (`Cost`), and what PyTorch is
doing meanwhile (autocast, export, trace): asked here by everybody."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Problem:
    """The sizes that decide what a lambda operation costs. Nothing here holds data.

    b n m h k v u         sizes, in the paper's letters
    grid, context_grid    sizes of the query and the context grid; None where positions are not a grid
    table                 sides (r_1, ..., r_d) of the relative table, or None
    embeddings            True for explicit embeddings (n, m, k, u)
    mask                  None, "queries" for a mask (n, m), "examples" for a mask (b, n, m); a mask that hides the
                          same contexts from every query is applied to keys and values beforehand and costs nothing
    causal, content       causal order in 1-D; whether there is a content part
    training              whether a backward pass will follow: strategies differ in what theirs costs
    """

    b: int
    n: int
    m: int
    h: int
    k: int
    v: int
    u: int = 1
    grid: tuple[int, ...] | None = None
    context_grid: tuple[int, ...] | None = None
    table: tuple[int, ...] | None = None
    embeddings: bool = False
    mask: str | None = None
    causal: bool = False
    content: bool = True
    training: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def window(self) -> int:
        """Contexts that a query's table reaches: Π min(r, 2·side - 1), or m for explicit embeddings."""
        if self.table is None or self.grid is None:
            return self.m
        return math.prod(reachable_offsets(self.table, self.grid))

    @property
    def paper_macs(self) -> int:
        """Multiply-adds as the paper counts them: position b·n·Π min(r, side)·k·v·u, content b·m·k·v·u, and q·λ.

        The two lambdas are added before they are applied, so q·λ is paid once.
        """
        macs = self.b * self.n * self.h * self.k * self.v
        if self.content:
            macs += self.b * self.m * self.k * self.v * self.u
        if self.table is not None and self.context_grid is not None:
            reach = math.prod([min(r, s) for r, s in zip(self.table, self.context_grid, strict=True)])
            macs += self.b * self.n * reach * self.k * self.v * self.u
        elif self.embeddings:
            macs += self.b * self.n * self.m * self.k * self.v * self.u
        return macs


@dataclass(frozen=True)
class Cost:
    """What one strategy costs on one problem, forward, position part.

    macs           multiply-adds
    bytes_moved    bytes read and written, intermediates included
    largest_bytes  the largest intermediate
    seconds        the model's estimate, with the backward pass if the problem has one; for ranking only
    block          queries worked on at a time
    why_not        why it cannot run here, or None
    """

    strategy: str
    macs: int
    bytes_moved: int
    largest_bytes: int
    seconds: float
    block: int
    why_not: str | None = None


def itemsize_of(p: Problem) -> int:
    return max(p.dtype.itemsize, 4) if p.dtype == torch.float16 else p.dtype.itemsize  # fp16 is computed in float32


def ends(p: Problem) -> int:
    """Numbers read and written whatever the strategy: q, V, the table, y."""
    weights = math.prod(p.table) * p.k * p.u if p.table else p.n * p.m * p.k * p.u
    return p.b * p.n * p.h * (p.k + p.v) + p.b * p.m * p.v * p.u + weights


def reached(p: Problem, block: int) -> int:
    """Contexts that a block of whole rows reaches, on average over the blocks: the window clipped to the map."""
    if p.table is None or p.grid is None or p.context_grid is None:
        return p.m
    side = p.context_grid[0]
    half = min((p.table[0] - 1) // 2, side)
    rows = max(1, block // max(1, p.n // p.grid[0]))
    seen = rows + 2 * half - half * (half + rows) // side  # less what lies over the two borders
    return min(side, seen) * (p.m // side)


def _by_rows(p: Problem, block: int) -> bool:
    """Whether the blocks are rows of the grid or parts of rows, which share one copy of their E (blocks.Blocks)."""
    return p.table is not None and p.grid is not None and len(p.grid) > 1 and block <= p.n // p.grid[0] < p.n


def expanded(p: Problem, block: int) -> tuple[int, int]:
    """Numbers of E a query: moved, and held at once."""
    whole = reached(p, block) * p.k * p.u
    if not _by_rows(p, block):
        return whole, whole
    assert p.table is not None
    assert p.grid is not None
    assert p.context_grid is not None
    held = min(p.table[0], p.grid[0] + p.context_grid[0] - 1) * (p.m // p.context_grid[0]) * p.k * p.u
    return whole if p.training else held // p.grid[0], held  # the gradient of E has a copy a block


class Position(NamedTuple):
    """What the position part works on; either `table` or `embeddings` is set."""

    q: Tensor  # (b, n, h, k)
    values: Tensor  # (b, m, v, u)
    table: Tensor | None  # (r_1, ..., r_d, k, u), every r odd, offset 0 in the middle, zero outside
    embeddings: Tensor | None  # (n, m, k, u)
    grid: tuple[int, ...]
    context_grid: tuple[int, ...]
    mask: Tensor | None  # (1 or b, n, m), True where query n sees context m
    lam_c: Tensor | None = None  # (b, k, v), the content lambda: applied in the same pass, since y is there
    kept: dict[Any, Any] | None = None  # what was made of a table that never changes


def applied(function: Any, *inputs: Any) -> Tensor:
    """`function.apply`, or its forward alone where its operations are to be seen one by one: by torch.jit.trace, whose
    graph cannot hold a Python function, and by forward-mode derivatives (torch.func.jvp, jacfwd, hessian), for which a
    function of ours has no rule and each operation has one."""
    if not torch.compiler.is_compiling() and (torch.jit.is_tracing() or forward_ad._current_level >= 0):
        return function.forward(*inputs)
    return function.apply(*inputs)


def sizes(x: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor as numbers: in torch.jit.trace they are tensors, and a plan needs to know them."""
    if not torch.jit.is_tracing():
        return tuple(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # what is traced is for maps of this size
        return tuple(int(size) for size in x.shape)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on the device of x, or None where it is off: for float64 always, as in torch's own
    layers."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return None
    return torch.get_autocast_dtype(device)


def exporting() -> bool:
    """Whether a graph is being exported. `is_exporting()` is true in every compilation to Dynamo of torch 2.11."""
    return torch.compiler._is_exporting_flag


def reachable_offsets(table: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a table without the offsets that no pair of positions has."""
    # No min: to a compiler the sides of the kernel would depend on those of the map.
    return tuple(r if r < 2 * s else 2 * s - 1 for r, s in zip(table, grid, strict=True))
