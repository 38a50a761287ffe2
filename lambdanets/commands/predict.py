"""`lambdanets predict`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lambdanets.errors import EXIT_CODES_TEXT, printable


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="The top classes of image files and their probabilities.", epilog=EXIT_CODES_TEXT
    )
    parser.add_argument("run", type=str, metavar="RUN", help="the folder of a run, or a checkpoint RUN/step-N")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files")
    parser.add_argument("--json", action="store_true", help="one line of JSON an image, with the errors among them")
    parser.add_argument("--top", type=PositiveInt, default=3, metavar="K", help="classes an image")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.classification.predict import predict
    from lambdanets.classification.run import open_run
    from lambdanets.training.preflight import choose_device

    device = choose_device(given.device)
    run = open_run(given.run)
    failed = False
    for found in predict(run.model.to(device), run.view, given.images, device=device):
        failed = failed or found.error is not None
        if given.json:
            print(found.json(run.classes, given.top), flush=True)
        elif found.error is not None:
            print(f"lambdanets predict: {printable(found.image)}: {printable(found.error)}", file=sys.stderr)
        else:
            print(found.text(run.classes, given.top), flush=True)
    return 1 if failed else 0
