"""The model that labels: a run of this project, or any model of timm with its weights in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from lambdanets.classification.run import open_run
from lambdanets.data.pack import class_names
from lambdanets.data.transforms import View
from lambdanets.errors import BadRun, printable, some
from lambdanets.files import open_file
from lambdanets.models import create
from lambdanets.models.fuse import fuse
from lambdanets.runs.weights import Weights, weights_file

TIMM = "timm:"
_TIMM_BATCH_IMAGES = 64  # where no recipe says how many fit


@dataclass(frozen=True)
class Teacher:
    """A model that labels pictures.

    model         fused, in evaluation, on the CPU, float32: (b, C, H, W) -> (b, classes) logits
    view          how it sees a picture; a student has its own
    classes       names; a label is a position here
    batch_images  as many pictures as its recipe evaluates at once
    place         what was asked for; a folder or file in it is absolute
    plan          what decides its labels, as JSON: {source, weights_sha256, model, view, classes}
    """

    model: nn.Module
    view: View
    classes: tuple[str, ...]
    batch_images: int
    place: str
    plan: dict[str, Any]


def open_teacher(source: str | Path, *, classes_file: str | Path | None = None) -> Teacher:
    """Reads a teacher's weights, of a run the running average, and fuses the model for inference.

    source        RUN, RUN/step-N, or timm:NAME@WEIGHTS.safetensors, whose view is that of timm's pretrained_cfg
    classes_file  of a model of timm: a text file with a name a line, in the order of its outputs
    Raises BadRun where anything is missing, damaged or does not fit together; BadData for the file of classes.
    """
    text = os.fspath(source)
    if text.startswith(TIMM):
        return _of_timm(text, classes_file)
    if classes_file is not None:
        raise BadRun(f"--classes {classes_file}: a run has its own classes, and {source} is one: leave it out")
    run = open_run(source)
    recipe = run.record["recipe"]
    plan = {"source": "run", "weights_sha256": _sha256(weights_file(Path(source))), "model": recipe["model"]}
    return _teacher(run.model, run.view, run.classes, recipe["eval_batch_images"], os.path.abspath(source), plan)


def _teacher(
    model: nn.Module, view: View, classes: tuple[str, ...], batch_images: int, place: str, plan: dict[str, Any]
) -> Teacher:
    seen = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(view).items()}  # as in JSON
    plan = {**plan, "view": seen, "classes": list(classes)}
    return Teacher(fuse(model.eval()), view, classes, batch_images, place, plan)


def _of_timm(text: str, classes_file: str | Path | None) -> Teacher:
    name, at, file = text.removeprefix(TIMM).partition("@")
    if not (name and at and file):
        raise BadRun(f"{printable(text)} does not say which weights: give timm:NAME@WEIGHTS.safetensors")
    if not timm.is_model(name):
        near = create.PUBLIC + tuple(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:8])
        raise BadRun(f"timm has no model {printable(name)!r}; it has {some(near)}: see timm.list_models()")
    if classes_file is None:
        remedy = "give them with --classes FILE, a name a line in the order of its outputs"
        raise BadRun(f"{printable(text)}: a file of weights does not say what its classes are called: {remedy}")
    classes = class_names(Path(classes_file))
    with Weights(file) as found:
        model = timm.create_model(name, pretrained=False, num_classes=len(classes))
        if (why := found.misfit(model)) is not None:
            remedy = f"with {len(classes):,} classes, as {classes_file} has"
            raise BadRun(f"{found.file} is not the weights of timm's {name} {remedy}: {why}")
        model.load_state_dict(found.read(), strict=False)  # a counter of batches may be missing, `misfit` says
    plan = {"source": "timm", "weights_sha256": _sha256(Path(file)), "model": name}
    place = f"{TIMM}{name}@{os.path.abspath(file)}"
    return _teacher(
        model, _view_of(name, cast("dict[str, Any]", model.pretrained_cfg)), classes, _TIMM_BATCH_IMAGES, place, plan
    )


def _view_of(name: str, told: dict[str, Any]) -> View:
    """The view that timm's pretrained_cfg tells of. Raises BadRun for one that this project has not."""
    channels, height, width = told["input_size"]
    crop, filter_ = told.get("crop_mode") or "center", told["interpolation"]
    if height != width or crop != "center" or filter_ not in ("bilinear", "bicubic") or channels not in (1, 3):
        found = f"{channels} x {height} x {width}, crop_mode {crop!r}, interpolation {filter_!r}"
        raise BadRun(f"timm's {name} sees a picture as {found}: here a teacher sees a square from its centre")
    mean, std = (cast("tuple[float, ...]", tuple(told[of])) for of in ("mean", "std"))
    return View(height, channels, mean, std, told["crop_pct"], filter_)


def _sha256(file: Path) -> str:
    try:
        with open_file(file) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    except OSError as error:
        raise BadRun(f"{file} cannot be read: {error.strerror or error}") from error
