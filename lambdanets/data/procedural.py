"""Pictures with objects made from a seed, as a COCO data set: to try a detector on, without a download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.errors import BadData
from lambdanets.files import write_atomically

SHAPES = ("disc", "box", "triangle", "ring", "L")
CUE_SHAPES = ("warm disc", "cold disc", "box", "triangle", "ring", "L")

_SIDES_PX = 12, 60
_SEEN_PX = 24  # of which less is seen is no object
_MARKER_PX, _FROM_EDGE_PX = 6, 2
_MARKERS = np.array([(255, 40, 0), (0, 40, 255)])

Bits = np.ndarray[Any, np.dtype[np.bool_]]
Points = np.ndarray[Any, np.dtype[np.float64]]


class Shape(NamedTuple):
    """One object as it is seen."""

    name: str
    visible: Bits
    """(image_px, image_px)"""
    outline: Points | None
    """(k, 2) x, y in pixels; None where a polygon cannot say what is seen: a hole, or something before it."""


def shapes(
    seed: int, index: int, *, image_px: int = 128, cue: bool = False, objects: tuple[int, int] = (1, 6)
) -> tuple[Image.Image, list[Shape]]:
    """One picture of the set `coco_shapes`, a function of its arguments alone, and its objects from back to front.

    >>> picture, seen = shapes(0, 3)
    >>> picture.size, [one.name for one in seen]
    ((128, 128), ['ring', 'L', 'box', 'ring'])
    """
    draw = np.random.default_rng([seed, index])
    pixels = _ground(draw, image_px)
    warm_or_cold = int(draw.integers(2))
    count = int(draw.integers(objects[0], objects[1] + 1))
    seen: list[Shape] = []
    for i in range(count):
        name = SHAPES[int(draw.integers(len(SHAPES)))]
        if cue and (i == count - 1 or draw.random() < 0.25):
            name = "disc"
        bits, outline = _shape(draw, name, image_px)
        if cue and name == "disc":
            name = CUE_SHAPES[warm_or_cold]
        seen = [_behind(one, bits) for one in seen]
        seen.append(Shape(name, bits, outline))
        pixels[bits] = _colour(draw) + draw.normal(0, 8, (int(bits.sum()), 1))
    if cue:  # nothing but the marker has a colour: how far it is seen is to be asked, not whether it is made out
        pixels[:] = pixels.mean(2, keepdims=True)
        marker = np.zeros((image_px, image_px), bool)
        top, left = (_FROM_EDGE_PX if at else image_px - _FROM_EDGE_PX - _MARKER_PX for at in draw.integers(0, 2, 2))
        marker[top : top + _MARKER_PX, left : left + _MARKER_PX] = True
        pixels[marker] = _MARKERS[warm_or_cold]
        seen = [_behind(one, marker) for one in seen]
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture, [one for one in seen if one.visible.sum() >= _SEEN_PX]


def coco_shapes(
    folder: str | Path,
    *,
    images: int,
    seed: int = 0,
    image_px: int | None = None,
    split: int | None = None,
    cue: bool = False,
    objects: tuple[int, int] = (1, 6),
) -> Path:
    """Writes FOLDER/train.json, FOLDER/val.json and FOLDER/images/*.png: shapes on a textured ground, with their masks.

    images    pictures in all; picture `index` is a function of (seed, index) and of image_px, cue and objects
    image_px  height and width (default 128, with a cue 256)
    split     how many of them, the last ones, are val (default: a fifth)
    cue       the class of every disc is told by one marker of 6 px in a corner: warm disc, cold disc. What cannot see
              that far can only guess. Each picture with objects has such a disc
    objects   least and most in a picture; hidden ones fall out. With 0 some pictures have none

    The shapes (disc, box, triangle, ring, L) are 12 to 60 px across; later ones cover earlier ones, and a mask is what
    is seen: a polygon where it can say so, else uncompressed run lengths. Colours tell nothing of the class.
    Raises BadData where such a set, or a part of one, is in the folder already; ValueError for a split or a size that
    cannot be.
    """
    root, px = Path(folder), (256 if cue else 128) if image_px is None else image_px
    held_out = max(images // 5, 1) if split is None else split
    if not 0 < held_out < images:
        raise ValueError(f"of {images} images {held_out} cannot be held out: both parts need one at least")
    if px < _SIDES_PX[0] + 4 or not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"image_px={px} and objects={objects}: at least {_SIDES_PX[0] + 4} px, and 0 <= least <= most")
    if present := [name for name in ("train.json", "val.json", "images") if os.path.lexists(root / name)]:
        raise BadData(f"{root} has {present[0]} already: name a folder without, nothing is written over")
    os.makedirs(root / "images")
    names = CUE_SHAPES if cue else SHAPES
    for part, indices in (("train", range(images - held_out)), ("val", range(images - held_out, images))):
        pictures: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in indices:
            picture, seen = shapes(seed, index, image_px=px, cue=cue, objects=objects)
            file_name = f"{index:06d}.png"
            with open(root / "images" / file_name, "xb") as file:
                picture.save(file, "PNG", compress_level=1)
            pictures.append({"id": index + 1, "file_name": file_name, "width": px, "height": px})
            annotations += [
                _annotation(one, len(annotations) + i, index + 1, names.index(one.name) + 1)
                for i, one in enumerate(seen, 1)
            ]
        content = {
            "info": {"description": f"lambdanets.data.procedural, seed {seed}"},
            "images": pictures,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }
        write_atomically(root / f"{part}.json", json.dumps(content).encode())
    return root


def _annotation(one: Shape, annotation_id: int, image_id: int, category_id: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(one.visible.any(1)), np.flatnonzero(one.visible.any(0))
    top, left, bottom, right = (int(v) for v in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    shape: Any
    if one.outline is not None:
        shape = [one.outline.round(2).ravel().tolist()]
    else:
        flat = np.concatenate(([0], one.visible.T.ravel()))  # column by column, and from 0
        turns = np.flatnonzero(np.diff(flat))
        shape = {"size": list(one.visible.shape), "counts": np.diff(turns, prepend=0, append=one.visible.size).tolist()}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(one.visible.sum()),
        "iscrowd": 0,
        "segmentation": shape,
    }


def _behind(one: Shape, bits: Bits) -> Shape:
    """What is still seen of a shape that these pixels were drawn over."""
    return one._replace(visible=one.visible & ~bits, outline=None) if (one.visible & bits).any() else one


def _ground(draw: np.random.Generator, px: int) -> Points:
    """Coarse and fine texture in muted colours, (px, px, 3)."""
    coarse = Image.fromarray(draw.integers(70, 180, (5, 5, 3), dtype=np.uint8)).resize(
        (px, px), Image.Resampling.BICUBIC
    )
    return np.asarray(coarse, np.float64) + draw.normal(0, 12, (px, px, 1))


def _colour(draw: np.random.Generator) -> Points:
    """Away from the ground: each channel dark or light, and not all three alike."""
    light = draw.permutation([True, False, bool(draw.integers(2))])
    return np.where(light, draw.uniform(205, 250, 3), draw.uniform(5, 50, 3))


def _shape(draw: np.random.Generator, name: str, px: int) -> tuple[Bits, Points | None]:
    """Its pixels in a picture of px x px, and its outline where it has no hole."""
    largest = min(_SIDES_PX[1], px - 2)
    height, width = draw.integers(_SIDES_PX[0], largest + 1, 2)
    if name in ("disc", "ring"):
        height = width
    top, left = int(draw.integers(1, px - height)), int(draw.integers(1, px - width))
    h, w = float(height), float(width)
    if name in ("disc", "ring"):
        y, x = (np.arange(int(height)) + 0.5 - h / 2)[:, None], np.arange(int(width)) + 0.5 - w / 2
        far = np.hypot(y, x) / (h / 2)
        inside = far <= 1
        if name == "ring":
            inside &= far > draw.uniform(0.4, 0.6)
        turn = np.arange(32) * (np.pi / 16)
        corners = np.stack((w / 2 * (1 + np.cos(turn)), h / 2 * (1 + np.sin(turn))), 1)
    else:
        if name == "box":
            corners = np.array([(0, 0), (w, 0), (w, h), (0, h)])
        elif name == "triangle":
            corners = np.array([(0, h), (draw.uniform(0.2, 0.8) * w, 0), (w, h)])
        else:
            x, y = np.round(draw.uniform(0.35, 0.6, 2) * (w, h))
            corners = np.array([(0, 0), (x, 0), (x, y), (w, y), (w, h), (0, h)])
        if draw.random() < 0.5:
            corners[:, 0] = w - corners[:, 0]
        if draw.random() < 0.5:
            corners[:, 1] = h - corners[:, 1]
        inside = _filled(corners, int(height), int(width))
    bits = np.zeros((px, px), bool)
    bits[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return bits, None if name == "ring" else corners + np.array([left, top])


def _filled(corners: Points, height: int, width: int) -> Bits:
    """The pixels whose middle lies inside a polygon."""
    y, x = (np.arange(height) + 0.5)[:, None], np.arange(width) + 0.5
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside
