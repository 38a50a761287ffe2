"""run.json, the record of a run, read back: one door, behind which every field has its type and bounds.

A run's folder may be a stranger's, or damaged: what passes here needs no further look.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lambdanets
from lambdanets.decode import MAX_IMAGE_PX
from lambdanets.errors import BadRun
from lambdanets.evaluate import Confusion
from lambdanets.files import field, read_json
from lambdanets.recipes import Recipe
from lambdanets.transforms import View

RUN_JSON = "run.json"
_ROW = ("lr", "train_loss", "train_top1_frac", "val_loss", "val_top1_frac", "train_s", "images_per_s")
_DEEPEST = 8  # levels of run.json; train writes five


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run.json of a run, finished or not: every field that this package uses is there, of its type and in bounds.

    What is not used is left as it is. Raises BadRun, naming the field, where it is none.
    """
    path = Path(folder) / RUN_JSON
    try:
        record = read_json(path)
        _check(record)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRun(f"{folder} is not the folder of a run: it has no {RUN_JSON}") from None
    except OSError as error:
        raise BadRun(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, ArithmeticError) as error:  # a recipe is refused with any of them
        raise BadRun(f"{path} is not a run of lambdanets {lambdanets.__version__}: {error}") from error
    return record


def _check(record: dict[str, Any]) -> None:
    """Raises ValueError or TypeError at the first field that is not as `train` writes it."""
    if _depth(record) > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    recipe = recipe_of(record)
    side = view_of(record).image_px
    if side**2 > MAX_IMAGE_PX:
        raise ValueError(f"it shows an image as {side:,} x {side:,} pixels, more than {MAX_IMAGE_PX:,}")
    status = field(record, "status", str)
    field(record, "seed", int)
    classes = _strings(record, "classes")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError("its 'classes' are none, or one of them is there twice")
    data = field(record, "data", dict)
    field(data, "source", str)
    field(data, "how", str)
    field(data, "val_images", int)
    for why, ignored in _optional(data, "ignored", dict, {}).items():
        if not (isinstance(ignored, list) and len(ignored) == 2 and type(ignored[0]) is int):
            raise ValueError(f"its 'ignored' has under {why[:60]!r} no number and names: {str(ignored)[:60]}")
    for part in (_optional(data, "fingerprint", dict, None) or {}).values():
        if not isinstance(part, str):
            raise ValueError("its 'fingerprint' holds other things than text")
    if began_from := _optional(record, "init_from", dict, None):
        field(began_from, "source", str)
    for key in ("error", "id"):
        _optional(record, key, str, None)
    for start in _dicts(record, "starts", []):
        field(start, "step", int)
        field(start, "ranks", int)
    history = _dicts(record, "history")
    for epoch, row in enumerate(history, 1):
        if field(row, "epoch", int) != epoch or epoch > recipe.epochs:
            raise ValueError(f"its 'history' has epoch {row['epoch']} where epoch {epoch} of {recipe.epochs} is due")
        for name in _ROW:
            _number(row, name)
        if "data_wait_s" in row:
            _number(row, "data_wait_s")
    if status == "finished" or "result" in record:
        result = field(record, "result", dict)
        field(result, "n", int)
        for name in ("top1_frac", "loss", "seconds"):
            _number(result, name)
        if result.get("top5_frac") is not None:
            _number(result, "top5_frac")
        Confusion.read(field(result, "confusion", (dict, list)), len(classes))


def _depth(held: Any) -> int:
    """Levels of nested objects and lists, counted level by level: a recursion would end in the very case to find."""
    level, depth = [held], 0
    while level and depth <= _DEEPEST:
        below = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level, depth = [v for inner in below for v in inner], depth + bool(below)
    return depth


def _optional(held: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    return field(held, key, (kind, type(None))) if held.get(key) is not None else default


def _strings(held: dict[str, Any], key: str) -> list[str]:
    found: list[str] = field(held, key, list)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise ValueError(f"its {key!r} hold {str(wrong[0])[:60]!r}, which is no text")
    return found


def _dicts(held: dict[str, Any], key: str, default: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = field(held, key, list) if default is None or key in held else default
    if wrong := [value for value in found if not isinstance(value, dict)]:
        raise ValueError(f"its {key!r} hold {str(wrong[0])[:60]!r}, which is no object")
    return found


def _number(held: dict[str, Any], key: str) -> None:
    if not math.isfinite(field(held, key, float)):
        raise ValueError(f"its {key!r} is {held[key]}, not finite")


def recipe_of(record: dict[str, Any]) -> Recipe:
    """What the run learns."""
    held = field(record, "recipe", dict)
    _check_types(held, Recipe)
    return Recipe.from_json(held)


def view_of(record: dict[str, Any]) -> View:
    """How the run sees an image."""
    held = field(record, "view", dict)
    _check_types(held, View)
    return View(**held)


def _check_types(held: dict[str, Any], kind: type) -> None:
    """Raises ValueError where a value is not of the type of the dataclass's field; names it does not know stay."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        if one.name in held and not _is(held[one.name], hints[one.name]):
            raise ValueError(f"its {kind.__name__.lower()} has {one.name} = {str(held[one.name])[:60]!r}")


def _is(value: Any, hint: Any) -> bool:
    """Whether what JSON gave can be the value of a field of that type."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, (str, int)) and value in inner
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is(v, inner[0]) for v in value)
    if inner:  # int | None
        return any(_is(value, one) for one in inner)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint
