"""`lambdanets pack`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from lambdanets.errors import EXIT_CODES_TEXT, BadData, DiskFault


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Pack a folder of images into tar shards (WebDataset layout) with an index. After a fault, again: "
        "finished shards are kept. Unreadable images are left out and listed in OUT/bad_samples.jsonl.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("folder", type=str, metavar="FOLDER", help="as for `lambdanets train --data`; split as there")
    parser.add_argument("out", type=str, metavar="OUT", help="a new folder: give it to `lambdanets train --data`")
    parser.add_argument("--max-side-px", type=PositiveInt, metavar="N", help="shrink larger images to this longer side")
    parser.add_argument("--shard-bytes", type=PositiveInt, metavar="N", help="largest shard, bytes (without it: 1 GiB)")
    parser.add_argument(
        "--max-bad-frac",
        type=ClosedUnitInterval,
        default=0.001,
        help="of the training or the validation images, and one: more that cannot be decoded end the command",
    )
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.data.pack import SHARD_BYTES, pack

    sizes = {"max_side_px": given.max_side_px, "shard_bytes": given.shard_bytes or SHARD_BYTES}
    with going_on_again():
        print(pack(given.folder, given.out, workers=given.workers, max_bad_frac=given.max_bad_frac, **sizes))
    return 0


@contextlib.contextmanager
def going_on_again() -> Iterator[None]:
    """What ends the work on shards loses nothing: the same command goes on, so a fault of the disk has no code of its
    own, and an interrupt says it."""
    try:
        yield
    except DiskFault as error:
        raise BadData(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on, finished shards are kept") from None
