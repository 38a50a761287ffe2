"""Train on labelled images: a recipe and images in, a folder with weights, numbers and pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lambdanets.classification.run import Result, read_record, recipe_of, result_of
from lambdanets.classification.scores import Scores
from lambdanets.classification.task import Classification
from lambdanets.data.archive import check_source
from lambdanets.data.source import DIGITS
from lambdanets.files import present
from lambdanets.recipes.recipe import Options, Recipe
from lambdanets.runs.record import RUN_JSON
from lambdanets.training import loop


def train(
    recipe: Recipe,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
    resume: bool = False,
    init_from: str | Path | None = None,
    options: Options | None = None,
    allow_sources: Sequence[str] = (),
) -> Result:
    """Train `recipe` on the images and write the folder of the run (runs/folder.py lists its files).

    data      a folder of images, as `lambdanets.data.folder` reads it; None: scikit-learn's digits
    seed      decides first weights, order, augmentation and dropout; two runs on one CPU are equal to the bit
    workers   processes that read images, for each process that trains; 0: itself. They change the speed, never the run
    allow_sources   URLs that a manifest of shards may name besides `data` (see `shards.open_shards`)
    out, device, resume, init_from, options, and what it raises: as in `training.loop.train`; besides, BadData and
    BadImage for images that cannot be trained on. The result of a run that is finished already is returned.
    """
    task = Classification(recipe, data, workers=workers, seed=seed, allow_sources=allow_sources)
    return run_task(
        recipe, task, out=out, seed=seed, device=device, resume=resume, init_from=init_from, options=options
    )


def run_task(
    recipe: Recipe,
    task: Classification,
    *,
    out: str | Path | None,
    seed: int,
    device: str,
    resume: bool,
    init_from: str | Path | None,
    options: Options | None,
) -> Result:
    """What `train` does with its task, and with one that is learnt from more than labelled images."""
    found = loop.train(
        recipe, task, out=out, seed=seed, device=device, resume=resume, init_from=init_from, options=options
    )
    if found.scores is None:
        return result_of(found.folder, found.record)
    assert isinstance(found.scores, Scores)
    return Result(found.folder, found.scores, found.record["history"], found.seconds)


def recorded(
    folder: str | Path, allow_sources: Sequence[str] = ()
) -> tuple[Recipe, str | None, int, str | None] | None:
    """Recipe, data, seed and init_from of the run in a folder, as `train` takes them; None where none has begun.

    Raises BadRun where its run.json is not one; OSError where it may not be looked at; BadData where it names a URL
    that is none of `allow_sources`, nor below one: the user did not name it.
    """
    if not present(Path(folder) / RUN_JSON):
        return None
    record = read_record(folder)
    source = record["data"]["source"]
    if source != DIGITS:
        check_source(source, allow_sources, str(Path(folder) / RUN_JSON))
    init_from = (record.get("init_from") or {}).get("source")
    return recipe_of(record), None if source == DIGITS else source, record["seed"], init_from
