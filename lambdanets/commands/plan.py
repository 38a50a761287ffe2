"""`lambdanets plan`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lambdanets.errors import BadRecipe


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="What a model costs, a stage at a time.")
    parser.add_argument("model", type=str, metavar="MODEL", help="a name of `lambdanets models`")
    parser.add_argument("--image", type=PositiveInt, default=224, metavar="PX", help="side of the image, pixels")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.models.cost import plan_text

    try:
        text = plan_text(given.model, given.image)
    except ValueError as error:  # an unknown name, or an image too small for it
        raise BadRecipe(str(error)) from error
    print(text)
    return 0
