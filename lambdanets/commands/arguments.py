"""Arguments that several commands have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from lambdanets.errors import BadRecipe


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


def told(given: Namespace, names: Sequence[str]) -> list[str]:
    """Those of the arguments that were given; a 0 tells something."""
    return [name for name in names if given[name] is not None and given[name] is not False and given[name] != []]


def task_of_run(given: Namespace, only: Mapping[str, Sequence[str]]) -> str:
    """The task of the run `given.run`.

    only  task -> options that runs of no other task have; BadRecipe names those that were given all the same
    """
    from lambdanets.runs.record import task_of

    task = task_of(given.run)
    for other, names in only.items():
        if other != task and (those := told(given, names)):
            options = ", ".join("--" + name.replace("_", "-") for name in those)
            raise BadRecipe(f"{given.run} is a run of {task}, and {options} is for one of {other}: leave that out")
    return task
