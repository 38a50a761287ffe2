"""Masks of objects: COCO's run lengths, polygons drawn, and what a model gives pasted one object at a time.

A mask of a whole picture is held as run lengths (about 1 KB) and seldom as pixels: 300 objects in a picture of 12
million pixels are 3.6 GB as bytes, and 14 GB as torchvision gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lambdanets.errors import need

if TYPE_CHECKING:
    from torch import Tensor

_STRETCHED_PX = 1 << 22  # a mask stretched to no more than this is cheap, even if most of it lies outside the picture

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Bits = np.ndarray[Any, np.dtype[np.bool_]]


def _library() -> Any:
    need("faster_coco_eval", "detection", "it reads and writes COCO's run lengths and polygons")
    from faster_coco_eval.core import mask

    return mask


def encode(bitmap: np.ndarray[Any, Any]) -> bytes:
    """COCO's compressed run lengths of a mask (H, W): where it is not 0. Raises ValueError for another shape.

    >>> encode(np.array([[0, 1], [0, 1]]))
    b'22'
    """
    bitmap = np.asarray(bitmap)
    if bitmap.ndim != 2 or 0 in bitmap.shape:
        raise ValueError(f"a mask is (height, width), none of them 0, and not {bitmap.shape}")
    bits = bitmap if bitmap.dtype == bool else bitmap != 0
    return bytes(_library().encode(np.asfortranarray(bits).view(np.uint8))["counts"])


def decode(counts: bytes, height: int, width: int) -> Pixels:
    """The mask (height, width), of 0 and 1, that compressed run lengths stand for. Raises ValueError for others.

    >>> decode(b"22", 2, 2).tolist()
    [[0, 1], [0, 1]]
    """
    try:
        decoded: Pixels = _library().decode({"size": [height, width], "counts": counts})
    except RuntimeError as error:  # the library's, where a number is cut off
        raise ValueError(str(error)) from error
    return decoded


def rasterise(
    segmentation: list[np.ndarray[Any, Any]] | bytes | None,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    offset: tuple[int, int] = (0, 0),
    to: tuple[int, int] | None = None,
) -> Pixels:
    """One object's mask, of 0 and 1, in a picture that was resized, then cropped.

    segmentation  polygons, each (k, 2) of x, y in pixels of the picture, of which the union is taken; or compressed run
                  lengths at the size of the picture
    size          height and width of the picture
    scale         of height and width; the resized picture has round(size x scale) pixels
    offset        top and left of the crop in the resized picture, not negative
    to            height and width of the crop, hence of the result (default: what is left of the resized picture);
                  beyond the resized picture it is 0

    Polygons are drawn by COCO's rule after they were scaled, which is sharper than a resized mask, and costs what the
    object measures and not what the picture does; run lengths are decoded and resized (nearest pixel).
    Raises ValueError for an object without a segmentation, and for run lengths that are none of that size.
    """
    if segmentation is None:
        raise ValueError("an object without a segmentation has no mask to draw: it has only a box")
    if min(offset) < 0:
        raise ValueError(f"a crop starts inside the picture: offset={offset}")
    resized = [round(side * by) for side, by in zip(size, scale, strict=True)]
    rest = max(resized[0] - offset[0], 0), max(resized[1] - offset[1], 0)
    drawn = np.zeros(rest if to is None else to, np.uint8)
    inside = drawn[: rest[0], : rest[1]]
    if isinstance(segmentation, bytes):
        whole = decode(segmentation, *size)
        if (*inside.shape, *scale, *offset) == (*size, 1.0, 1.0, 0, 0):
            inside[:] = whole
        else:
            rows, columns = (
                np.minimum(((np.arange(n) + (start + 0.5)) / by).astype(np.int64), side - 1)
                for n, start, by, side in zip(inside.shape, offset, scale, size, strict=True)
            )
            inside[:] = whole[rows[:, None], columns]
    else:
        for polygon in segmentation:
            _draw(polygon, size, scale, offset, inside)
    return drawn


def _draw(
    polygon: np.ndarray[Any, Any],
    size: tuple[int, int],
    scale: tuple[float, float],
    offset: tuple[int, int],
    into: Pixels,
) -> None:
    if len(polygon) < 3 or 0 in into.shape:
        return
    height, width = size
    # Corners that lie far outside would cost memory without end.
    near = np.clip(np.asarray(polygon, np.float64), (-width, -height), (2 * width, 2 * height))
    points = near * (scale[1], scale[0]) - (offset[1], offset[0])
    # The rule cuts off towards 0, so that corners left of the crop or above it would move: drawn where none is.
    left, top = (math.floor(low) - 1 for low in points.min(0))
    right, bottom = (math.ceil(high) + 2 for high in points.max(0))
    right, bottom = min(right, into.shape[1]), min(bottom, into.shape[0])
    if min(right, bottom) <= 0 or right <= left or bottom <= top:
        return
    rows, columns = bottom - top, right - left
    library = _library()
    runs = library.frPyObjects([(points - (left, top)).ravel().tolist()], rows, columns)
    here = library.decode(runs)[max(-top, 0) :, max(-left, 0) :, 0]
    target = into[max(top, 0) : bottom, max(left, 0) : right]
    np.maximum(target, here, out=target)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Bits]:
    """A model's masks in their picture, as bits (H, W), one object at a time: only one is in memory.

    masks  (n, m, m), of 0 to 1, each stretched over its box; m is 28 here
    boxes  (n, 4) x0, y0, x1, y1 in pixels of the picture
    size   height and width of the picture

    The bits are those of torchvision's `paste_masks_in_image(...) > 0.5`, but for a box wholly outside the picture,
    which it cannot paste and here gives no pixel. Of a box of over 4 million pixels, most of them outside, what is seen
    is computed alone: a value within rounding of 0.5 may fall on the other side there.
    Raises ValueError for other shapes and for a box that is not finite.
    """
    for bits, top, left in _inside(masks, boxes, size):
        whole = np.zeros(size, bool)
        whole[top : top + bits.shape[0], left : left + bits.shape[1]] = bits
        yield whole


def paste_runs(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[bytes]:
    """`paste`, straight to compressed run lengths: time and memory are those of the box, not of the picture."""
    library = _library()
    height, width = size
    for bits, top, left in _inside(masks, boxes, size):
        rows, columns = bits.shape
        # Column by column, as run lengths go. A column lower than the picture is followed by a 0; one as high is not,
        # since its run may go on in the next.
        between = int(rows < height)
        flat = np.zeros(1 + columns * (rows + between) + 1, np.int8)
        flat[1:-1].reshape(columns, rows + between)[:, :rows] = bits.T
        turns = np.flatnonzero(flat[1:] != flat[:-1])
        column, row = np.divmod(turns, rows + between) if rows else (turns, turns)
        at = (left + column) * height + top + row
        counts = np.diff(at, prepend=0, append=height * width).tolist()
        if counts[-1] == 0:
            counts.pop()
        yield bytes(library.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"])


def _inside(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[tuple[Bits, int, int]]:
    """Of each object the bits inside its box and the picture, and where they begin: top, left."""
    import torch
    from torch.nn.functional import interpolate, pad

    masks, boxes = (torch.as_tensor(given).detach().cpu() for given in (masks, boxes))
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(f"masks are (n, m, m) and boxes (n, 4), not {tuple(masks.shape)} and {tuple(boxes.shape)}")
    masks, boxes = (t if t.dtype in (torch.float32, torch.float64) else t.float() for t in (masks, boxes))
    if not torch.isfinite(boxes).all():
        raise ValueError(f"box {int((~torch.isfinite(boxes)).any(1).nonzero()[0])} is not finite")
    height, width = size
    # One pixel of 0 goes around each mask, so the box grows by as much; then to whole pixels, as torchvision does it.
    grow = (masks.shape[-1] + 2) / masks.shape[-1] if masks.shape[-1] else 1.0
    half_w, half_h = (boxes[:, 2] - boxes[:, 0]) * 0.5 * grow, (boxes[:, 3] - boxes[:, 1]) * 0.5 * grow
    middle_x, middle_y = (boxes[:, 2] + boxes[:, 0]) * 0.5, (boxes[:, 3] + boxes[:, 1]) * 0.5
    grown = torch.stack((middle_x - half_w, middle_y - half_h, middle_x + half_w, middle_y + half_h), 1)
    padded = pad(masks, (1, 1, 1, 1))
    # Python's whole numbers have no end, as those of a box of 1e30 need; both ways cut off towards 0.
    corners = ([int(at) for at in box] for box in grown.double().nan_to_num().tolist())
    for mask, (x0, y0, x1, y1) in zip(padded, corners, strict=True):
        top, bottom, left, right = max(y0, 0), min(y1 + 1, height), max(x0, 0), min(x1 + 1, width)
        if bottom <= top or right <= left:
            yield np.zeros((0, 0), bool), 0, 0
            continue
        to = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        seen = slice(top - y0, bottom - y0), slice(left - x0, right - x0)
        if to[0] * to[1] > max(_STRETCHED_PX, 4 * (bottom - top) * (right - left)):
            yield _seen(mask.numpy(), to, seen) > 0.5, top, left
            continue
        # No name for the stretched mask: it would live on while the next one is made.
        above = interpolate(mask[None, None], size=to, mode="bilinear", align_corners=False)[0, 0][seen] > 0.5
        yield above.numpy(), top, left


def _seen(mask: np.ndarray[Any, Any], to: tuple[int, int], seen: tuple[slice, slice]) -> np.ndarray[Any, Any]:
    """A part of a mask (m, m) that is stretched to a size which may not fit into memory: bilinear, as torch has it."""
    parts = []
    for part, length, side in zip(seen, to, mask.shape, strict=True):
        exact = mask.dtype.type if part.stop < 1 << 24 else np.float64
        at = np.arange(part.stop - part.start) + float(part.start)
        source = np.maximum(exact(side / length) * (at.astype(exact) + exact(0.5)) - exact(0.5), 0)
        low = np.minimum(source.astype(np.int64), side - 1)
        parts.append((low, np.minimum(low + 1, side - 1), np.minimum(source - low, 1).astype(mask.dtype)))
    (above, below, down), (left, right, along) = parts
    across = mask[:, left] * (1 - along) + mask[:, right] * along
    found: np.ndarray[Any, Any] = across[above] * (1 - down[:, None]) + across[below] * down[:, None]
    return found
