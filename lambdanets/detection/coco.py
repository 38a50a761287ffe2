"""The pictures of a COCO file with their objects: one part, training or held out, as a list that readers share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.data.decode import open_image
from lambdanets.data.images import Images
from lambdanets.detection.annotations import RUN_LENGTHS, SOUND
from lambdanets.detection.check import Category, Kept
from lambdanets.files import placed

_Array = np.ndarray[Any, Any]
_AT_ONCE = 1 << 16  # masks

Segmentation = list[np.ndarray] | bytes | None
"""Polygons, each float64 (k, 2) of x, y px; COCO's compressed run lengths at the size of the picture; or none."""


class Objects(NamedTuple):
    """The objects of one picture, in the file's order; numbers are of the original, upright picture.

    ids            int64 (n,), the data set's own
    labels         int64 (n,), 1..len(categories)
    boxes          float64 (n, 4) x0, y0, x1, y1 px
    crowd          bool (n,): not single objects; nothing is trained on them
    areas          float64 (n,) px
    segmentations  n masks
    """

    ids: _Array
    labels: _Array
    boxes: _Array
    crowd: _Array
    areas: _Array
    segmentations: list[Segmentation]


@dataclass(frozen=True, eq=False, repr=False)
class CocoImages(Images):
    """One part of a COCO data set, without what was found wrong; made by `coco_images`.

    categories  label l is categories[l - 1]; `classes` are their names
    image_ids   int64 (n,), the data set's own
    sizes       int32 (n, 2) height, width px
    names       file names below root
    file        the annotations; root: the folder of the pictures
    has_masks   whether any object has a mask

    A picture has no label of its own: `labels` are zeros.
    """

    categories: tuple[Category, ...]
    image_ids: _Array
    sizes: _Array
    file: Path
    root: Path
    has_masks: bool
    n_objects: int
    n_crowds: int
    # The columns of the file, shared between the parts of a split; _rows are this part's objects, picture by picture.
    _kept: Kept
    _rows: _Array
    _starts: _Array

    def load(self, index: int) -> Image.Image:
        """The picture, RGB, upright; raises BadImage, DiskFault."""
        return open_image(self.root / self.names[index], name=self.names[index])

    def objects(self, index: int) -> Objects:
        """Of the picture at this place; crowds are among them."""
        rows, kept = self._rows[self._starts[index] : self._starts[index + 1]], self._kept
        return Objects(
            kept.ids[rows],
            kept.labels[rows],
            kept.boxes[rows],
            kept.of.crowd[rows],
            kept.areas[rows],
            [self._segmentation(row) for row in rows.tolist()],
        )

    def without(self, indices: Collection[int]) -> CocoImages:
        """The part but for the pictures at these places."""
        left = np.delete(self.image_ids, list(indices))
        pictures = self._kept.pictures
        return coco_images(self._kept, pictures[np.isin(self._kept.of.image_ids[pictures], left)])

    def whole(self) -> CocoImages:
        """All pictures of the file, of which this may be one part of a split."""
        return coco_images(self._kept)

    @property
    def left_out(self) -> tuple[int, int]:
        """How many pictures and objects the whole file has besides those that can be used."""
        kept = self._kept
        return len(kept.of.names) - len(kept.pictures), len(kept.of.rows) - len(kept.rows)

    @property
    def listed(self) -> frozenset[str]:
        """The names of all classes that the file has, asked for and used or not."""
        return frozenset(self._kept.of.category_names)

    def _segmentation(self, row: int) -> Segmentation:
        kept, of = self._kept, self._kept.of
        if not kept.masked[row]:
            return None
        if of.kinds[row] == RUN_LENGTHS:
            return of.runs[of.run_starts[row] : of.run_starts[row + 1]].tobytes()
        polygons = range(of.polygon_starts[row], of.polygon_starts[row + 1])
        return [of.points[of.point_starts[at] : of.point_starts[at + 1]] for at in polygons if kept.faults[at] == SOUND]

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any name, size, category, box, label, crowd, area or mask."""
        digest = hashlib.sha256(json.dumps([list(category) for category in self.categories]).encode())
        for name in self.names:
            digest.update(f"\n{name}".encode("utf-8", "surrogatepass"))
        kept, of = self._kept, self._kept.of
        rows = self._rows
        columns = (self.image_ids, self.sizes, self._starts, *(c[rows] for c in (kept.ids, kept.labels, kept.boxes)))
        for column in (*columns, of.crowd[rows], kept.areas[rows], kept.masked[rows], of.kinds[rows]):
            digest.update(np.ascontiguousarray(column).tobytes())
        masked = np.sort(rows[kept.masked[rows]])
        for some in np.split(masked, range(_AT_ONCE, len(masked), _AT_ONCE)):
            for column in self._masks(some):
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def _masks(self, rows: _Array) -> Iterator[_Array]:
        """Everything that the masks of these rows are made of, in the order of the file."""
        of, chosen = self._kept.of, np.zeros(len(self._kept.of.ids), bool)
        chosen[rows] = True
        if not len(rows):
            return
        within = slice(rows[0], rows[-1] + 1)
        for starts, content in ((of.run_starts, of.runs), (of.polygon_starts, self._kept.faults)):
            lengths = np.diff(starts)[within]
            yield lengths[chosen[within]]
            yield content[starts[rows[0]] : starts[rows[-1] + 1]][np.repeat(chosen[within], lengths)]
        first, last = of.polygon_starts[rows[0]], of.polygon_starts[rows[-1] + 1]
        polygons = np.repeat(chosen[within], np.diff(of.polygon_starts)[within])
        lengths = np.diff(of.point_starts)[first:last]
        yield lengths[polygons]
        yield of.points[of.point_starts[first] : of.point_starts[last]][np.repeat(polygons, lengths)]

    def stamp(self) -> dict[str, str] | None:
        sizes, times = hashlib.sha256(), hashlib.sha256()
        for name in self.names:
            try:
                found = os.stat(self.root / name)
                size, time_ns = found.st_size, found.st_mtime_ns
            except OSError:  # gone since: the reader says so
                size, time_ns = -1, -1
            sizes.update(b"%d\n" % size)
            times.update(b"%d %d\n" % (size, time_ns))
        return {"sizes": sizes.hexdigest(), "times": times.hexdigest()}


def coco_images(kept: Kept, pictures: _Array | None = None) -> CocoImages:
    """The pictures that `check_file` has kept, or of them those at these places of the file (int64)."""
    of = kept.of
    places = kept.pictures if pictures is None else pictures
    number = np.full(len(of.names), -1, np.int64)
    number[places] = np.arange(len(places))
    of_picture = number[kept.pictures_of[kept.rows]]
    order = np.argsort(of_picture, kind="stable")
    order = order[of_picture[order] >= 0]
    rows = kept.rows[order]
    starts = np.searchsorted(of_picture[order], np.arange(len(places) + 1)).astype(np.int64)
    crowds = int(of.crowd[rows].sum())
    return CocoImages(
        classes=tuple(category.name for category in kept.categories),
        names=[of.names[at] for at in places.tolist()],
        labels=np.zeros(len(places), np.int64),
        categories=kept.categories,
        image_ids=of.image_ids[places],
        sizes=kept.sizes[places].astype(np.int32),
        file=of.file,
        root=kept.root,
        has_masks=bool(kept.masked[rows].any()),
        n_objects=len(rows) - crowds,
        n_crowds=crowds,
        _kept=kept,
        _rows=rows,
        _starts=starts,
    )


def write_clean(images: CocoImages, out: str | Path) -> None:
    """Writes a COCO file of what is kept: pictures, boxes, masks, categories, with the data set's own ids.

    The names stay as they are below `images.root`. Other fields of the original (licences, links) are not kept. The
    file appears whole or not at all; raises OSError.
    """
    with placed(out) as file:
        every = range(len(images))
        _write(file, "images", (picture_row(images, index) for index in every), first=True)
        _write(file, "annotations", (row for index in every for row in object_rows(images, index)))
        _write(file, "categories", (category._asdict() for category in images.categories))
        file.write(b"\n}\n")


def _write(file: IO[bytes], key: str, rows: Iterator[dict[str, Any]], *, first: bool = False) -> None:
    file.write(f'{"{" if first else ","}\n"{key}": ['.encode())
    for number, row in enumerate(rows):
        file.write((",\n" if number else "\n").encode() + json.dumps(row, allow_nan=False).encode())
    file.write(b"]")


def picture_row(images: CocoImages, index: int) -> dict[str, Any]:
    """What COCO's list "images" says of this picture."""
    height, width = images.sizes[index].tolist()
    return {"id": int(images.image_ids[index]), "file_name": images.names[index], "height": height, "width": width}


def object_rows(images: CocoImages, index: int) -> Iterator[dict[str, Any]]:
    """What COCO's list "annotations" says of this picture's objects; the same is read from it again, to the bit."""
    found, size = images.objects(index), images.sizes[index].tolist()
    for at in range(len(found.ids)):
        x0, y0, x1, y1 = found.boxes[at].tolist()
        mask = found.segmentations[at]
        row = {
            "id": int(found.ids[at]),
            "image_id": int(images.image_ids[index]),
            "category_id": images.categories[found.labels[at] - 1].id,
            "bbox": [x0, y0, x1 - x0, y1 - y0],  # x0 + (x1 - x0) is x1 again: x1 was such a sum, or is whole
            "area": float(found.areas[at]),
            "iscrowd": int(found.crowd[at]),
        }
        if isinstance(mask, bytes):
            row["segmentation"] = {"size": size, "counts": mask.decode("ascii")}
        elif mask is not None:
            row["segmentation"] = [polygon.ravel().tolist() for polygon in mask]
        yield row
