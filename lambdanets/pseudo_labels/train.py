"""Train on labelled and pseudo-labelled pictures together; what comes of it is a run of classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lambdanets.classification import train as classification
from lambdanets.classification.run import Result, read_record
from lambdanets.data.archive import check_source
from lambdanets.errors import BadRun, printable
from lambdanets.pseudo_labels.selection import SELECTION_JSON
from lambdanets.pseudo_labels.task import Joint
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.recipes.recipe import Options, Recipe
from lambdanets.runs.record import RUN_JSON


def train(
    recipe: Recipe,
    data: str | Path | None,
    selection: str | Path,
    mixture: Mixture | None = None,
    *,
    pictures: str | Path | None = None,
    unchecked_overlap: bool = False,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
    resume: bool = False,
    init_from: str | Path | None = None,
    options: Options | None = None,
    allow_sources: Sequence[str] = (),
) -> Result:
    """Train `recipe` on labelled pictures (`data`) and pseudo-labelled ones (`selection`), both in every step.

    selection  the folder that `lambdanets select` wrote
    mixture    how many of either a step has, and what is made of the teacher's labels
    pictures   the shards that the selection is of, where they no longer lie where it says
    unchecked_overlap  the selection may have been made without --exclude of `data`: held-out pictures may be in it
    An epoch is a pass over the labelled pictures. The other arguments, and what it raises, are those of
    `classification.train.train`; besides, BadData where selection, pictures and labelled pictures do not fit together.
    """
    task = Joint(
        recipe, data, selection, mixture or Mixture(), pictures=pictures, unchecked_overlap=unchecked_overlap,
        workers=workers, seed=seed, allow_sources=allow_sources,
    )  # fmt: skip
    return classification.run_task(
        recipe, task, out=out, seed=seed, device=device, resume=resume, init_from=init_from, options=options
    )


class Recorded(NamedTuple):
    """Of a run, as `train` takes it."""

    recipe: Recipe
    data: str | None
    seed: int
    init_from: str | None
    selection: str
    mixture: Mixture
    pictures: str
    unchecked_overlap: bool


def recorded(
    folder: str | Path,
    allow_sources: Sequence[str] = (),
    *,
    selection: str | None = None,
    pictures: str | None = None,
) -> Recorded | None:
    """What the run in a folder was asked for; None where it learns from labelled pictures alone, or none has begun.

    selection, pictures   where these lie now, if they moved
    Raises what `classification.train.recorded` does.
    """
    found = classification.recorded(folder, allow_sources)
    held: dict[str, Any] = {} if found is None else read_record(folder)["data"]
    if found is None or "pseudo" not in held:
        return None
    pseudo, where = held["pseudo"], str(Path(folder) / RUN_JSON)
    if selection is None and not Path(pseudo["source"], SELECTION_JSON).is_file():
        remedy = "give --pseudo SELECTION, where it lies now"
        raise BadRun(f"--resume: the selection of {folder} is no longer in {printable(pseudo['source'])}: {remedy}")
    if pictures is None:
        pictures = pseudo["pictures"]
        check_source(pictures, allow_sources, where)
    mixture = Mixture(**{one.name: pseudo[one.name] for one in dataclasses.fields(Mixture)})
    unchecked = not pseudo["held_out_pictures_excluded"]
    return Recorded(*found, selection or pseudo["source"], mixture, pictures, unchecked)
