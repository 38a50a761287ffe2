"""`lambdanets select`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from lambdanets.commands.arguments import allow_source
from lambdanets.commands.pack import going_on_again
from lambdanets.errors import EXIT_CODES_TEXT


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Select pictures to train on from the labels of a teacher: the same number of draws of each class, "
        "the least doubtful pictures first; of a class that has too few, each is drawn several times. Pictures with "
        "the bytes of another one are taken once. OUT/report.html shows the most doubtful pictures that were taken. "
        "After a fault, again: what is finished is kept.",
        epilog=f"{EXIT_CODES_TEXT} Here there is no --resume: the same command always goes on.",
    )
    parser.add_argument("labels", type=str, metavar="LABELS", help="a folder or URL that `lambdanets label` filled")
    parser.add_argument(
        "--out",
        type=str,
        metavar="SELECTION",
        required=True,
        help="a new folder: give it to `lambdanets train --pseudo`",
    )
    parser.add_argument(
        "--per-class",
        type=PositiveInt,
        metavar="K",
        help="draws of each class (without it: candidates / classes, rounded; Noisy Student had 130,000)",
    )
    parser.add_argument(
        "--confidence",
        type=ClosedUnitInterval,
        default=0.3,
        metavar="P",
        help="the least probability of a picture's class, as Noisy Student's script has it; not with --rule rank",
    )
    parser.add_argument(
        "--rule",
        choices=["label", "rank"],
        default="label",
        help="label: a picture serves its most probable class; rank: every class that was kept of it, ranked by "
        "probability (Yalniz et al. 2019), with hard labels alone",
    )
    parser.add_argument(
        "--max-copies", type=NonNegativeInt, default=0, metavar="N", help="draws of one picture at most; 0: no limit"
    )
    parser.add_argument(
        "--exclude",
        type=str,
        action="append",
        default=[],
        metavar="DATA",
        help="leave out copies of its held-out pictures, also encoded again or scaled (not cropped or mirrored); "
        "DATA:all: of its training pictures, too; digits: scikit-learn's; repeatable. `train` asks for it",
    )
    parser.add_argument(
        "--near", type=NonNegativeInt, default=3, metavar="BITS", help="of 64, in which the looks of copies may differ"
    )
    parser.add_argument(
        "--incomplete", action="store_true", help="select from the shards that have labels, and say how many have not"
    )
    parser.add_argument("--data", type=str, metavar="SHARDS", help="where the shards that were labelled are now")
    parser.add_argument(
        "--memory-gb",
        type=PositiveFloat,
        default=2.0,
        metavar="GB",
        help="for DuckDB's tables, which spill to SELECTION beyond it; 16 bytes a picture are needed besides",
    )
    parser.add_argument("--threads", type=PositiveInt, help="that read labels and select (without it: one a processor)")
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read pictures of --exclude")
    allow_source(parser)
    return parser


def run(given: Namespace) -> int:
    from lambdanets.pseudo_labels.select import Asked, select

    asked = Asked(
        per_class=given.per_class,
        confidence=given.confidence,
        rule=given.rule,
        max_copies=given.max_copies,
        near_bits=given.near,
        incomplete=given.incomplete,
    )
    with going_on_again():
        print(
            select(
                given.labels,
                given.out,
                asked,
                exclude=given.exclude,
                pictures=given.data,
                allow_sources=given.allow_source,
                memory_gb=given.memory_gb,
                threads=given.threads,
                workers=given.workers,
            )
        )
    return 0
