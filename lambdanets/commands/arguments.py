"""Arguments that several commands have."""

from __future__ import annotations

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt


def workers_and_device(parser: ArgumentParser) -> None:
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")


def allow_source(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow-source",
        type=str,
        action="append",
        default=[],
        metavar="URL",
        help="a place that a manifest or run may name, and all below it; repeatable; what you name yourself is allowed",
    )
