"""Orders that are functions of names and numbers alone: shuffles by hash, names as people count."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import numpy as np


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def hash_of(*parts: str | int) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = "/".join(str(part) for part in parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Order:
    """The ids 0..n_images-1 shuffled, a function of (seed, epoch); any part is computed when it is asked for.

    Nothing is stored: a keyed Feistel network on the pairs (a, b) with id = a * columns + b permutes a little more than
    n_images numbers, and a number beyond the last id is permuted again until it is one.

    >>> Order(5, seed=0, epoch=0)[0:5].tolist()
    [2, 4, 0, 1, 3]
    """

    _ROUNDS = 12  # places, and pairs of neighbours, look drawn by chance (chi-square) from 8 on

    def __init__(self, n_images: int, *, seed: int, epoch: int) -> None:
        self.n_images = n_images
        self._columns = max(1, math.isqrt(max(0, n_images - 1)) + 1)
        self._rows = -(-n_images // self._columns)
        self._keys = [np.uint64(hash_of("order", seed, epoch, part)) for part in range(self._ROUNDS)]

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, part: slice) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The ids at these places, int64."""
        ids = self._permuted(np.arange(*part.indices(self.n_images), dtype=np.uint64))
        while (outside := ids >= self.n_images).any():  # ends: the walk follows the cycle that a place of ours is on
            ids[outside] = self._permuted(ids[outside])
        return ids.astype(np.int64)

    def _permuted(self, ids: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(ids, columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                row = (row + _scrambled(column, key) % rows) % rows
            else:
                column = (column + _scrambled(row, key) % columns) % columns
        return row * columns + column


def _scrambled(values: np.ndarray[Any, np.dtype[np.uint64]], key: np.uint64) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits from 64 bits: the finishing steps of splitmix64, whose every output bit depends on every input bit."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key  # wraps, as arrays of unsigned numbers do
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
