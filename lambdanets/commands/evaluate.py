"""`lambdanets evaluate`."""

from __future__ import annotations

import os

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lambdanets.commands.arguments import allow_source, task_of_run, workers_and_device
from lambdanets.errors import EXIT_CODES_TEXT, BadData


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="How good a run is on a data set. Classification: top-1, top-5, loss, a table by class, every "
        "mistake. Detection: COCO's average precision of boxes and masks, by class, the kinds of errors, and the score "
        "that is best to cut at. Each image counts once, also under torchrun.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="the folder of a run of `lambdanets train`, or a checkpoint RUN/step-N"
    )
    parser.add_argument(
        "--data",
        type=str,
        metavar="FOLDER",
        help="FOLDER/val/CLASS/*.jpg, or all of FOLDER/CLASS/*.jpg, or COCO data; without it: the images that the run "
        "held out",
    )
    parser.add_argument("--annotations", type=str, metavar="FILE", help="detection: a COCO file, instead of --data")
    parser.add_argument(
        "--images-dir", type=str, metavar="DIR", help="the folder that its file names are relative to (else: its own)"
    )
    parser.add_argument("--image-px", type=PositiveInt, help="detection: longer side that is seen (the run's)")
    parser.add_argument("--skip-missing", action="store_true", help="detection: pictures that are missing are no error")
    parser.add_argument("--batch-images", type=PositiveInt, help="images a batch: changes memory and time only")
    parser.add_argument(
        "--exclude-bad",
        action="store_true",
        help="classification: leave out images that cannot be read, and say so; else an error",
    )
    parser.add_argument("--out", type=str, metavar="NEW", help="a new folder (without it: RUN/evaluation-NUMBER)")
    allow_source(parser)
    workers_and_device(parser)
    return parser


def run(given: Namespace) -> int:
    from lambdanets.runs.folder import NotWritten

    of_boxes = ("annotations", "images_dir", "image_px", "skip_missing")
    task = task_of_run(given, {"classification": ("exclude_bad", "allow_source"), "detection": of_boxes})
    try:
        found = _objects(given) if task == "detection" else _classes(given)
    except NotWritten as error:  # all is computed: first the numbers
        print(error.found, flush=True)
        raise
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(found)
    return 0


def _classes(given: Namespace) -> object:
    from lambdanets.classification.evaluate_run import evaluate_run
    from lambdanets.training.distributed import Ranks
    from lambdanets.training.preflight import choose_device

    return evaluate_run(
        given.run,
        given.data,
        out=given.out,
        batch_images=given.batch_images,
        workers=given.workers,
        device=choose_device(given.device, Ranks()),
        exclude_bad=given.exclude_bad,
        allow_sources=given.allow_source,
    )


def _objects(given: Namespace) -> object:
    from lambdanets.detection.evaluate_run import evaluate_run
    from lambdanets.detection.source import CocoSource
    from lambdanets.training.distributed import Ranks
    from lambdanets.training.preflight import choose_device

    if given.data is not None and given.annotations is not None:
        raise BadData("--data and --annotations are two places: give one of them")
    source = None
    if given.data is not None or given.annotations is not None:
        source = CocoSource(given.data, given.annotations, given.images_dir, None, given.skip_missing)
    elif given.images_dir is not None or given.skip_missing:
        raise BadData("--images-dir and --skip-missing are of other data than the run's: give --data or --annotations")
    return evaluate_run(
        given.run,
        source,
        out=given.out,
        batch_images=given.batch_images,
        workers=given.workers,
        device=choose_device(given.device, Ranks()),
        image_px=given.image_px,
    )
