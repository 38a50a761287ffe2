"""COCO's compressed run lengths to numbers and back, without drawing a mask; bytes of unknown origin are checked.

A mask is read down its columns; runs of 0 and 1 alternate, a run of 0 first. Each run beyond the third is written as
the difference to the one two before, in digits of 5 bits, the lowest first; the bit 32 says that more follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_Ints = np.ndarray[Any, np.dtype[np.int64]]
_MOST_DIGITS = 8  # of 5 bits: no sum of runs read from 4 GB of them leaves 64 bits


class Runs(NamedTuple):
    """The run lengths of several masks.

    lengths  int64, all masks one after another
    starts   int64 (n + 1,), where each mask begins in `lengths`
    sound    bool (n,): the bytes are run lengths, none negative; what is not sound is to be left alone
    """

    lengths: _Ints
    starts: _Ints
    sound: np.ndarray[Any, np.dtype[np.bool_]]

    def sums(self) -> _Ints:
        """Pixels of each picture, int64 (n,)."""
        return _sums(self.lengths, self.starts)

    def areas(self) -> _Ints:
        """Pixels of each mask, int64 (n,)."""
        return _sums(np.where(self._ones(), self.lengths, 0), self.starts)

    def bounds(self, heights: _Ints) -> np.ndarray[Any, np.dtype[np.float64]]:
        """x0, y0, x1, y1 around each mask, float64 (n, 4), in pixels; of an empty mask x1 < x0.

        heights  int64 (n,), of the pictures
        """
        n = len(heights)
        found = np.tile([np.inf, np.inf, -np.inf, -np.inf], (n, 1))
        before = np.cumsum(self.lengths) - self.lengths
        owner = np.repeat(np.arange(n), np.diff(self.starts))
        seen = self._ones() & (self.lengths > 0)
        owner, lengths, before = owner[seen], self.lengths[seen], before[seen]
        if not owner.size:
            return found
        totals = np.concatenate(([0], np.cumsum(self.lengths)))[self.starts[:-1]]
        height = np.maximum(heights[owner], 1)
        left, top = np.divmod(before - totals[owner], height)
        right, bottom = np.divmod(before - totals[owner] + lengths - 1, height)
        whole = right > left  # the run goes over the foot of a column
        at = np.flatnonzero(np.diff(owner, prepend=-1))
        edges = (left, np.where(whole, 0, top), right + 1, np.where(whole, height, bottom + 1))
        for column, (reduce, edge) in enumerate(
            zip((np.minimum, np.minimum, np.maximum, np.maximum), edges, strict=True)
        ):
            found[owner[at], column] = reduce.reduceat(edge, at)
        return found

    def _ones(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        place = np.arange(len(self.lengths)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return place % 2 == 1


def read_runs(content: np.ndarray[Any, np.dtype[np.uint8]], starts: _Ints) -> Runs:
    """The run lengths of n masks.

    content  uint8, the compressed bytes of all, one after another
    starts   int64 (n + 1,), where each begins

    >>> runs = read_runs(np.frombuffer(b"23", np.uint8), np.array([0, 2]))
    >>> runs.lengths.tolist(), runs.sums().tolist(), runs.areas().tolist()
    ([2, 3], [5], [3])
    """
    n = len(starts) - 1
    sound = np.diff(starts) > 0
    owner = np.repeat(np.arange(n), np.diff(starts))
    digits = content.astype(np.int64) - 48
    sound[owner[(digits < 0) | (digits > 63)]] = False
    ends = (digits & 32) == 0
    lasts = starts[1:][np.diff(starts) > 0] - 1
    sound[owner[lasts[~ends[lasts]]]] = False
    ends[lasts] = True  # a number that is cut off stays within its mask
    firsts = np.flatnonzero(np.concatenate(([True], ends[:-1]))) if len(ends) else np.zeros(0, np.int64)
    counts = np.diff(firsts, append=len(digits))
    sound[owner[firsts[counts > _MOST_DIGITS]]] = False
    good = sound[owner]
    shift = 5 * (np.arange(len(digits)) - np.repeat(firsts, counts))
    parts = np.where(good, (digits & 31) << np.minimum(shift, 5 * _MOST_DIGITS), 0)
    values = np.add.reduceat(parts, firsts) if len(firsts) else np.zeros(0, np.int64)
    negative = good[firsts] & ((digits[firsts + counts - 1] & 16) != 0)
    values = values - np.where(negative, np.int64(1) << (5 * np.minimum(counts, _MOST_DIGITS)), 0)
    of = owner[firsts]
    run_starts = np.searchsorted(of, np.arange(n + 1)).astype(np.int64)
    lengths = _summed(values, of, run_starts)
    sound[of[lengths < 0]] = False
    lengths = np.where(sound[of], lengths, 0)
    return Runs(lengths, run_starts, sound)


def _summed(values: _Ints, of: _Ints, starts: _Ints) -> _Ints:
    """Each number and those two, four ... before it, down to the second and the third of its mask."""
    if not len(values):
        return values
    place = np.arange(len(values)) - starts[of]
    key = of * 3 + np.where(place == 0, 0, 1 + place % 2)
    order = np.argsort(key, kind="stable")
    running = np.cumsum(values[order])
    at = np.flatnonzero(np.diff(key[order], prepend=-1))
    base = np.concatenate(([0], running))[at]
    lengths = np.empty_like(values)
    lengths[order] = running - np.repeat(base, np.diff(at, append=len(values)))
    return lengths


def compressed(lengths: _Ints) -> bytes:
    """The compressed form of the run lengths of one mask, int64 (k,), the first one of 0.

    >>> compressed(np.array([2, 3, 300]))
    b'23\\\\9'
    """
    left = lengths.copy()
    left[3:] -= lengths[1:-2]
    rounds: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    wanted = np.ones(len(left), bool)
    written = []
    while wanted.any():
        digit = left & 31
        left >>= 5
        more = wanted & np.where(digit & 16, left != -1, left != 0)
        rounds.append(digit + 48 + 32 * more)
        written.append(wanted)
        wanted = more
    if not rounds:
        return b""
    return np.stack(rounds, axis=1)[np.stack(written, axis=1)].astype(np.uint8).tobytes()


def _sums(values: _Ints, starts: _Ints) -> _Ints:
    total = np.concatenate(([0], np.cumsum(values)))
    return total[starts[1:]] - total[starts[:-1]]
