"""`lambdanets demo`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from lambdanets.errors import EXIT_CODES_TEXT


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train on the digits, write held-out digits as PNG files, predict them.", epilog=EXIT_CODES_TEXT
    )
    parser.add_argument(
        "--nuclei", type=str, metavar="WHEEL",
        help="instead train a detector on the micrograph in this file (pip download --no-deps stardist==0.9.2), find "
        "the nuclei in its right third, and draw them",
    )  # fmt: skip
    parser.add_argument("--out", type=str, metavar="RUN", help="a new folder (without it: the next runs/digits-N)")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="two runs with one seed are equal on a CPU")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")
    return parser


def run(given: Namespace) -> int:
    if given.nuclei is not None:
        from lambdanets.detection import demo as detection

        detection.demo(given.nuclei, given.out, seed=given.seed, device=given.device)
        return 0
    from lambdanets.classification.demo import demo

    demo(given.out, seed=given.seed, device=given.device)
    return 0
