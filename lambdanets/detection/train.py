"""Train a detector: a recipe and a COCO data set in, a folder with weights, numbers and pictures out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lambdanets.detection.run import Result, read_record, recipe_of, result_of
from lambdanets.detection.scores import Scores
from lambdanets.detection.source import CocoSource
from lambdanets.detection.task import Detection, check_start
from lambdanets.files import present
from lambdanets.recipes.coco import DetectionRecipe
from lambdanets.recipes.recipe import Options
from lambdanets.runs.record import RUN_JSON
from lambdanets.training import loop


def train(
    recipe: DetectionRecipe,
    data: str | Path | CocoSource,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
    resume: bool = False,
    init_from: str | Path | None = None,
    init_image_px: int | None = None,
    options: Options | None = None,
) -> Result:
    """Train `recipe` on a COCO data set and write the folder of the run (runs/folder.py lists its files).

    data           a folder in one of `layouts.LAYOUTS`, or one COCO file; or a `CocoSource`, which says more
    seed           decides first weights, order, augmentation and samples; two runs on one CPU are equal to the bit
    init_from      a run of classification or detection, or a safetensors file: see `starting.load_detector_weights`
    init_image_px  the image size that such a file was trained at
    out, device, workers, resume, options, and what it raises: as in `training.loop.train`; besides, BadData for data
    that cannot be trained on, with every reason in one table. The result of a finished run is returned.
    """
    check_start(recipe, init_from)
    source = data if isinstance(data, CocoSource) else CocoSource(data)
    task = Detection(recipe, source, workers=workers, seed=seed, init_image_px=init_image_px)
    found = loop.train(
        recipe, task, out=out, seed=seed, device=device, resume=resume, init_from=init_from, options=options
    )
    if found.scores is None:
        return result_of(found.folder, found.record)
    scores = found.scores
    assert isinstance(scores, Scores)
    return Result(found.folder, scores.box, scores.mask, scores.n, found.record["history"], found.seconds)


def recorded(folder: str | Path) -> tuple[DetectionRecipe, CocoSource, int, str | None, int | None] | None:
    """Recipe, data, seed, init_from and init_image_px of the run in a folder; None where none has begun.

    Raises BadRun, OSError.
    """
    if not present(Path(folder) / RUN_JSON):
        return None
    record = read_record(folder)
    init_from = (record.get("init_from") or {}).get("source")
    source = CocoSource.read(record["data"])
    return recipe_of(record), source, record["seed"], init_from, record.get("init_image_px")


def frozen_where_it_starts_trained(recipe: DetectionRecipe, init_from: str | Path | None) -> DetectionRecipe:
    """The recipe `detect` with the norms of what it starts from, if it starts from something."""
    if init_from is not None and recipe.name in ("detect", "detect_small") and recipe.batch_norm == "local":
        return replace(recipe, batch_norm="frozen")
    return recipe
