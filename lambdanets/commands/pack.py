"""`lambdanets pack`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from lambdanets.errors import EXIT_CODES_TEXT, BadData, DiskFault


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Pack a folder of images, or a COCO data set, into tar shards (WebDataset layout) with an index. "
        "After a fault, again: finished shards are kept. Unreadable images are left out and listed in "
        "OUT/bad_samples.jsonl.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("folder", type=str, metavar="FOLDER", help="as for `lambdanets train --data`; split as there")
    parser.add_argument("out", type=str, metavar="OUT", help="a new folder: give it to `train --data`, `label --data`")
    parser.add_argument(
        "--max-side-px", type=PositiveInt, metavar="N", help="shrink larger images to this longer side; not with COCO"
    )
    parser.add_argument("--shard-bytes", type=PositiveInt, metavar="N", help="largest shard, bytes (without it: 1 GiB)")
    parser.add_argument(
        "--max-bad-frac",
        type=ClosedUnitInterval,
        default=0.001,
        help="of the training or the validation images, and one: more that cannot be decoded end the command",
    )
    parser.add_argument("--skip-missing", action="store_true", help="of COCO: missing pictures are left out, no error")
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="all images in FOLDER and below, whatever its folders mean, without labels: for `lambdanets label`",
    )
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.data.pack import SHARD_BYTES, pack
    from lambdanets.data.shards import is_shards
    from lambdanets.detection.layouts import is_coco
    from lambdanets.detection.pack import pack_coco

    coco = not given.unlabelled and not is_shards(given.folder) and is_coco(given.folder)
    if coco and given.max_side_px is not None:
        remedy = "leave --max-side-px out; training shrinks each picture as it reads it"
        raise BadData(f"{given.folder} has COCO files, whose boxes and masks are in the pictures' own pixels: {remedy}")
    if given.skip_missing and not coco:
        raise BadData(f"--skip-missing is of COCO files, and {given.folder} has none: leave it out")
    how: dict[str, Any] = {"shard_bytes": given.shard_bytes or SHARD_BYTES, "workers": given.workers}
    how["max_bad_frac"] = given.max_bad_frac
    with going_on_again():
        if coco:
            print(pack_coco(given.folder, given.out, skip_missing=given.skip_missing, **how))
        else:
            how |= {"max_side_px": given.max_side_px, "unlabelled": given.unlabelled}
            print(pack(given.folder, given.out, **how))
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
