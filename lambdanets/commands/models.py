"""`lambdanets models`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Every model: name, parameters, GFLOPs.")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.models.cost import models_text

    print(models_text())
    return 0
