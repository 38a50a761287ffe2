"""The numbers of detections as rows, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lambdanets.detection.mistakes import ERROR_KINDS, Errors
from lambdanets.detection.precision import Precision, shown
from lambdanets.errors import printable, some
from lambdanets.runs.page import cut

_TABLE_CLASSES = 40  # rows that a terminal shows; all are in the JSON file
OF_KIND = {"bbox": "boxes", "segm": "masks"}
OF_LOSS = {
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_objectness": "object",
    "loss_rpn_box_reg": "anchor",
}
"""What a reader is told of the detector's losses, wherever they are printed or drawn."""
_NUMBERS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP, small (below 32² px)",
    "ap_medium": "AP, medium",
    "ap_large": "AP, large (from 96² px)",
    "ar_small": "AR, small",
    "ar_medium": "AR, medium",
    "ar_large": "AR, large",
}


def precision_rows(kinds: Sequence[Precision]) -> list[list[str]]:
    """COCO's twelve numbers: what it is, of boxes, of masks."""
    counts = [name for name in kinds[0].numbers if name.startswith("ar") and name[2:].isdecimal()]
    named = {**_NUMBERS, **{name: f"AR, {name[2:]} an image and class" for name in counts}}
    order = sorted(kinds[0].numbers, key=lambda name: name.startswith("ar"))
    return [[named[name], *(shown(kind.numbers[name]) for kind in kinds)] for name in order]


def precision_table(kinds: Sequence[Precision]) -> Iterator[str]:
    """`precision_rows` for a terminal."""
    for row in [["", *(OF_KIND[kind.kind] for kind in kinds)], *precision_rows(kinds)]:
        yield f"{row[0]:<27}" + "".join(f"  {cell:>15}" for cell in row[1:])


def class_rows(kinds: Sequence[Precision], most: int) -> tuple[list[list[str]], list[str]]:
    """Of the classes with objects name, objects, images, AP and AP50 of each kind, the worst first where they are more
    than `most`, which are left; and what there is to say besides."""
    places = [at for at, row in enumerate(kinds[0].by_class) if row.objects]
    notes = []
    if none := [row.name for row in kinds[0].by_class if not row.objects]:
        notes.append(f"no such objects: {some(none)}")
    if len(places) > most:
        notes.append(f"the {most} worst of {len(places)} classes")
        places = sorted(places, key=lambda at: kinds[-1].by_class[at].ap)[:most]
    rows = []
    for at in places:
        own = kinds[0].by_class[at]
        cells = [f"{value:.3f}" if value >= 0 else "–" for kind in kinds for value in kind.by_class[at][2:4]]
        rows.append([own.name, f"{own.objects:,}", f"{own.images:,}", *cells])
    return rows, notes


def class_heads(kinds: Sequence[Precision]) -> list[str]:
    """Of the columns of `class_rows`."""
    return [
        "class",
        "objects",
        "images",
        *(f"{OF_KIND[kind.kind]} {name}" for kind in kinds for name in ("AP", "AP50")),
    ]


def class_table(kinds: Sequence[Precision]) -> Iterator[str]:
    """The worst 40 for a terminal."""
    rows, notes = class_rows(kinds, _TABLE_CLASSES)
    rows = [[cut(printable(row[0])), *row[1:]] for row in rows]
    width = max(len("class"), *(len(row[0]) for row in rows)) if rows else 5
    for row in [class_heads(kinds), *rows]:
        yield f"{row[0]:<{width}}" + "".join(f"  {cell:>10}" for cell in row[1:])
    yield from notes


def error_rows(found: Errors) -> list[list[str]]:
    """How many of each kind, and what it is."""
    return [[f"{found.counts[kind]:,}", kind, what] for kind, what in ERROR_KINDS.items()]


def losses_said(losses: Mapping[str, float], digits: int) -> str:
    """The losses by name.

    >>> losses_said({"loss_classifier": 0.5, "loss_rpn_box_reg": 0.25}, 3)
    'class 0.500, anchor 0.250'
    """
    return ", ".join(f"{OF_LOSS[name]} {value:.{digits}f}" for name, value in losses.items())


def best_score_said(found: Errors, kind: Precision) -> str:
    """What score is best to cut at, what is found with it, and at which the errors are counted that follow."""
    of = f"({OF_KIND[kind.kind]} at IoU 0.5)"
    if not found.best_f1:
        return f"no score finds any object here {of}; the errors at --score {found.score:.2f} are"
    return (
        f"--score {found.best_score:.2f} gives the best F1 here, {found.best_f1:.3f}; with it {found.correct:,} of "
        f"{found.objects:,} objects are found {of}, and the errors are"
    )


def errors_said(found: Errors, kind: Precision) -> Iterator[str]:
    """For a terminal."""
    yield best_score_said(found, kind)
    for count, name, what in error_rows(found):
        yield f"{count:>8}  {name:<10}  {what}"
