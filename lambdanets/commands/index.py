"""`lambdanets index`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from lambdanets.commands.arguments import allow_source
from lambdanets.commands.pack import going_on_again
from lambdanets.errors import EXIT_CODES_TEXT


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Index the tar shards of others, or compare every byte of indexed ones with their manifest.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("shards", type=str, metavar="SHARDS", help="a folder or URL with train-*.tar and val-*.tar")
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="all SHARDS/*.tar are images for `lambdanets label`; labels beside them are ignored and counted",
    )
    parser.add_argument("--out", type=str, metavar="FOLDER", help="where the index goes if SHARDS cannot be written")
    parser.add_argument("--classes", type=str, metavar="FILE", help="names of the classes, one a line")
    allow_source(parser)
    return parser


def run(given: Namespace) -> int:
    from lambdanets.data.pack import index

    with going_on_again():
        how = {"allow_sources": given.allow_source, "unlabelled": given.unlabelled}
        print(index(given.shards, out=given.out, classes=given.classes, **how))
    return 0
