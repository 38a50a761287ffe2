"""`lambdanets predict`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lambdanets.commands.arguments import task_of_run
from lambdanets.errors import EXIT_CODES_TEXT, BadImage, DiskFault, printable
from lambdanets.files import to_stderr

_TOP = 3


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="What is in image files: by a run of classification the top classes and their probabilities, by "
        "one of detection the objects, their boxes and masks.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("run", type=str, metavar="RUN", help="the folder of a run, or a checkpoint RUN/step-N")
    parser.add_argument(
        "images",
        type=str,
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG, WebP, GIF or BMP files; by a run of detection also folders of them",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON an image, with the errors among them")
    parser.add_argument("--top", type=PositiveInt, metavar="K", help=f"classification: classes an image ({_TOP})")
    parser.add_argument("--score", type=float, metavar="S", help="detection: least score shown, 0 to 1 (0.5)")
    parser.add_argument("--image-px", type=PositiveInt, help="detection: longer side that is seen (the run's)")
    parser.add_argument("--draw", type=str, metavar="OUT", help="detection: a folder for the images, drawn on")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto")
    return parser


def run(given: Namespace) -> int:
    task = task_of_run(given, {"classification": ("top",), "detection": ("score", "image_px", "draw")})
    return _objects(given) if task == "detection" else _classes(given)


def _classes(given: Namespace) -> int:
    from lambdanets.classification.predict import predict
    from lambdanets.classification.run import open_run
    from lambdanets.training.preflight import choose_device

    device = choose_device(given.device)
    run, top = open_run(given.run), given.top or _TOP
    failed = False
    for found in predict(run.model.to(device), run.view, given.images, device=device):
        failed = failed or found.error is not None
        if given.json:
            print(found.json(run.classes, top), flush=True)
        elif found.error is not None:
            _say_why(found.image, found.error)
        else:
            print(found.text(run.classes, top), flush=True)
    return 1 if failed else 0


def _objects(given: Namespace) -> int:
    from lambdanets.detection.new_pictures import NewPictures
    from lambdanets.detection.predict import SCORE, DetectionPrediction, predict
    from lambdanets.detection.run import open_run
    from lambdanets.training.preflight import choose_device

    device = choose_device(given.device)
    run, score = open_run(given.run), SCORE if given.score is None else given.score
    pictures = None if given.draw is None else NewPictures(given.draw)
    every = predict(run, given.images, device=device, score=score, image_px=given.image_px)
    least = run.recipe.score_min
    to_stderr(
        f"objects with a score of at least {max(score, least):g} (--score; `lambdanets evaluate` names the best score, "
        f"and counts from {least:g})"
    )
    if given.image_px not in (None, run.view.image_px):
        to_stderr(f"--image-px {given.image_px} is not what the run was trained and judged at: {run.view.image_px}")
    failed = False
    for found in every:
        drawn = None
        if pictures is not None and found.error is None:
            try:
                drawn = pictures.save(found.drawn(run.classes), found.image)
            except (BadImage, DiskFault) as error:  # gone, or replaced, meanwhile
                found = DetectionPrediction(found.image, error=error.reason)
        failed = failed or found.error is not None
        if given.json:
            print(found.json(drawn), flush=True)
        elif found.error is not None:
            _say_why(found.image, found.error)
        else:
            print(found.text() + ("" if drawn is None else f"  -> {printable(drawn)}"), flush=True)
    return 1 if failed else 0


def _say_why(image: str, error: str) -> None:
    print(f"lambdanets predict: {printable(image)}: {printable(error)}", file=sys.stderr)
