"""What a COCO file says is looked at before anything is trained on it: every case known to bite becomes a finding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lambdanets.detection.annotations import EMPTY, NO_MASK, ODD, POLYGONS, RUN_LENGTHS, SHORT, SOUND, Annotations
from lambdanets.detection.findings import Findings, Severity
from lambdanets.detection.outlines import (
    BROKEN,
    FAR_OUTSIDE,
    FINE,
    NO_AREA,
    NOT_FINITE,
    WRONG_SUM,
    Outlines,
    can_draw,
    drawn_area,
    holes,
    outline,
)
from lambdanets.detection.pictures import look_at_pictures
from lambdanets.errors import printable, some

SMALL_PX = 8
"""An object of less, as the model sees it, is lost in the first stages."""

_Array = np.ndarray[Any, Any]
_FAULTS = {
    EMPTY: "are empty",
    SHORT: "have fewer than three points",
    ODD: "have an odd number of coordinates",
    NOT_FINITE: "have a coordinate that is NaN or infinite",
    NO_AREA: "have no area",
    FAR_OUTSIDE: "lie far outside the picture",
}
_RUN_FAULTS = {
    BROKEN: ("D9", "masks whose run lengths cannot be read"),
    WRONG_SUM: ("D9", "masks whose run lengths have another sum than height x width"),
    NO_AREA: ("R76", "masks of run lengths without a pixel"),
}


_MANY = 300  # objects in a picture, from which it is said what their masks take


class Category(NamedTuple):
    """A class, with the id that the data set gives it."""

    id: int
    name: str


@dataclass(frozen=True)
class Wishes:
    """How strictly it is looked, and for what run.

    skip_missing  pictures that are not there are left out, counted; else they are an error
    all_headers   the size of every picture is compared, not of a thousand
    image_px      of the run, for objects that are too small then (D16); None: not looked at
    detections    most per picture of the run (D17); None: not looked at
    on_disk       False: the pictures lie in archives, where it was looked at them when they were packed
    decode        every picture is decoded, which takes long; one that cannot be is an error
    of_a_run      the classes are those of a run, which is judged: what else there is it never learnt
    """

    skip_missing: bool = False
    all_headers: bool = False
    image_px: int | None = None
    detections: int | None = None
    on_disk: bool = True
    decode: bool = False
    of_a_run: bool = False


class Kept(NamedTuple):
    """What of a file can be used; the columns are those of `Annotations`, an entry an object of the file.

    pictures    int64, the pictures that are used, positions in the file
    sizes       int64 (pictures of the file, 2) height, width px
    rows        int64, the objects that are used, in the file's order
    pictures_of int64: the picture of each object, a position in the file
    labels      int64, 1..len(categories)
    boxes       float64 (., 4) x0, y0, x1, y1 px, within the picture
    areas       float64 px
    ids         int64, unique
    masked      bool: the object has a mask
    faults      uint8 (polygons,): 0 for those that are used
    categories  label l is categories[l - 1]
    """

    of: Annotations
    root: Path
    pictures: _Array
    sizes: _Array
    rows: _Array
    pictures_of: _Array
    labels: _Array
    boxes: _Array
    areas: _Array
    ids: _Array
    masked: _Array
    faults: _Array
    categories: tuple[Category, ...]


def check_file(
    of: Annotations,
    root: Path,
    part: str,
    categories: tuple[Category, ...],
    findings: Findings,
    wishes: Wishes = Wishes(),  # frozen
) -> Kept:
    """Adds what is wrong with a file to `findings`; gives what is left without it.

    root        of the pictures
    part        "train" or "val", as the findings name it
    categories  those whose objects are used, in the order of the labels, with the file's own ids
    """
    return _Check(of, part, findings).kept(root, categories, wishes)


class _Check:
    def __init__(self, of: Annotations, part: str, findings: Findings) -> None:
        self.of, self.part, self.findings = of, part, findings
        self.alive = np.zeros(len(of.ids), bool)
        self.alive[of.rows] = True
        self.picture, self.known = _places(of.images, of.image_ids)

    def add(self, id: str, what: str, action: str, severity: Severity, rows: _Array, *, of: str = "objects") -> None:
        self.findings.add(id, self.part, f"{of} {what}".strip(), action, severity, len(rows), map(self.name, rows))

    def name(self, row: int) -> str:
        picture = self.of.names[self.picture[row]] if self.known[row] else f"image_id {self.of.images[row]}"
        return f"{picture} #{self.of.ids[row]}" if self.of.ids[row] >= 0 else picture

    def take(self, wrong: _Array) -> _Array:
        """Those of these objects that are still there, which they are no longer."""
        rows = self.of.rows[(wrong & self.alive)[self.of.rows]]
        self.alive[rows] = False
        return rows

    def seen(self, wrong: _Array) -> _Array:
        return self.of.rows[(wrong & self.alive)[self.of.rows]]

    def kept(self, root: Path, categories: tuple[Category, ...], wishes: Wishes) -> Kept:
        of = self.of
        where = root if wishes.on_disk else None
        usable, sizes, missing = look_at_pictures(
            of, where, self.part, self.findings, wishes.skip_missing, wishes.all_headers, wishes.decode
        )
        if wishes.skip_missing:
            self.take(self.known & missing[self.picture])
        begun = self.alive.copy()
        labels = self.labels(categories, wishes)
        if (lost := self.take(~self.known)).size:
            self.add("R78", "of a picture that the file does not list", "correct image_id", "error", lost)
        # What is wrong whatever the picture: said of pictures too that cannot be used for another reason.
        self.forms()
        ids = self.ids()
        self.take(self.known & ~usable[self.picture])
        size = np.where(self.known[:, None], sizes[self.picture], 0)
        outlines = outline(of, size)
        boxes = self.boxes(size, outlines, judged=bool(usable.any()))
        masked = self.masks(size, outlines)
        # What of a mask lies outside is not seen, nor is that of a box.
        visible = outlines._replace(bounds=np.clip(outlines.bounds, 0, size[:, [1, 0, 1, 0]].astype(float)))
        self.compare(boxes, masked, visible)
        areas = self.areas(boxes, masked, size, visible, (visible.bounds != outlines.bounds).any(axis=1))
        lost = self.lost(begun & (labels != 0)) & usable
        self.take(labels == 0)
        rows = self.seen(self.alive)
        kept = Kept(
            of, root, np.flatnonzero(usable & ~lost), sizes, rows, self.picture, labels, boxes, areas, ids, masked,
            outlines.faults, categories,
        )  # fmt: skip
        what, action = (
            "pictures that lost all their objects to rows above",
            "left out, of a copy too: they are not empty",
        )
        names = (of.names[at] for at in np.flatnonzero(lost))
        self.findings.add("R75", self.part, what, action, "dropped", int(lost.sum()), names)
        if usable.any() or not any(row.part == self.part for row in self.findings.errors):
            self.totals(kept, wishes)
        return kept

    def lost(self, wanted: _Array) -> _Array:
        """Which pictures, bool, had wanted objects that are gone, and are left without a single one."""
        n, single = len(self.of.names), self.alive & ~self.of.crowd
        gone = np.zeros(len(wanted), bool)
        gone[self.of.rows] = (wanted & ~self.alive & self.known)[self.of.rows]
        had = np.bincount(self.picture[gone], minlength=n) > 0
        found: _Array = had & (np.bincount(self.picture[single & self.known], minlength=n) == 0)
        return found

    def forms(self) -> None:
        """Boxes that are none, by themselves."""
        of = self.of
        if (odd := self.take(of.boxed & ~np.isfinite(of.boxes).all(axis=1))).size:
            self.add("R72", "with a box that is NaN or infinite", "correct or remove them", "error", odd)
        with np.errstate(invalid="ignore"):
            flat = of.boxed & (of.boxes[:, 2:] <= 0).any(axis=1)
        if (flat_rows := self.take(flat)).size:
            self.add("R71", "with a box without area", "left out", "dropped", flat_rows)

    def labels(self, categories: tuple[Category, ...], wishes: Wishes) -> _Array:
        """Label of each object, 0 where its category is left out, -1 where it is unknown: those are gone after."""
        ids = self.of.category_ids
        place, known = _places(self.of.categories, ids)
        if (lost := self.take(~known)).size:
            unknown = sorted({int(id) for id in self.of.categories[lost]})[:10]
            self.add(
                "R78", f"of categories that the file does not list {unknown}", "correct category_id", "error", lost
            )
        label_of = {category.id: label for label, category in enumerate(categories, 1)}
        label = np.array([label_of.get(int(id), 0) for id in ids], np.int64)
        labels = np.where(known, label[place], -1)
        if (others := self.seen(labels == 0)).size:
            places, times = np.unique(place[others], return_counts=True)
            order = np.argsort(-times, kind="stable")
            held = [self.of.category_names[at] for at in places[order].tolist()]
            names = [f"{name} ({n:,})" for name, n in zip(held, times[order].tolist(), strict=True)]
            what, action = f"objects of {printable(held[0])}", "left out"
            if len(held) > 1:
                what = f"objects of {len(held):,} classes that were not asked for"
            if wishes.of_a_run:
                what, action = f"objects of {printable(held[0])}, which this run never learnt", "not counted"
                if len(held) > 1:
                    what = f"objects of {len(held):,} classes that this run never learnt"
            action += other_case(held, [category.name for category in categories])
            shown = names if len(held) > 1 else ()
            self.findings.add("D1", self.part, what, action, "dropped", len(others), shown, listed=len(held))
        return labels

    def boxes(self, size: _Array, outlines: Outlines, *, judged: bool) -> _Array:
        """x0, y0, x1, y1 within the picture."""
        of, high, wide = self.of, size[:, 0].astype(float), size[:, 1].astype(float)
        if (made := self.seen(~of.boxed & np.isfinite(outlines.bounds[:, 0]))).size:
            self.add("D13", "without a box", "it is taken around the mask", "warning", made)
        if (bare := self.take(~of.boxed & ~np.isfinite(outlines.bounds[:, 0]))).size:
            self.add("R71", "without a box or a mask", "left out", "dropped", bare)
        x, y, w, h = of.boxes.T
        with np.errstate(invalid="ignore", over="ignore"):
            boxes = np.stack([x, y, x + w, y + h], axis=1)
            given = self.alive & of.boxed
            if given.any() and judged and (given & (wide > 2) & (high > 2)).any():
                unit = ((of.boxes[given] >= 0) & (of.boxes[given] <= 1)).all()
                if unit:
                    page = "see docs/detection.md, YOLO: multiply by width and height, x and y are the corner's"
                    what = "with a box within 0..1, as all are: normalised, not pixels"
                    self.add("D5", what, page, "error", self.seen(given))
                over = given & (size[:, 0] > 0) & ((boxes[:, 2] > wide + 1) | (boxes[:, 3] > high + 1))
                corners = (w > x) & (h > y) & (w <= wide + 1) & (h <= high + 1) & (x >= 0) & (y >= 0)
                if over.sum() > 0.05 * given.sum() and corners[given].all():
                    what = "with a box over the edge as x, y, width, height, and none as x0, y0, x1, y1"
                    self.add("D4", what, "write width and height, not the second corner", "error", self.seen(over))
        boxes = np.where(of.boxed[:, None], boxes, outlines.bounds)
        edge = np.stack([wide, high, wide, high], axis=1)
        with np.errstate(invalid="ignore"):
            clipped = np.clip(boxes, 0, edge)
            sides, before = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
            outside = self.alive & (np.abs(boxes - clipped) > 1).any(axis=1)
            gone = ((sides < 1) & (sides < before)).any(axis=1) | (sides <= 0).any(axis=1)
        if (lost := self.take(gone)).size:
            self.add("R73", "with less than 1 px of their box within the picture", "left out", "dropped", lost)
        if (cut := self.seen(outside)).size:
            self.add("R73", "with a box over the edge of the picture", "clipped", "warning", cut)
        return clipped

    def masks(self, size: _Array, outlines: Outlines) -> _Array:
        """Which objects have a mask that can be used."""
        of, n = self.of, len(self.of.ids)
        owner = np.repeat(np.arange(n), np.diff(of.polygon_starts))
        there = self.alive[owner]
        for fault, what in _FAULTS.items():
            wrong = owner[there & (outlines.faults == fault)]
            self.add("R76", f"that {what}", "the polygon is left out", "dropped", wrong, of="polygons")
        for fault, (id, what) in _RUN_FAULTS.items():
            wrong = self.seen(outlines.run_faults == fault)
            self.add(id, what, "the mask is left out, the box stays", "dropped", wrong, of="")
        runs = of.kinds == RUN_LENGTHS
        other = self.take(runs & (outlines.run_faults == FINE) & (of.run_sizes != size).any(axis=1))
        self.add("R79", "with run lengths of another size than their picture", "correct one of the two", "error", other)
        self.add(
            "D7", "with one flat list of numbers as polygons", "read as one polygon", "warning", self.seen(of.flat)
        )
        polygons = (of.kinds == POLYGONS) & (np.bincount(owner[outlines.faults == SOUND], minlength=n) > 0)
        masked = polygons | (runs & (outlines.run_faults == FINE))
        bare = self.seen(of.kinds == NO_MASK)
        if bare.size == self.alive.sum():
            self.add("D6", "and none with a mask", "boxes alone can be learnt (--boxes-only)", "warning", bare)
        else:
            self.add("D6", "without a mask", "no mask loss for them", "warning", bare)
        nested = np.array(holes(of, outlines, self.seen(polygons)), np.int64)
        what = "with a polygon inside another, maybe meant as a hole"
        self.add("D10", what, "both are filled; a hole needs run lengths (RLE)", "warning", nested)
        self.add("R74", "that are crowds", "not trained on, ignored in AP", "warning", self.seen(of.crowd))
        crowds = self.seen(of.crowd & (of.kinds == POLYGONS))
        if crowds.size > 0.2 * self.alive.sum():
            what = "with iscrowd 1 and polygons, as some tools write for all"
            self.add("D11", what, "not trained on; write iscrowd 0 for single objects", "warning", crowds)
        return masked

    def compare(self, boxes: _Array, masked: _Array, outlines: Outlines) -> None:
        both = self.alive & masked & self.of.boxed
        with np.errstate(invalid="ignore"):
            low, high = (
                np.maximum(boxes[:, :2], outlines.bounds[:, :2]),
                np.minimum(boxes[:, 2:], outlines.bounds[:, 2:]),
            )
            common = np.clip(high - low, 0, None).prod(axis=1)
            own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            union = own + (outlines.bounds[:, 2:] - outlines.bounds[:, :2]).prod(axis=1) - common
            apart = both & (common < 0.5 * union)
        what = "whose box and mask disagree (IoU of the boxes below 0.5)"
        self.add("D8", what, "training takes the box around the mask", "warning", self.seen(apart))

    def areas(self, boxes: _Array, masked: _Array, size: _Array, outlines: Outlines, cut: _Array) -> _Array:
        """Of each object px; `cut` says whose mask goes over the edge of the picture."""
        given, of_box = self.of.areas, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        area = np.where(masked, outlines.areas, of_box)
        missing = ~np.isfinite(given) | (given <= 0)
        with np.errstate(invalid="ignore"):
            wrong = missing | _apart(given, area, masked)
        visible = (outlines.bounds[:, 2:] - outlines.bounds[:, :2]).prod(axis=1)
        with np.errstate(invalid="ignore"):
            # Where nothing is given, all of a file's objects may be meant: one polygon that fills its box is plain.
            plain = (np.diff(self.of.polygon_starts) == 1) & ~cut & (area > 0.3 * visible) & (area <= visible)
        doubtful = self.seen(wrong & masked & (self.of.kinds == POLYGONS) & ~(missing & plain))
        if doubtful.size and can_draw():
            for row in doubtful.tolist():
                polygons = np.arange(self.of.polygon_starts[row], self.of.polygon_starts[row + 1])
                area[row] = drawn_area(self.of, polygons[outlines.faults[polygons] == SOUND], *size[row].tolist())
            wrong[doubtful] = missing[doubtful] | _apart(given[doubtful], area[doubtful], masked[doubtful])
        elif doubtful.size:
            area[doubtful] = np.minimum(area[doubtful], visible[doubtful])
            wrong[doubtful] = missing[doubtful]
            action = "left as it is given; pip install 'lambdanets[detection]' and they are drawn and judged"
            what = "whose area is not that of the corners of its polygons"
            self.add("D13", what, action, "warning", doubtful[~missing[doubtful]])
        what, action = "whose area is missing, or wrong by more than 2x", "computed from the mask, else the box"
        self.add("D13", what, action, "warning", self.seen(wrong))
        return np.where(wrong, area, given)

    def ids(self) -> _Array:
        """Unique ids, above 0."""
        ids = self.of.ids.copy()
        absent = self.seen(ids <= 0)  # 0 is "unmatched" to pycocotools
        self.add("D14", "without an id above 0", "ids are made", "warning", absent)
        here = self.seen(ids > 0)
        order = here[np.argsort(ids[here], kind="stable")]
        again = np.sort(order[1:][ids[order[1:]] == ids[order[:-1]]])
        self.add("R77", "whose id another object has", "give each its own id", "error", again)
        if self.of.texts:
            what = "ids that are written as text"
            self.findings.add("D14", self.part, what, "read as numbers", "warning", self.of.texts)
        new = np.concatenate([absent, again])
        ids[new] = max(0, int(ids[here].max(initial=0))) + 1 + np.arange(len(new))
        return ids

    def totals(self, kept: Kept, wishes: Wishes) -> None:
        of, add, part = self.of, self.findings.add, self.part
        single = kept.rows[~of.crowd[kept.rows]]
        counts = np.bincount(kept.pictures_of[single], minlength=len(of.names))
        without = kept.pictures[counts[kept.pictures] == 0]
        if not single.size:
            if part == "val":
                what, action = "pictures, and no object to find", "AP is -1 by definition: hold out some objects"
                add("D18", part, what, action, "error", len(of.names))
            else:
                what, action = "pictures, and no object to train on", "annotate some, or see the rows here"
                add("R75", part, what, action, "error", len(of.names))
        else:
            names = (of.names[at] for at in without)
            add(
                "R75",
                part,
                "pictures without objects",
                "kept: nothing is to be found there",
                "warning",
                len(without),
                names,
            )
        used = np.bincount(kept.labels[single], minlength=len(kept.categories) + 1)[1:] > 0
        idle = [category.name for category, has in zip(kept.categories, used, strict=True) if not has]
        if single.size:
            action = "kept; no part of the mean AP"
            if not wishes.of_a_run:
                action += "; --class-names FILE leaves them out"
            add("D2", part, "categories without objects", action, "warning", len(idle), idle)
        if wishes.image_px and single.size:
            self.small(kept, single, wishes.image_px)
        if wishes.detections:
            many = kept.pictures[counts[kept.pictures] > wishes.detections]
            what, names = f"pictures with more than {wishes.detections:,} objects", (of.names[at] for at in many)
            action = f"AR is capped there: --detections {int(counts.max())} finds them all"
            add("D17", part, what, action, "warning", len(many), names)
        if part != "val":
            crowded = kept.pictures[counts[kept.pictures] > _MANY]
            what, names = f"pictures with more than {_MANY} objects", (of.names[at] for at in crowded)
            action = "a step holds a mask of each at the size of the image: mind the memory"
            add("D17", part, what, action, "warning", len(crowded), names)

    def small(self, kept: Kept, single: _Array, image_px: int) -> None:
        boxes = kept.boxes[single]
        long_side = kept.sizes[kept.pictures_of[single]].max(axis=1)
        side = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) / long_side
        tiny = single[side * image_px < SMALL_PX]
        action = "they are hardly found"
        if tiny.size > 0.3 * single.size:
            wanted = -(-SMALL_PX / float(np.quantile(side, 0.3)) // 64) * 64
            action = f"over 30 %: --image-px {wanted:.0f} leaves 30 %, or cut the pictures into tiles"
        self.add("D16", f"of less than {SMALL_PX} px at --image-px {image_px}", action, "warning", tiny)


def _apart(given: _Array, area: _Array, masked: _Array) -> _Array:
    """Which areas are wrong by more than 2x; of a box alone the object may cover little."""
    return ((given > 2 * area) & (given - area > 4)) | (masked & (given < area / 2) & (area - given > 4))


def _places(of: _Array, ids: _Array) -> tuple[_Array, _Array]:
    """Where each number stands in `ids`, the first such place, and whether it does."""
    order = np.argsort(ids, kind="stable")
    place = order[np.minimum(np.searchsorted(ids[order], of), len(ids) - 1)]
    return place, ids[place] == of


def check_names(of: Annotations, part: str, findings: Findings) -> None:
    """The categories of a file by themselves: an id or a name that comes twice is an error (D3)."""
    for what, held in (("ids", of.category_ids.tolist()), ("names", of.category_names)):
        again = _twice(held)
        findings.add(
            "D3", part, f"category {what} that come twice", "each category needs its own", "error", len(again), again
        )
    spelt: dict[str, list[str]] = {}
    for name in dict.fromkeys(of.category_names):
        spelt.setdefault(name.casefold(), []).append(name)
    alike = [" = ".join(names) for names in spelt.values() if len(names) > 1]
    what, action = "category names that differ in letter case alone", "taken for different classes"
    findings.add("D3", part, what, action, "warning", sum(map(len, spelt.values())) - len(spelt), alike,
                 listed=len(alike))  # fmt: skip


def other_case(asked: Iterable[str], held: Iterable[str]) -> str:
    """A hint, where names that were asked for are held in other letter case.

    >>> other_case(["disc", "box"], ["Disc"])
    '; in other letter case: Disc'
    """
    wanted = {name.casefold() for name in asked}
    found = [name for name in held if name.casefold() in wanted]
    return f"; in other letter case: {some(found)}" if found else ""


def _twice(held: Iterable[Any]) -> list[Any]:
    seen: dict[Any, int] = {}
    for one in held:
        seen[one] = seen.get(one, 0) + 1
    return [one for one, times in seen.items() if times > 1]
