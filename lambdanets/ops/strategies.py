"""The table of the exact orders: what runs each, what it costs, why it cannot run; and the rates that turn a cost into
seconds."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lambdanets.ops import blockwise, convolution, fourier, fused
from lambdanets.ops.problem import Position, Problem


@dataclass(frozen=True)
class Strategy:
    """One exact order of evaluation: a row of STRATEGIES.

    `run` evaluates the position part and q·λc a block of queries at a time, `cost` gives (multiply-adds, bytes moved,
    largest bytes) for a block, `why_not` says why a problem cannot run, `builds` names the intermediates for the
    plan's printout.
    """

    run: Callable[[Position, int], Tensor]
    cost: Callable[[Problem, int], tuple[int, int, int]]  # (problem, block) -> macs, bytes moved, largest bytes
    why_not: Callable[[Problem], str | None]
    chunked: bool
    builds: str
    automatic: tuple[str, ...] = ("cpu", "cuda", "export")  # where "auto" may take it


def _always(p: Problem) -> str | None:
    return None


STRATEGIES: dict[str, Strategy] = {
    "lambdas": Strategy(
        blockwise.lambdas, blockwise.cost_lambdas, blockwise.lambdas_why_not, False, "E (n,m,k,u), λ (b,n,k,v)"
    ),
    "scores": Strategy(blockwise.scores, blockwise.cost_scores, _always, False, "E (n,m,k,u), s (b,h,n,m,u)"),
    "conv": Strategy(convolution.conv, convolution.cost, convolution.why_not, False, "some examples' λ (n,k,v)"),
    # On a GPU by name: never timed there. An export has a convolution, one node for a hundred.
    "fourier": Strategy(
        fourier.fourier, fourier.cost, fourier.why_not, False, "some rows' frequencies and λ (rows,W,k,v)", ("cpu",)
    ),
    "lambdas_chunked": Strategy(
        blockwise.lambdas, blockwise.cost_lambdas, blockwise.lambdas_why_not, True, "a block of E and of λ"
    ),
    "scores_chunked": Strategy(blockwise.scores, blockwise.cost_scores, _always, True, "a block of E and of s"),
    # By name only: its kernels have run in Triton's interpreter and compiled for sm_90, never yet on a GPU.
    "fused": Strategy(fused.run, fused.cost, fused.why_not, False, "nothing", automatic=()),
}


# --- rates: from a cost to seconds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """Of one order: multiply-adds and bytes a second. Each order runs other routines."""

    macs: float
    bytes: float


_NEVER = Rate(macs=1e6, bytes=1e9)


@dataclass(frozen=True)
class Rates:
    """What turns a cost into seconds: fitted to measurements, for ranking only.

    lambdas, ...  of each order, cut into blocks or not
    far           how much slower bytes are when the largest intermediate leaves the cache
    block_s       a block's overhead
    """

    lambdas: Rate
    scores: Rate
    conv: Rate
    fourier: Rate
    far: float
    block_s: float
    fused: Rate = _NEVER

    def of(self, strategy: str) -> Rate:
        """Of a row of STRATEGIES."""
        rate: Rate = getattr(self, strategy.removesuffix("_chunked"))
        return rate


# Keys: device, two-byte numbers or not, training or not. "cpu" is the least-squares fit of LOG.md, 2026-11-23 (2), to
# every strategy on 17 shapes, on a Xeon with AMX (two threads: the ranking is what matters), fourier in training from
# 2026-11-26 (3); an EPYC without AMX is ranked as well by it. "cuda" is a guess from data sheets, not measured yet.
RATES = {
    ("cpu", False, False): Rates(
        lambdas=Rate(macs=2.1e11, bytes=3.8e10),
        scores=Rate(macs=1.4e11, bytes=8.2e10),
        conv=Rate(macs=4.7e11, bytes=2e10),
        fourier=Rate(macs=2.3e11, bytes=3.1e10),
        far=3.2,
        block_s=2e-4,
    ),
    ("cpu", False, True): Rates(
        lambdas=Rate(macs=4.6e10, bytes=1e10),
        scores=Rate(macs=4.9e10, bytes=1.5e10),
        conv=Rate(macs=3e10, bytes=5.3e9),
        fourier=Rate(macs=3.4e10, bytes=8.6e9),
        far=3.0,
        block_s=5.3e-4,
    ),
    ("cpu", True, False): Rates(
        lambdas=Rate(macs=1e12, bytes=3.6e10),
        scores=Rate(macs=6.4e11, bytes=3.4e10),
        conv=Rate(macs=6.6e11, bytes=1.8e10),
        fourier=Rate(macs=1.8e11, bytes=3.2e10),
        far=2.4,
        block_s=2e-4,
    ),
    ("cpu", True, True): Rates(
        lambdas=Rate(macs=2e11, bytes=5.5e9),
        scores=Rate(macs=8.6e11, bytes=6.4e9),
        conv=Rate(macs=1.25e11, bytes=3.6e9),
        fourier=Rate(macs=4.2e10, bytes=1.1e10),
        far=2.1,
        block_s=9e-4,
    ),
    ("cuda", False, False): Rates(
        lambdas=Rate(macs=2e13, bytes=4e12),
        scores=Rate(macs=1e13, bytes=4e12),
        conv=Rate(macs=1e13, bytes=4e12),
        fourier=Rate(macs=1e13, bytes=4e12),
        fused=Rate(macs=2e13, bytes=4e12),
        far=1.5,
        block_s=2e-5,
    ),
    ("cuda", False, True): Rates(
        lambdas=Rate(macs=7e12, bytes=1e12),
        scores=Rate(macs=3e12, bytes=1e12),
        conv=Rate(macs=3e12, bytes=1e12),
        fourier=Rate(macs=3e12, bytes=1e12),
        fused=Rate(macs=6e12, bytes=1e12),
        far=1.5,
        block_s=6e-5,
    ),
    ("cuda", True, False): Rates(
        lambdas=Rate(macs=2e14, bytes=4e12),
        scores=Rate(macs=5e13, bytes=4e12),
        conv=Rate(macs=5e13, bytes=4e12),
        fourier=Rate(macs=1e13, bytes=4e12),
        fused=Rate(macs=2e14, bytes=4e12),
        far=1.5,
        block_s=2e-5,
    ),
    ("cuda", True, True): Rates(
        lambdas=Rate(macs=7e13, bytes=1e12),
        scores=Rate(macs=2e13, bytes=1e12),
        conv=Rate(macs=2e13, bytes=1e12),
        fourier=Rate(macs=3e12, bytes=1e12),
        fused=Rate(macs=6e13, bytes=1e12),
        far=1.5,
        block_s=6e-5,
    ),
}
