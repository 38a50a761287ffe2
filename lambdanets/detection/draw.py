"""Objects drawn on their picture: boxes, masks, and labels that can be read."""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lambdanets.errors import printable

_LEAST_FONT_PX, _MOST_LETTERS, _FILL = 11, 30, 0.4
_HUES = 0, 25, 50, 85, 130, 165, 190, 210, 235, 270, 300, 335  # as far from one another to the eye
_LIGHTS = 0.42, 0.57, 0.74
_COLOURS = len(_HUES) * len(_LIGHTS)
_LABELLED = 1 / 6  # of the picture at most, where labels may be left out
_NO_LETTER = "\uffff"

Colour = tuple[int, int, int]


def colour_of(name: str) -> Colour:
    """The colour of a class, red, green and blue of 0..255: one of 36, by its name, the same in every picture and run.

    >>> colour_of("cat") == colour_of("cat") != colour_of("dog")
    True
    """
    return _colour(_number(name))


def colours_of(classes: Iterable[str]) -> dict[str, Colour]:
    """`colour_of` each class of a data set; but of two that have the same, one gets another, while there are any left.

    >>> len(set(colours_of(str(i) for i in range(36)).values()))
    36
    """
    given: dict[str, int] = {}
    for name in sorted(set(classes)):
        used = set(list(given.values())[len(given) // _COLOURS * _COLOURS :])
        # In steps of 7 every number comes, each of another hue than the last.
        given[name] = next(n for i in range(_COLOURS) if (n := (_number(name) + 7 * i) % _COLOURS) not in used)
    return {name: _colour(number) for name, number in given.items()}


def _number(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big") % _COLOURS


def _colour(number: int) -> Colour:
    hue, light = _HUES[number // len(_LIGHTS)], _LIGHTS[number % len(_LIGHTS)]
    if 220 < hue < 280:  # blue is the darkest to the eye
        light += 0.1
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue / 360, light, 0.9))
    return red, green, blue


def draw(
    picture: Image.Image,
    boxes: np.ndarray[Any, Any],
    names: Sequence[str],
    scores: Iterable[float] | None = None,
    masks: Iterable[np.ndarray[Any, Any]] | None = None,
    *,
    labels: Literal["auto"] | bool = "auto",
    classes: Iterable[str] = (),
    font: str | Path | None = None,
) -> Image.Image:
    """A copy of the picture, in RGB and of its size, with the objects on it.

    boxes    (n, 4) x0, y0, x1, y1 in pixels; what lies outside the picture is not drawn
    names    n names of classes: they decide the colours and stand on the labels, as "cat 0.87" where there are scores
    masks    n masks (H, W), read one at a time
    labels   True: all; "auto": none on a picture too small for them, else those that lie neither upon another nor upon
             the middle of another object, on a sixth of the picture at most; the first of each class come first, then
             those of higher score (without scores: of larger objects); False: none
    classes  of the data set, so that no two of them have one colour, see `colours_of`
    font     a TrueType file (default: Pillow's own, which has only Latin letters: others become their like, or "?")

    Sizes of letters and lines follow the picture's, and are smaller where objects are small. Labels are inside the
    picture; one that is wider loses letters. Without objects the copy is as the picture was.
    Raises ValueError where lengths or sizes are not equal, OSError for a font that cannot be read.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    given = None if scores is None else [float(score) for score in scores]
    n = len(boxes)
    if len(names) != n or (given is not None and len(given) != n):
        shown = "no" if given is None else f"{len(given)}"
        raise ValueError(f"{n} boxes, {len(names)} names and {shown} scores are not of one length")
    if not np.isfinite(boxes).all():
        raise ValueError("a box is not finite")
    table = colours_of(classes)
    colours = [table.get(name) or colour_of(name) for name in names]
    pixels = np.array(picture.convert("RGB"))
    sizes = _sizes(picture.size, boxes, font)
    if masks is not None:
        _paint(pixels, masks, colours, sizes.line)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    limit = np.array([drawn.width - 1, drawn.height - 1] * 2)
    inside = np.floor(boxes).clip(0, limit)
    reaching = np.all(boxes[:, :2] < limit[:2] + 1, axis=1) & np.all(boxes[:, 2:] > 0, axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    first = np.argsort(-np.asarray(given) if given is not None else -areas, kind="stable")
    for i in first[::-1].tolist():  # the surest on top
        if reaching[i]:
            _outline(pen, inside[i], colours[i], sizes.line)
    if labels is False or (labels == "auto" and sizes.label * 4 > drawn.height):
        return drawn
    taken: list[_Place] = []
    free_px = drawn.width * drawn.height * _LABELLED
    middles = (inside[:, :2] + inside[:, 2:]) / 2
    middles[~reaching] = -1
    surest = {names[i]: i for i in first[::-1].tolist()}
    for i in sorted(first.tolist(), key=lambda i: surest[names[i]] != i):
        score = None if given is None else given[i]
        text = _fitting(names[i], score, sizes, drawn.width) if reaching[i] else ""
        if not text:
            continue
        width = round(sizes.font.getlength(text)) + 2 * sizes.pad
        free_px -= width * sizes.label
        if labels == "auto" and free_px < 0 and surest[names[i]] != i:
            break
        others = np.delete(middles, i, 0)
        place = _free(_places(inside[i], width, sizes, drawn.size), taken, others, always=labels is True)
        if place is not None:
            taken.append(place)
            _label(pen, place, text, colours[i], sizes)
    return drawn


class _Sizes(NamedTuple):
    """In pixels."""

    font: ImageFont.FreeTypeFont
    line: int
    label: int
    pad: int


class _Place(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    def meets(self, other: _Place) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def _sizes(size: tuple[int, int], boxes: np.ndarray[Any, Any], font_file: str | Path | None) -> _Sizes:
    side = (size[0] * size[1]) ** 0.5
    boxes = boxes if len(boxes) else np.array([(0, 0, *size)], float)
    object_side = float(np.median((boxes[:, 2:] - boxes[:, :2]).clip(1).prod(1) ** 0.5))
    most = max(_LEAST_FONT_PX, side / 42)
    letters = round(min(max(0.4 * object_side, _LEAST_FONT_PX, 0.4 * most), most))
    line = max(1, round(min(object_side / 25, side / 300)))
    font = ImageFont.load_default(letters) if font_file is None else ImageFont.truetype(font_file, letters)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as it is with a size
    pad = max(1, letters // 6)
    return _Sizes(font, line, sum(font.getmetrics()) + pad, pad)


def _paint(
    pixels: np.ndarray[Any, Any], masks: Iterable[np.ndarray[Any, Any]], colours: Sequence[Colour], line: int
) -> None:
    count = 0
    for count, mask in enumerate(masks, 1):
        if count > len(colours) or mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"mask {count} of {len(colours)} is {mask.shape}, in a picture of {pixels.shape[:2]} (height, width)"
            )
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        bits = mask[part] != 0
        inner = bits.copy()
        for step in {1, line}:
            around = np.pad(bits, step)
            inner &= around[: -2 * step, step:-step] & around[2 * step :, step:-step]
            inner &= around[step:-step, : -2 * step] & around[step:-step, 2 * step :]
        target, colour = pixels[part], np.array(colours[count - 1], np.float32)
        target[inner] = (target[inner] * np.float32(1 - _FILL) + colour * np.float32(_FILL)).astype(np.uint8)
        target[bits & ~inner] = colour  # the edge, which tells neighbours of one class apart
    if count != len(colours):
        raise ValueError(f"{count} masks of {len(colours)} objects")


def _outline(pen: ImageDraw.ImageDraw, box: np.ndarray[Any, Any], colour: Colour, line: int) -> None:
    x0, y0, x1, y1 = (int(v) for v in box)
    x1, y1 = max(x0, x1), max(y0, y1)
    if line > 1:  # a dark rim shows it on a ground of its own colour
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0))
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)


def _fitting(name: str, score: float | None, sizes: _Sizes, width: int) -> str:
    """What of a label is narrow enough: without letters at the end, then without the score; nothing where none is."""
    name, tail = _written(printable(name), sizes.font), "" if score is None else f" {score:.2f}"
    for end, least in ((tail, 3), ("", 1)):
        for length in range(min(len(name), _MOST_LETTERS), min(least, len(name)) - 1, -1):
            text = name[:length] + ("..." if length < len(name) else "") + end
            if sizes.font.getlength(text) + 2 * sizes.pad <= width:
                return text
    return ""


def _written(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text in letters that the font has: ss for ß where it must be."""
    if text.isascii():
        return text
    none = bytes(font.getmask(_NO_LETTER))

    def has(letters: str) -> bool:
        return all(letter.isascii() or bytes(font.getmask(letter)) != none for letter in letters)

    forms = ((letter, letter.casefold(), unicodedata.normalize("NFKD", letter)[:1], "?") for letter in text)
    return "".join(next(form for form in of if has(form)) for of in forms)


def _free(
    places: Iterable[_Place], taken: Sequence[_Place], middles: np.ndarray[Any, Any], *, always: bool
) -> _Place | None:
    """The first place that meets no label and hides no middle; else None, or where one must be the first of all."""
    listed = list(places)
    for place in listed:
        if any(place.meets(other) for other in taken):
            continue
        hidden = (middles >= (place.left, place.top)) & (middles < (place.right, place.bottom))
        if always or not np.any(np.all(hidden, axis=1)):
            return place
    return listed[0] if always else None


def _places(box: np.ndarray[Any, Any], width: int, sizes: _Sizes, size: tuple[int, int]) -> Iterator[_Place]:
    x0, y0, x1, y1 = (int(v) for v in box)
    tops, lefts = [y0 - sizes.label, y1 + 1], [x0, x1 + 1 - width]
    if y1 - y0 >= 3 * sizes.label and x1 - x0 >= width:  # inside, where little is hidden by it
        tops.insert(1, y0)
        tops.append(y1 + 1 - sizes.label)
    within = [top for top in tops if 0 <= top <= size[1] - sizes.label]
    for top, left in itertools.product(within or tops, lefts):
        top, left = (max(0, min(at, most)) for at, most in ((top, size[1] - sizes.label), (left, size[0] - width)))
        yield _Place(left, top, left + width, top + sizes.label)


def _label(pen: ImageDraw.ImageDraw, place: _Place, text: str, colour: Colour, sizes: _Sizes) -> None:
    pen.rectangle((place.left, place.top, place.right - 1, place.bottom - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130
    ink = (0, 0, 0) if bright else (255, 255, 255)
    pen.text((place.left + sizes.pad, place.top + sizes.pad // 2), text, fill=ink, font=sizes.font)
