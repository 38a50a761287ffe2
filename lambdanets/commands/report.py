"""`lambdanets report`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from lambdanets.commands.arguments import allow_source, task_of_run, workers_and_device
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
    from lambdanets.training.preflight import choose_device

    task = task_of_run(given, {"classification": ("allow_source",)})
    device = choose_device(given.device)
    if task == "detection":
        from lambdanets.detection.report import write_report as write_detections_page

        written = write_detections_page(given.run, device=device, workers=given.workers)
    else:
        from lambdanets.classification.report import write_report

        written = write_report(given.run, device=device, workers=given.workers, allow_sources=given.allow_source)
    print(printable(written))
    return 0
