"""A COCO file of unknown origin to columns of numbers, in one reading: nothing is judged here but its form."""

from __future__ import annotations

import errno
import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lambdanets.detection.run_lengths import compressed
from lambdanets.errors import BadData, DiskFault, printable
from lambdanets.files import open_file

MOST_BYTES = 4 << 30
"""Above this a COCO file is refused unread."""

NO_MASK, POLYGONS, RUN_LENGTHS = 0, 1, 2

# What can be wrong with one polygon, or with run lengths, by itself.
SOUND, EMPTY, SHORT, ODD = 0, 1, 2, 3

_Array = np.ndarray[Any, Any]
_MOST = 1 << 53  # of an id: pycocotools and JSON's other readers hold numbers as float64


@dataclass(frozen=True, eq=False, repr=False)
class Annotations:
    """What a COCO file says, in the order in which it says it.

    file            of which errors speak
    image_ids       int64 (n_images,)
    names           the pictures' file names, as written
    sizes           int64 (n_images, 2) height, width; 0 where it is not said
    category_ids    int64 (n_categories,)
    category_names  as written
    rows            int64 (n,): the objects of the list "annotations", each a position in the columns below, which may
                    hold more: what looks like an object and lies elsewhere in the file
    ids             int64; -1 where there is none
    images, categories  int64, the ids that the object names
    boxes           float64 (., 4) x, y, width, height px; NaN where there is none
    boxed           bool: a box is given
    crowd           bool
    areas           float64; NaN where it is not said
    kinds           uint8: NO_MASK, POLYGONS, RUN_LENGTHS
    flat            bool: the polygon was a flat list of numbers
    polygon_starts  int64 (. + 1,): the first polygon of each object
    points          float64 (., 2) x, y px of all polygons
    point_starts    int64 (polygons + 1,): where each polygon begins in `points`
    polygon_faults  uint8 (polygons,): SOUND, EMPTY, SHORT or ODD, and then without points
    runs            uint8, the compressed run lengths of all objects
    run_starts      int64 (. + 1,): where each object's begin in `runs`
    run_sizes       int64 (., 2) height, width that the run lengths are of
    texts           how many ids were written as text
    """

    file: Path
    image_ids: _Array
    names: list[str]
    sizes: _Array
    category_ids: _Array
    category_names: list[str]
    rows: _Array
    ids: _Array
    images: _Array
    categories: _Array
    boxes: _Array
    boxed: _Array
    crowd: _Array
    areas: _Array
    kinds: _Array
    flat: _Array
    polygon_starts: _Array
    points: _Array
    point_starts: _Array
    polygon_faults: _Array
    runs: _Array
    run_starts: _Array
    run_sizes: _Array
    texts: int


def read_annotations(file: str | Path) -> Annotations:
    """Reads a COCO file. 450 MB of it take about 1.5 GB while it is read.

    Raises BadData, naming the file and the first wrong place, for what is no COCO file; DiskFault where it cannot be
    read.
    """
    file = Path(file)
    reader = _Reader()
    try:
        found = json.JSONDecoder(object_hook=reader.object).decode(_text(file))
    except json.JSONDecodeError as error:
        raise BadData(f"{file} is no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadData(f"{file} is no COCO file: it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadData(f"{file} cannot be read: {str(error)[:120]}") from None
    try:
        return reader.finished(file, found)
    except _Wrong as error:
        raise BadData(f"{file} is no COCO file that can be read: {printable(error)}") from None


def _text(file: Path) -> str:
    try:
        with open_file(file) as opened:
            if (size := os.fstat(opened.fileno()).st_size) > MOST_BYTES:
                raise BadData(f"{file} has {size:,} bytes, more than the {MOST_BYTES:,} that are read")
            content = opened.read()
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise BadData(f"{file} cannot be read: {error.strerror}") from None
        raise DiskFault(str(file), f"cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{file} is no JSON: not UTF-8 at byte {error.start:,}") from None


class _Wrong(Exception):
    """What is wrong at one place of the file."""


class _Row(int):
    """Stands where an object was that went into the columns."""


class _Reader:
    """The columns while the file is read: `object` takes every JSON object as it ends, so that the numbers of a mask
    are Python's for a moment only."""

    def __init__(self) -> None:
        self.wrong: dict[int, str] = {}
        self.ids, self.images, self.categories = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.boxed, self.crowd, self.kinds, self.flat = bytearray(), bytearray(), bytearray(), bytearray()
        self.polygons, self.numbers, self.coordinates = array("q", [0]), array("q", [0]), array("d")
        self.polygon_faults = bytearray()
        self.runs, self.run_ends, self.run_sizes = bytearray(), array("q", [0]), array("q")
        self.texts = 0

    def object(self, held: dict[str, Any]) -> Any:
        if "image_id" in held or (("bbox" in held or "segmentation" in held) and "file_name" not in held):
            return self._object(held)
        if "file_name" in held:
            return {key: held[key] for key in ("id", "file_name", "width", "height") if key in held}
        return held

    def _object(self, held: dict[str, Any]) -> _Row:
        row = len(self.ids)
        id: Any
        image: Any
        category: Any
        area: Any
        box: Any
        try:
            id, image, category = held.get("id", -1), held.get("image_id"), held.get("category_id")
            if not type(id) is type(image) is type(category) is int:
                id = -1 if id is None else self._whole(id, "id")
                image, category = self._whole(image, "image_id"), self._whole(category, "category_id")
            if not (-_MOST < id < _MOST and -_MOST < image < _MOST and -_MOST < category < _MOST):
                raise _Wrong(".id, image_id or category_id is a number beyond 53 bits")
            crowd, area = held.get("iscrowd"), held.get("area")
            if crowd not in (0, 1, None):
                raise _Wrong(f".iscrowd is {_shown(crowd)}: expected 0 or 1")
            if area is not None and type(area) is not float and type(area) is not int:
                raise _Wrong(f".area is {_shown(area)}: expected a number")
            area = float("nan") if area is None else float(area)
            box = held.get("bbox")
            if boxed := box is not None and box != []:
                if type(box) is not list or len(box) != 4:
                    raise _Wrong(f".bbox is {_shown(box)}: expected four numbers, x, y, width, height")
                box = array("d", [_number(number, ".bbox") for number in box])
            kind = self._mask(held.get("segmentation"))
        except OverflowError:
            self.wrong[row] = " has a number that is too large"
        except _Wrong as error:
            self.wrong[row] = str(error)
        if row in self.wrong:
            id, image, category, crowd, area, boxed, kind = -1, 0, 0, 0, 0.0, False, NO_MASK
        self.ids.append(id)
        self.images.append(image)
        self.categories.append(category)
        self.crowd.append(1 if crowd else 0)
        self.areas.append(area)
        self.boxed.append(boxed)
        self.boxes.extend(box if boxed else _NO_BOX)
        self.kinds.append(kind)
        if len(self.flat) == row:
            self.flat.append(0)
        self.polygons.append(len(self.polygon_faults))
        self.run_ends.append(len(self.runs))
        if len(self.run_sizes) == 2 * row:
            self.run_sizes.extend((0, 0))
        return _Row(row)

    def _whole(self, value: Any, key: str) -> int:
        if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdecimal() and len(value) < 17:
            self.texts += 1
            return int(value)
        if (type(value) is int or (type(value) is float and value.is_integer())) and abs(value) < _MOST:
            return int(value)
        raise _Wrong(f".{key} is {_shown(value)}: expected a whole number")

    def _mask(self, held: Any) -> int:
        if type(held) is list:
            if not held:
                return NO_MASK
            if type(held[0]) is not list:
                held = [held]
                self.flat.append(1)
            for polygon in held:
                self._polygon(polygon)
            return POLYGONS
        if held is None:
            return NO_MASK
        if type(held) is dict:
            return self._run_lengths(held)
        raise _Wrong(f".segmentation is {_shown(held)}: expected polygons or run lengths")

    def _polygon(self, polygon: Any) -> None:
        if type(polygon) is not list:
            raise _Wrong(f".segmentation has {_shown(polygon)} among its polygons: expected lists of numbers")
        if polygon and type(polygon[0]) is list:  # points one by one, [[x, y], ...]
            if not all(type(point) is list and len(point) == 2 for point in polygon):
                raise _Wrong(".segmentation is nested deeper than polygons are: expected lists of numbers")
            polygon = [number for point in polygon for number in point]
        fault = SOUND if len(polygon) >= 6 else SHORT if polygon else EMPTY
        fault = ODD if len(polygon) % 2 else fault
        before = len(self.coordinates)
        try:
            self.coordinates.fromlist(polygon)
        except TypeError:
            wrong = next(number for number in polygon if type(number) not in (int, float))
            raise _Wrong(f".segmentation has {_shown(wrong)} in a polygon: expected numbers") from None
        if fault:
            del self.coordinates[before:]
        self.numbers.append(len(self.coordinates))
        self.polygon_faults.append(fault)

    def _run_lengths(self, held: dict[str, Any]) -> int:
        size, counts = held.get("size"), held.get("counts")
        if (
            type(size) is not list
            or len(size) != 2
            or not all(type(side) is int and 0 < side < 1 << 31 for side in size)
        ):
            raise _Wrong(f".segmentation.size is {_shown(size)}: expected height and width")
        if type(counts) is str:
            content = counts.encode("ascii", "replace")
        elif type(counts) is list:
            if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts):
                raise _Wrong(".segmentation.counts has something else than whole numbers from 0")
            content = compressed(np.array(counts, np.int64))
        else:
            raise _Wrong(f".segmentation.counts is {_shown(counts)}: expected text or a list of numbers")
        self.runs += content
        self.run_sizes.extend(size)
        return RUN_LENGTHS

    def finished(self, file: Path, found: Any) -> Annotations:
        if type(found) is not dict:
            raise _Wrong(f"it holds {_shown(found)}, no object with images, annotations and categories")
        images, objects, categories = (_list(found, key) for key in ("images", "annotations", "categories"))
        if not images:
            raise _Wrong("images is empty")
        rows = np.fromiter((self._row(at, held) for at, held in enumerate(objects)), np.int64, len(objects))
        image_ids, names, sizes = [], [], []
        for at, held in enumerate(images):
            if type(held) is not dict or "file_name" not in held:
                raise _Wrong(f"images[{at}] is {_shown(held)}: expected an object with id and file_name")
            image_ids.append(self._at(f"images[{at}]", held.get("id"), "id"))
            names.append(_text_of(held, "file_name", f"images[{at}]"))
            sizes.append([self._side(f"images[{at}]", held, "height"), self._side(f"images[{at}]", held, "width")])
        if not categories:
            raise _Wrong("categories is empty: the objects have no names")
        category_ids, category_names = [], []
        for at, held in enumerate(categories):
            if type(held) is not dict or "name" not in held:
                raise _Wrong(f"categories[{at}] is {_shown(held)}: expected an object with id and name")
            category_ids.append(self._at(f"categories[{at}]", held.get("id"), "id"))
            category_names.append(_text_of(held, "name", f"categories[{at}]"))
        return Annotations(
            file=file,
            image_ids=np.array(image_ids, np.int64),
            names=names,
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            category_ids=np.array(category_ids, np.int64),
            category_names=category_names,
            rows=rows,
            ids=_column(self.ids, np.int64),
            images=_column(self.images, np.int64),
            categories=_column(self.categories, np.int64),
            boxes=_column(self.boxes, np.float64).reshape(-1, 4),
            boxed=_column(self.boxed, np.bool_),
            crowd=_column(self.crowd, np.bool_),
            areas=_column(self.areas, np.float64),
            kinds=_column(self.kinds, np.uint8),
            flat=_column(self.flat, np.bool_),
            polygon_starts=_column(self.polygons, np.int64),
            points=_column(self.coordinates, np.float64).reshape(-1, 2),
            point_starts=_column(self.numbers, np.int64) // 2,
            polygon_faults=_column(self.polygon_faults, np.uint8),
            runs=_column(self.runs, np.uint8),
            run_starts=_column(self.run_ends, np.int64),
            run_sizes=_column(self.run_sizes, np.int64).reshape(-1, 2),
            texts=self.texts,
        )

    def _row(self, at: int, held: Any) -> int:
        if type(held) is not _Row:
            raise _Wrong(f"annotations[{at}] is {_shown(held)}: expected an object with image_id, category_id and bbox")
        if held in self.wrong:
            raise _Wrong(f"annotations[{at}]{self.wrong[held]}")
        return held

    def _at(self, place: str, value: Any, key: str) -> int:
        try:
            return self._whole(value, key)
        except _Wrong as error:
            raise _Wrong(f"{place}{error}") from None

    def _side(self, place: str, held: dict[str, Any], key: str) -> int:
        if held.get(key) is None:
            return 0
        if not 0 < (side := self._at(place, held[key], key)) < 1 << 31:
            raise _Wrong(f"{place}.{key} is {side}: expected pixels")
        return side


_NO_BOX = array("d", [float("nan")] * 4)


def _column(content: Any, kind: Any) -> _Array:
    column = np.frombuffer(content, kind) if len(content) else np.zeros(0, kind)
    column.flags.writeable = False
    return column


def _list(found: dict[str, Any], key: str) -> list[Any]:
    if type(held := found.get(key)) is not list:
        beside = ", ".join(repr(str(name)[:40]) for name in list(found)[:10])
        raise _Wrong(f"its {key!r} is {_shown(held)} and should be a list; the file has {beside or 'nothing'}")
    return held


def _text_of(held: dict[str, Any], key: str, place: str) -> str:
    if type(text := held[key]) is not str or not text:
        raise _Wrong(f"{place}.{key} is {_shown(text)}: expected text")
    return text


def _number(value: Any, place: str) -> float:
    if type(value) is not float and type(value) is not int:
        raise _Wrong(f"{place} has {_shown(value)}: expected numbers")
    return value


def _shown(value: Any) -> str:
    """A short word for any value of a JSON file."""
    if isinstance(value, _Row):
        return "an object that looks like an annotation"
    if type(value) is dict:
        return f"an object with {', '.join(repr(str(key)[:30]) for key in list(value)[:5]) or 'nothing'}"
    if type(value) is list:
        return f"a list of {len(value):,}"
    return "missing or null" if value is None else repr(value)[:60]
