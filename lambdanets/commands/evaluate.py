"""`lambdanets evaluate`."""

from __future__ import annotations

import os

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lambdanets.commands.arguments import allow_source, workers_and_device
from lambdanets.errors import EXIT_CODES_TEXT


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="A run's accuracy on a folder of images: top-1, top-5, loss, a table by class, every mistake. Each "
        "image counts once, also under torchrun.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("run", type=str, metavar="RUN", help="the folder of a run of `lambdanets train`")
    parser.add_argument(
        "--data",
        type=str,
        metavar="FOLDER",
        help="FOLDER/val/CLASS/*.jpg, or all of FOLDER/CLASS/*.jpg; without it: the images that the run held out",
    )
    parser.add_argument("--batch-images", type=PositiveInt, help="images a batch: changes memory and time only")
    parser.add_argument(
        "--exclude-bad", action="store_true", help="leave out images that cannot be read, and say so; else an error"
    )
    parser.add_argument("--out", type=str, metavar="NEW", help="a new folder (without it: RUN/evaluation-NUMBER)")
    allow_source(parser)
    workers_and_device(parser)
    return parser


def run(given: Namespace) -> int:
    from lambdanets.classification.evaluate_run import NotWritten, evaluate_run
    from lambdanets.training.distributed import Ranks
    from lambdanets.training.preflight import choose_device

    try:
        found = evaluate_run(
            given.run,
            given.data,
            out=given.out,
            batch_images=given.batch_images,
            workers=given.workers,
            device=choose_device(given.device, Ranks()),
            exclude_bad=given.exclude_bad,
            allow_sources=given.allow_source,
        )
    except NotWritten as error:  # all is computed: first the numbers
        print(error.found, flush=True)
        raise
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(found)
    return 0
