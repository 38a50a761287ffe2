"""Two numbers of 64 bits a picture: one of its file's bytes, and one of how it looks, which copies of it share."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image


def bytes_hash(content: bytes) -> int:
    """Of a file's bytes: blake2b's first 8, little-endian.

    >>> bytes_hash(b"lambda") == bytes_hash(b"lambda") != bytes_hash(b"Lambda")
    True
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def look_hash(image: Image.Image) -> int:
    """The difference hash: grey, resized to 9 x 8, a bit where the right neighbour is brighter; row by row, the
    first bit highest. Encoded again or at another size, a picture keeps all but a few bits; a crop keeps none.

    The filter is Pillow's bilinear one, whose weights change little with the size; a box's edges jump by whole pixels.

    >>> look_hash(Image.linear_gradient("L").rotate(90)) == 2**64 - 1  # brighter to the right everywhere
    True
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
