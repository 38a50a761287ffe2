"""What `make demo` shows: train on the digits, write some that were held out as image files, predict the files."""

from __future__ import annotations

from pathlib import Path

import torch

from lambdanets import data
from lambdanets.classification.predict import predict
from lambdanets.classification.run import open_run
from lambdanets.classification.train import train
from lambdanets.errors import BadRun, printable
from lambdanets.recipes.digits import digits
from lambdanets.recipes.recipe import Recipe

SHOWN_OF_EACH = 2


def demo(out: str | Path | None = None, *, seed: int = 0, device: str = "auto", recipe: Recipe | None = None) -> Path:
    """Train, then write RUN/digits/LABEL-NUMBER.png and predict them as `lambdanets predict` does. Returns RUN.

    recipe  the digits recipe by default
    Raises what `train` raises.
    """
    result = train(recipe or digits(), out=out, seed=seed, device=device)
    held_out = data.digits()[1]
    folder = result.folder / "digits"
    labels = {}
    try:
        folder.mkdir()
        for label, name in enumerate(held_out.classes):
            for i in [i for i, other in enumerate(held_out.labels) if other == label][:SHOWN_OF_EACH]:
                path = folder / f"{name}-{Path(held_out.names[i]).name}.png"
                held_out.load(i).save(path)
                labels[str(path)] = name
    except OSError as error:
        raise BadRun(f"{result.folder} is trained, but {folder} cannot be written: {error}") from error

    shown = printable(result.folder)
    print(f"\nlambdanets predict {shown} {shown}/digits/*.png   (a file is named after its label)")
    run = open_run(result.folder)
    right = 0
    for found in predict(run.model, run.view, sorted(labels), device=torch.device("cpu")):
        right += found.top(run.classes, 1)[0][0] == labels[found.image]
        print(found.text(run.classes, 3))
    print(f"{right} of these {len(labels)} are right; of all held-out digits {result.scores}. {result.seconds:.0f} s.")
    print(f"{shown}: weights.safetensors, run.json, curves.png, digits/")
    return result.folder
