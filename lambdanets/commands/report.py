"""`lambdanets report`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from lambdanets.commands.arguments import allow_source, workers_and_device
from lambdanets.errors import EXIT_CODES_TEXT, printable


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write RUN/report.html again, with the weights as they are now: also while the run goes on.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("run", type=str, metavar="RUN", help="the folder of a run, finished or not")
    allow_source(parser)
    workers_and_device(parser)
    return parser


def run(given: Namespace) -> int:
    from lambdanets.classification.report import write_report
    from lambdanets.training.preflight import choose_device

    print(
        printable(
            write_report(
                given.run, device=choose_device(given.device), workers=given.workers, allow_sources=given.allow_source
            )
        )
    )
    return 0
