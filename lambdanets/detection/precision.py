"""How good detections are: COCO's average precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from lambdanets.errors import BadData, need, printable, some

Floats = np.ndarray[Any, np.dtype[np.float64]]
Whole = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["bbox", "segm"]

RECALLS = tuple(i / 100 for i in range(101))
"""Where the precision-recall curve is given."""


class Truth(Protocol):
    """What is asked of a set of pictures with objects, a `CocoImages`."""

    @property
    def categories(self) -> Sequence[Any]: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def image_ids(self) -> Whole: ...
    @property
    def sizes(self) -> np.ndarray[Any, Any]: ...
    def objects(self, index: int, /) -> Any: ...


class Detected(NamedTuple):
    """What was found in one picture."""

    image_id: int
    boxes: Floats
    """(n, 4) x0, y0, x1, y1 in pixels of the original picture."""
    labels: Whole
    """(n,) 1..len(categories)"""
    scores: Floats
    """(n,) 0..1"""
    masks: list[bytes] | None = None
    """Compressed run lengths at the size of the original picture."""


class OfClass(NamedTuple):
    """One class: -1 where it has no objects."""

    name: str
    id: int
    ap: float
    ap50: float
    objects: int
    images: int


@dataclass(frozen=True)
class Precision:
    """COCO's numbers; -1, as in pycocotools, where there are no such objects.

    kind            "bbox" or "segm"
    max_detections  an image and class, of highest score; 100 is COCO's
    numbers         ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100, ar_small, ar_medium, ar_large; of
                    another max_detections, 300 say, ar300 in place of ar100, and all but ar1 and ar10 are at 300
    by_class        in the order of the labels; crowds are no objects
    curve           precision at each of `RECALLS`, at IoU 0.5, the mean of the classes that have objects
    """

    kind: Kind
    max_detections: int
    numbers: Mapping[str, float]
    by_class: tuple[OfClass, ...]
    curve: tuple[float, ...]

    @property
    def ap(self) -> float:
        """Mean over classes and IoU 0.50, 0.55 ... 0.95."""
        return self.numbers["ap"]

    @property
    def ap50(self) -> float:
        """Mean over classes at IoU 0.50."""
        return self.numbers["ap50"]

    def json(self) -> dict[str, Any]:
        """As JSON: null where there are no such objects."""
        return {
            "kind": self.kind,
            "max_detections": [1, 10, self.max_detections],
            **{name: _known(value) for name, value in self.numbers.items()},
            "by_class": [row._asdict() | {"ap": _known(row.ap), "ap50": _known(row.ap50)} for row in self.by_class],
            "curve_iou50": {"recall": list(RECALLS), "precision": list(self.curve)},
        }

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> Precision:
        """What `json` gave, or a file with it. Raises ValueError, KeyError or TypeError for anything else."""
        most = int(held["max_detections"][2])
        names = [name for name in held if name.startswith(("ap", "ar"))]
        if not {"ap", "ap50", "ap75"} <= set(names) or held["kind"] not in ("bbox", "segm"):
            raise ValueError("it has no 'kind', 'ap', 'ap50' and 'ap75' of average precision")
        numbers = {name: -1.0 if held[name] is None else float(held[name]) for name in names}
        rows: list[dict[str, Any]] = [
            {name: -1.0 if value is None else value for name, value in row.items()} for row in held["by_class"]
        ]
        curve = tuple(float(value) for value in held["curve_iou50"]["precision"])
        return cls(held["kind"], most, numbers, tuple(OfClass(**row) for row in rows), curve)


def _known(value: float) -> float | None:
    return None if value < 0 else value


def shown(value: float | None) -> str:
    """One of COCO's numbers, for a person.

    >>> shown(0.4263), shown(-1)
    ('0.426', 'no such objects')
    """
    return "no such objects" if value is None or value < 0 else f"{value:.3f}"


def said(box: Precision, mask: Precision | None) -> str:
    """The numbers that a line has room for."""
    text = f"box AP {box.ap:.3f}, AP50 {box.ap50:.3f}"
    return text if mask is None else f"{text}; mask AP {mask.ap:.3f}, AP50 {mask.ap50:.3f}"


def average_precision(
    images: Truth, detected: Sequence[Detected], kind: Kind = "bbox", max_detections: int = 100
) -> Precision:
    """COCO's average precision of all images of a set; an image that nothing was detected in may be left out.

    Objects are small below 32² px of mask area, large from 96² px on. A detection of a mask has the area of the mask,
    as in torchvision and detectron2, and not that of its box. An object without a segmentation is no object to find
    where kind is "segm": what is detected in its box counts neither for nor against.
    Raises BadData for a set without objects, of which AP is not defined; ValueError for detections of an image or a
    class that the set has not, of one image twice, of shapes that do not fit, and for max_detections up to 10 (fewer
    detections than 100 are no reason for another number: those there are have the same AP).
    """
    if max_detections <= 10:
        raise ValueError(f"max_detections={max_detections}: more than 10 are needed; for fewer detections leave it")
    need("faster_coco_eval", "detection", "it computes COCO's average precision")
    from faster_coco_eval import COCO, COCOeval_faster

    check_detected(images, detected, kind)
    truth, objects, pictures = _truth(images, kind)
    found = COCO(truth, print_function=_silent)
    numbered = _numbers(images)
    results = [{**one, "image_id": numbered[one["image_id"]]} for one in _results(images, detected, kind)]
    evaluation = COCOeval_faster(found, found.loadRes(results), kind, print_function=_silent)
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

    numbers = {
        "ap": _mean(precision[..., 0, 2]),
        "ap50": _mean(precision[0, ..., 0, 2]),
        "ap75": _mean(precision[5, ..., 0, 2]),
    }
    sizes = ("small", "medium", "large")
    numbers |= {f"ap_{size}": _mean(precision[..., area, 2]) for area, size in enumerate(sizes, 1)}
    numbers |= {f"ar{most}": _mean(recall[..., 0, m]) for m, most in enumerate((1, 10, max_detections))}
    numbers |= {f"ar_{size}": _mean(recall[..., area, 2]) for area, size in enumerate(sizes, 1)}
    by_class = tuple(
        OfClass(
            category.name,
            category.id,
            _mean(precision[:, :, label, 0, 2]),
            _mean(precision[0, :, label, 0, 2]),
            objects[label + 1],
            pictures[label + 1],
        )
        for label, category in enumerate(images.categories)
    )
    at50 = precision[0, :, :, 0, 2]
    curve = tuple(at50[:, (at50 > -1).all(0)].mean(1).tolist())
    return Precision(kind, max_detections, numbers, by_class, curve)


def detections_json(images: Truth, detected: Sequence[Detected], kind: Kind | None = None) -> list[dict[str, Any]]:
    """The detections in COCO's result format, with the data's own ids, by image id, then from the highest score.

    kind  "bbox" or "segm": the official format of one, of which pycocotools gives the numbers of `average_precision`;
          None: both in one list. Of that pycocotools gives the same numbers for boxes, and for masks all but those of
          one size: where it sees a box it takes a detection's area from there.

    Nothing is rounded, since rounding makes ties of unequal scores and moves boxes over a threshold.
    Raises ValueError as `average_precision` does.
    """
    check_detected(images, detected, kind or "bbox")
    results = _results(images, detected, kind)
    for result in results:
        result["category_id"] = int(images.categories[result["category_id"] - 1].id)
        if "segmentation" in result:
            mask = result["segmentation"]
            result["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
    return results


def check_detected(images: Truth, detected: Sequence[Detected], kind: Kind) -> None:
    """Raises ValueError, which names them, for detections that are none of this set or whose shapes do not fit."""
    known = set(images.image_ids.tolist())
    times = Counter(int(one.image_id) for one in detected)
    if strange := [i for i in times if i not in known]:
        raise ValueError(
            f"{len(strange):,} image ids with detections are not in the set: {some(strange)} (its ids are "
            f"{some(images.image_ids.tolist(), 3)}): are the detections those of these pictures?"
        )
    if twice := [i for i, n in times.items() if n > 1]:
        raise ValueError(f"{len(twice):,} images have their detections twice: {some(twice)}")
    last = len(images.categories)
    for one in detected:
        n = len(one.labels)
        if one.boxes.shape != (n, 4) or one.scores.shape != (n,) or (one.masks is not None and len(one.masks) != n):
            masks = "no" if one.masks is None else f"{len(one.masks)}"
            raise ValueError(
                f"image id {one.image_id}: {n} labels, boxes {one.boxes.shape}, scores {one.scores.shape} and "
                f"{masks} masks are not of one length"
            )
        if (wrong := one.labels[(one.labels < 1) | (one.labels > last)]).size:
            names = some([category.name for category in images.categories])
            raise ValueError(
                f"image id {one.image_id}: labels {some(sorted(set(wrong.tolist())))} are no classes of the set: 1 to "
                f"{last} are {names}"
            )
        if not (np.isfinite(one.scores).all() and np.isfinite(one.boxes).all()):
            raise ValueError(f"image id {one.image_id}: a score or a box is not finite")
        if kind == "segm" and one.masks is None and n:
            raise ValueError(f"image id {one.image_id}: {n} detections have no masks: ask for kind='bbox'")


def _silent(*said: object) -> None:
    pass


def _mean(values: Floats) -> float:
    """Of those that are defined, as COCO has it."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _xywh(boxes: Floats) -> Floats:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)


class _Wanted(NamedTuple):
    """The objects of one picture in the library's form; those to pass over have crowd set."""

    labels: Whole
    crowd: np.ndarray[Any, np.dtype[np.bool_]]
    areas: Floats
    boxes: Floats
    shapes: list[Any]
    """Run lengths where kind is "segm", else boxes x, y, width, height."""


def _wanted(images: Truth, index: int, kind: Kind) -> _Wanted:
    objects = images.objects(index)
    boxes, crowd = _xywh(objects.boxes), np.array(objects.crowd, bool)
    if kind == "bbox":
        return _Wanted(objects.labels, crowd, objects.areas, boxes, boxes.tolist())
    from faster_coco_eval.core import mask

    size, shapes = [int(side) for side in images.sizes[index]], []
    for i, given in enumerate(objects.segmentations):
        if isinstance(given, bytes):
            shapes.append({"size": size, "counts": given})
            continue
        if given is None:
            crowd[i] = True
        x0, y0, x1, y1 = objects.boxes[i].tolist()
        polygons = [[x0, y0, x1, y0, x1, y1, x0, y1]] if given is None else [p.ravel().tolist() for p in given]
        shapes.append(mask.merge(mask.frPyObjects(polygons, *size)))
    return _Wanted(objects.labels, crowd, objects.areas, boxes, shapes)


def _numbers(images: Truth) -> dict[int, int]:
    """The library's number of each image id, since it takes no id below 0; in their order, which decides ties."""
    return {image_id: number for number, image_id in enumerate(sorted(images.image_ids.tolist()), 1)}


def _truth(images: Truth, kind: Kind) -> tuple[dict[str, Any], Counter[int], Counter[int]]:
    """The set as the library reads it, with labels for category ids; and how many objects and images a label has."""
    annotations: list[dict[str, Any]] = []
    objects: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    ids, numbers = images.image_ids.tolist(), _numbers(images)
    for index, image_id in enumerate(ids):
        wanted = _wanted(images, index, kind)
        labels = wanted.labels.tolist()
        counted = Counter(label for label, crowd in zip(labels, wanted.crowd, strict=True) if not crowd)
        objects.update(counted)
        pictures.update(counted.keys())
        for label, crowd, area, box, shape in zip(
            labels, wanted.crowd.tolist(), wanted.areas.tolist(), wanted.boxes.tolist(), wanted.shapes, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # the data's own may be 0, which the library reads as no match
                    "image_id": numbers[image_id],
                    "category_id": label,
                    "iscrowd": int(crowd),
                    "area": area,
                    "bbox": box,
                    **({"segmentation": shape} if kind == "segm" else {}),
                }
            )
    if not objects:
        what = "no object" if kind == "bbox" else "no object with a mask"
        raise BadData(
            f"{len(images.image_ids):,} images have {what} of the classes {some([c.name for c in images.categories])}"
            f" (crowds are none): average precision is not defined without. Are these the annotations of these "
            f"pictures ({some(images.names, 3)})?"
        )
    sizes = zip(ids, images.sizes.tolist(), strict=True)
    pictures_json = [{"id": numbers[id], "height": size[0], "width": size[1]} for id, size in sizes]
    categories = [{"id": label, "name": printable(c.name)} for label, c in enumerate(images.categories, 1)]
    return {"images": pictures_json, "annotations": annotations, "categories": categories}, objects, pictures


def _results(images: Truth, detected: Sequence[Detected], kind: Kind | None) -> list[dict[str, Any]]:
    """In COCO's result format, but with labels for category ids."""
    size_of = dict(zip(images.image_ids.tolist(), images.sizes.tolist(), strict=True))
    results = []
    for one in sorted(detected, key=lambda one: int(one.image_id)):
        image_id, boxes = int(one.image_id), _xywh(np.asarray(one.boxes, np.float64)).tolist()
        size = [int(side) for side in size_of[image_id]]
        for i in np.argsort(-one.scores, kind="stable").tolist():
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(one.labels[i]),
                "score": float(one.scores[i]),
            }
            if kind != "segm":
                result["bbox"] = boxes[i]
            if kind != "bbox" and one.masks is not None:
                result["segmentation"] = {"size": size, "counts": one.masks[i]}
            results.append(result)
    return results


# ---- errors
