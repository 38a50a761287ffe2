"""A run of classification read back."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from lambdanets.classification.scores import Confusion, Scores
from lambdanets.data.decode import MAX_IMAGE_PX
from lambdanets.data.transforms import View
from lambdanets.errors import printable
from lambdanets.files import field
from lambdanets.models.create import create_model
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.recipes.recipe import Recipe
from lambdanets.runs import record as run_json
from lambdanets.runs.checkpoints import is_checkpoint
from lambdanets.runs.folder import CURVES, REPORT, WEIGHTS
from lambdanets.runs.record import RUN_JSON, check_number, check_types, strings
from lambdanets.runs.weights import with_weights

NAME = "classification"  # of the task, in run.json


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run.json of a run of classification; see `runs.record.read_record`. Raises BadRun where it is none."""
    row = ("train_top1_frac", "val_top1_frac")
    return run_json.read_record(folder, task=NAME, recipe=Recipe, row=row, check=_check, check_result=_check_result)


def _check(held: dict[str, Any]) -> None:
    side = view_of(held).image_px
    if side**2 > MAX_IMAGE_PX:
        raise ValueError(f"it shows an image as {side:,} x {side:,} pixels, more than {MAX_IMAGE_PX:,}")
    classes = strings(held, "classes")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError("its 'classes' are none, or one of them is there twice")
    field(held["data"], "val_images", int)
    if "pseudo" in held["data"]:
        _check_pseudo(field(held["data"], "pseudo", dict))
        for row in held["history"]:
            for name in ("loss_labelled", "loss_pseudo", "pseudo_agree_frac", "predicted_classes"):
                check_number(row, name)


def _check_pseudo(held: dict[str, Any]) -> None:
    """What a run says of the pictures that a teacher labelled for it."""
    check_types(held, Mixture)
    for one in fields(Mixture):
        field(held, one.name, (str, float))
    for name in ("source", "pictures", "fingerprint"):
        field(held, name, str)
    for name in ("rows", "draws"):
        field(held, name, int)
    field(held, "held_out_pictures_excluded", bool)


def _check_result(held: dict[str, Any], result: dict[str, Any]) -> None:
    field(result, "n", int)
    for name in ("top1_frac", "loss"):
        check_number(result, name)
    if result.get("top5_frac") is not None:
        check_number(result, "top5_frac")
    Confusion.read(field(result, "confusion", (dict, list)), len(held["classes"]))


def recipe_of(held: dict[str, Any]) -> Recipe:
    """What the run learns."""
    return run_json.recipe_of(held, Recipe)


def view_of(held: dict[str, Any]) -> View:
    """How the run sees an image."""
    view = field(held, "view", dict)
    check_types(view, View)
    return View(**view)


@dataclass(frozen=True)
class Run:
    """A run read back: its folder, model (eval mode, CPU), how it sees an image, classes, run.json."""

    folder: Path
    model: nn.Module
    view: View
    classes: tuple[str, ...]
    record: dict[str, Any]


def open_run(source: str | Path) -> Run:
    """Read a run's folder, with the weights of its last finished epoch; or a checkpoint RUN/step-N, with its own.

    Raises BadRun, naming the file, where anything is missing, damaged or does not fit together.
    """
    folder = Path(os.path.abspath(source)).parent if is_checkpoint(source) else Path(source)
    record = read_record(folder)
    recipe, view, classes = recipe_of(record), view_of(record), tuple(record["classes"])
    model = with_weights(
        Path(source),
        folder,
        lambda: create_model(recipe.model, num_classes=len(classes), in_channels=recipe.in_channels),
        recipe.model,
    )
    return Run(folder, model, view, classes, record)


@dataclass(frozen=True)
class Result:
    """What a run came to: its folder, the last epoch's scores on the held-out images, one dict an epoch, seconds."""

    folder: Path
    scores: Scores
    history: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        files = f"{WEIGHTS}, {RUN_JSON}, {CURVES}, {REPORT}"
        return f"{self.scores} after {self.seconds:.0f} s\n{printable(self.folder)}: {files}"


def result_of(folder: Path, record: dict[str, Any]) -> Result:
    found = record["result"]
    top5 = found["top5_frac"]
    confusion = Confusion.read(found["confusion"], len(record["classes"]))
    scores = Scores(found["n"], found["top1_frac"], top5, found["loss"], confusion, ids=[], predicted=[])
    return Result(folder, scores, record["history"], found["seconds"])
