"""Which COCO data: as it is asked for, as run.json keeps it, and which pictures a run is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lambdanets.data.source import absolute
from lambdanets.detection.check import Wishes
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.findings import Findings
from lambdanets.detection.layouts import CocoData, _sources, every_picture, open_coco
from lambdanets.errors import BadData
from lambdanets.runs.record import val_fingerprint


class CocoSource(NamedTuple):
    """Where the data lies, as `open_coco` takes it: `data`, or `annotations` and `images`; class names, and whether
    missing pictures are passed over."""

    data: str | Path | None
    annotations: str | Path | None = None
    images: str | Path | None = None
    class_names: tuple[str, ...] | None = None
    skip_missing: bool = False

    def open(self, wishes: Wishes) -> CocoData:
        return open_coco(
            self.data, annotations=self.annotations, images=self.images, class_names=self.class_names,
            wishes=wishes,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """For run.json; `read` takes it."""
        return {
            "source": absolute(str(self.data if self.data is not None else self.annotations)),
            "annotations": None if self.annotations is None else absolute(self.annotations),
            "images": None if self.images is None else absolute(self.images),
            "class_names": None if self.class_names is None else list(self.class_names),
            "skip_missing": self.skip_missing,
        }

    @classmethod
    def read(cls, held: dict[str, Any]) -> CocoSource:
        names = held.get("class_names")
        return cls(
            held["source"] if held.get("annotations") is None else None,
            held.get("annotations"),
            held.get("images"),
            None if names is None else tuple(map(str, names)),
            held.get("skip_missing", False),
        )


class Judged(NamedTuple):
    """Pictures that a run is judged by: with its classes, in its order.

    how       a sentence: which these are
    findings  what was found wrong with the data
    missing   labels of the run's classes that the data does not have
    """

    images: CocoImages
    how: str
    findings: Findings
    missing: tuple[int, ...]


def own_images(record: dict[str, Any]) -> Judged:
    """The pictures that a run held out, from where they were. Raises BadData where they have changed, DiskFault."""
    held = record["data"]
    source = CocoSource.read(held)
    images = source.open(Wishes(skip_missing=source.skip_missing)).val
    own = val_fingerprint(record)
    if len(images) != held["val_images"] or images.classes != _names(record) or own not in (None, images.fingerprint()):
        raise BadData(
            f"the held-out pictures of {held['source']} are not those of the run any more ({len(images):,} now, "
            f"{held['val_images']:,} then; or their objects are others): name the data with --data COCO"
        )
    how = f"the {len(images):,} pictures that the run held out, of {held['source']}"
    return Judged(images, how, Findings(), ())


def images_of(source: CocoSource, record: dict[str, Any]) -> Judged:
    """The pictures of other data that a run is judged by, its classes matched by name.

    What the run was trained on, known by its place or by its fingerprint: the part that it held out. Else the held-out
    part of the data where it has one; else all of its one file.
    Raises BadData for data without any class of the run, or with no object of them; DiskFault.
    """
    place, wishes, own = source.record(), Wishes(skip_missing=source.skip_missing), val_fingerprint(record)
    same_place = all(place[key] == record["data"].get(key) for key in ("source", "annotations"))
    if len(_sources(source.data, source.annotations, source.images)) == 1:
        # All of it may be what the run learnt from, and the tenth that it held out.
        try:
            val = source._replace(class_names=CocoSource.read(record["data"]).class_names).open(wishes).val
        except BadData:  # fit for no training
            if same_place:
                raise
        else:
            if val.classes == _names(record) and (same_place or val.fingerprint() == own):
                return Judged(
                    val, f"the {len(val):,} pictures of {place['source']} that the run held out", Findings(), ()
                )
    images, how, findings = every_picture(
        source.data, annotations=source.annotations, images=source.images, class_names=_names(record), wishes=wishes
    )
    if not images.n_objects:
        raise BadData(f"{how}: nothing of the classes of the run can be found there")
    missing = tuple(label for label, name in enumerate(images.classes, 1) if name not in images.listed)
    return Judged(images, how, findings, missing)


def _names(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(category["name"] for category in record["categories"])
