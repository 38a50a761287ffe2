"""A run of detection read back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambdanets.data.decode import MAX_IMAGE_PX
from lambdanets.detection.check import Category
from lambdanets.detection.detector import Detector, HeadSizes, create_detector
from lambdanets.detection.precision import RECALLS, Precision, said
from lambdanets.detection.transforms import DetectionView
from lambdanets.errors import printable
from lambdanets.files import field
from lambdanets.recipes.coco import DetectionRecipe
from lambdanets.runs import record as run_json
from lambdanets.runs.checkpoints import is_checkpoint
from lambdanets.runs.folder import CURVES, REPORT, WEIGHTS
from lambdanets.runs.record import RUN_JSON, check_number
from lambdanets.runs.weights import with_weights

NAME = "detection"  # of the task, in run.json
DETECTIONS = "detections.json"


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run.json of a run of detection; see `runs.record.read_record`. Raises BadRun where it is none."""
    row = ("val_box_ap", "val_box_ap50")
    return run_json.read_record(
        folder, task=NAME, recipe=DetectionRecipe, row=row, check=_check, check_result=_check_result
    )


def _check(held: dict[str, Any]) -> None:
    view = view_of(held)
    if view.image_px**2 > MAX_IMAGE_PX:
        raise ValueError(f"it shows an image as {view.image_px:,} pixels a side, more than {MAX_IMAGE_PX:,} in all")
    names = [category.name for category in categories_of(held)]
    if not names or len(set(names)) < len(names):
        raise ValueError("its 'categories' are none, or one of them is there twice")
    for name in ("train_images", "val_images"):
        field(held["data"], name, int)
    for name in ("annotations", "images"):
        if held["data"].get(name) is not None:
            field(held["data"], name, str)
    field(held["data"], "skip_missing", bool)
    if held.get("init_image_px") is not None:
        field(held, "init_image_px", int)
    for row in held["history"]:
        for name in row:
            if name.startswith(("train_", "val_")):
                check_number(row, name)


def _check_result(held: dict[str, Any], result: dict[str, Any]) -> None:
    field(result, "n", int)
    check_number(result, "loss")
    for loss in field(result, "losses", dict):
        check_number(result["losses"], loss)
    box, mask = field(result, "box", dict), result.get("mask")
    for kind in (box, mask):
        if kind is not None:
            _check_precision(kind, len(held["categories"]))
    if mask is not None and mask.keys() != box.keys():
        raise ValueError("its 'box' and 'mask' have not the same numbers")


def _check_precision(held: dict[str, Any], classes: int) -> None:
    """Raises ValueError or TypeError for what is not as `Precision.json` writes it."""
    most, rows = field(held, "max_detections", list), field(held, "by_class", list)
    curve = field(field(held, "curve_iou50", dict), "precision", list)
    if [type(n) for n in most] != [int] * 3 or len(rows) != classes or len(curve) != len(RECALLS):
        raise ValueError("its average precision has not three numbers of detections, a row a class and a curve")
    for point in curve:
        check_number({"curve_iou50": point}, "curve_iou50")
    names = [name for name in held if name.startswith(("ap", "ar"))]
    for of, key in [*((held, name) for name in names), *((row, key) for row in rows for key in ("ap", "ap50"))]:
        if field(of, key, (float, int, type(None))) is not None:
            check_number(of, key)
    for row in rows:
        field(row, "name", str)
        for key in ("id", "objects", "images"):
            field(row, key, int)
    if len(names) != 12:
        raise ValueError(f"its average precision has {len(names)} of COCO's twelve numbers")
    try:
        Precision.read(held)
    except KeyError as error:
        raise ValueError(f"its average precision has no {error}") from error


def recipe_of(held: dict[str, Any]) -> DetectionRecipe:
    """What the run learns."""
    return run_json.recipe_of(held, DetectionRecipe)


def view_of(held: dict[str, Any]) -> DetectionView:
    """How the run sees an image."""
    view = field(held, "view", dict)
    return DetectionView(field(view, "image_px", int), field(view, "in_channels", int), field(view, "masks", bool))


def categories_of(held: dict[str, Any]) -> tuple[Category, ...]:
    """The classes, in the order of their labels, with the ids of the data that was trained on."""
    rows: list[Any] = field(held, "categories", list)
    return tuple(Category(field(row, "id", int), field(row, "name", str)) for row in rows)


def detector_of(recipe: DetectionRecipe, *, classes: int, masks: bool) -> Detector:
    """A new detector of a recipe. Raises ValueError for an unknown name."""
    return create_detector(
        recipe.model, classes=classes, masks=masks, padding=recipe.padding, in_channels=recipe.in_channels,
        mean=recipe.mean, std=recipe.std, drop_path_rate=recipe.drop_path_rate, heads=HeadSizes(**recipe.heads),
    )  # fmt: skip


@dataclass(frozen=True)
class DetectionRun:
    """A run read back: its folder, model (eval mode, CPU), how it sees an image, classes, recipe, run.json."""

    folder: Path
    model: Detector
    view: DetectionView
    categories: tuple[Category, ...]
    recipe: DetectionRecipe
    record: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the labels."""
        return tuple(category.name for category in self.categories)


def open_run(source: str | Path) -> DetectionRun:
    """Read a run's folder, with the weights of its last finished epoch; or a checkpoint RUN/step-N, with its own.

    Raises BadRun, naming the file, where anything is missing, damaged or does not fit together.
    """
    folder = Path(os.path.abspath(source)).parent if is_checkpoint(source) else Path(source)
    record = read_record(folder)
    recipe, view, categories = recipe_of(record), view_of(record), categories_of(record)
    model = with_weights(
        Path(source),
        folder,
        lambda: detector_of(recipe, classes=len(categories), masks=view.masks),
        f"detector on {recipe.model}",
    )
    assert isinstance(model, Detector)
    return DetectionRun(folder, model, view, categories, recipe, record)


@dataclass(frozen=True)
class Result:
    """What a run came to: its folder, the last epoch's numbers on the held-out images, one dict an epoch, seconds."""

    folder: Path
    box: Precision
    mask: Precision | None
    n: int
    history: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        files = f"{WEIGHTS}, {RUN_JSON}, {DETECTIONS}, {CURVES}, {REPORT}"
        numbers = f"{said(self.box, self.mask)} on {self.n:,} held-out images after {self.seconds:.0f} s"
        return f"{numbers}\n{printable(self.folder)}: {files}"


def result_of(folder: Path, record: dict[str, Any]) -> Result:
    """Of a finished run."""
    found = record["result"]
    mask = None if found.get("mask") is None else Precision.read(found["mask"])
    return Result(folder, Precision.read(found["box"]), mask, found["n"], record["history"], found["seconds"])
