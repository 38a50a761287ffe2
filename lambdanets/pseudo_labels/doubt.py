"""Logits to what is kept of them: the class, how much the teacher doubts it, and the most probable classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SOFTMAX = "float64 on the host"  # in the plan


class Rows(NamedTuple):
    """What is kept of n pictures.

    number      int32 (n,), the most probable class, the smallest among equals
    confidence  float32 (n,), 1 - doubt
    doubt       float32 (n,), the probability of all other classes: of a sure teacher 1 - p would be 0
    top_class   int32 (n, K), by (-probability, number)
    top_prob    float16 (n, K)
    """

    number: np.ndarray[Any, np.dtype[np.int32]]
    confidence: np.ndarray[Any, np.dtype[np.float32]]
    doubt: np.ndarray[Any, np.dtype[np.float32]]
    top_class: np.ndarray[Any, np.dtype[np.int32]]
    top_prob: np.ndarray[Any, np.dtype[np.float16]]


def rows_of(logits: np.ndarray[Any, np.dtype[np.float32]], top: int) -> Rows:
    """What is kept of logits (n, classes), float32 and finite; of `top` classes, or all where there are fewer.

    The softmax is float64, and doubt is summed from the smallest probability up, so that it is right to float32's last
    bit also where float32's 1 - p is 0:

    >>> doubt = rows_of(np.array([[20, 0, 0]], np.float32), 2).doubt[0]
    >>> bool(abs(doubt / 4.122307e-09 - 1) < 1e-6), float(np.float32(1) - doubt)
    (True, 1.0)
    """
    n, classes = logits.shape
    order = np.argsort(-logits, axis=1, kind="stable")  # of equal ones the smallest number first
    z = np.take_along_axis(logits, order, axis=1).astype(np.float64)
    powers = np.exp(z - z[:, :1])  # ordered, the largest is 1
    # A running sum adds one after another, from the smallest; np.sum would add in an order of its own.
    others = np.cumsum(powers[:, :0:-1], axis=1)[:, -1] if classes > 1 else np.zeros(n)
    probabilities = powers[:, :top] / (1 + others)[:, None]
    doubt = (others / (1 + others)).astype(np.float32)
    kept = order[:, :top].astype(np.int32)
    return Rows(kept[:, 0].copy(), np.float32(1) - doubt, doubt, kept, probabilities.astype(np.float16))
