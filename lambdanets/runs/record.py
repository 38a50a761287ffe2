"""run.json, the record of a run, read back: one door, behind which every field has its type and bounds.

A run's folder may be a stranger's, or damaged: what passes here needs no further look. What a task has in it besides,
the task checks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lambdanets import __version__
from lambdanets.errors import BadRun
from lambdanets.files import field, present, read_json
from lambdanets.recipes.recipe import TrainingRecipe
from lambdanets.runs.checkpoints import is_checkpoint

RUN_JSON = "run.json"
_ROW = ("lr", "train_loss", "val_loss", "train_s", "images_per_s")
_DEEPEST = 8  # levels of run.json; train writes five

R = TypeVar("R", bound=TrainingRecipe)


def read_record(
    folder: str | Path,
    *,
    task: str,
    recipe: type[TrainingRecipe],
    row: Sequence[str],
    check: Callable[[dict[str, Any]], None],
    check_result: Callable[[dict[str, Any], dict[str, Any]], None],
) -> dict[str, Any]:
    """The run.json of a run, finished or not: every field that this package uses is there, of its type and in bounds.

    task          the kind that it must be of; run.json of 0.1.0 names none and is of "classification"
    recipe        the class of its recipe
    row           numbers that a line of its history has besides those of any run
    check         raises ValueError or TypeError where the task's own fields are not as it writes them
    check_result  the same of (record, result), where there is a result
    What is not used is left as it is. Raises BadRun, naming the field, where it is none.
    """
    with _reading(folder) as path:
        record = read_json(path)
        _check(record, task, recipe, row, check)
        if record["status"] == "finished" or "result" in record:
            result = field(record, "result", dict)
            check_number(result, "seconds")
            check_result(record, result)
    return record


def task_of(source: str | Path) -> str:
    """The kind of task of a run, by its folder or a checkpoint RUN/step-N: "classification" where none is named, as in
    0.1.0. Nothing else of it is looked at. Raises BadRun where there is no run."""
    return _task_in(Path(os.path.abspath(source)).parent if is_checkpoint(source) else source)


def begun_task(folder: str | Path) -> str | None:
    """The kind of task of the run in a folder; None where none has begun. Raises BadRun, OSError."""
    return _task_in(folder) if present(Path(folder) / RUN_JSON) else None


def _task_in(folder: str | Path) -> str:
    with _reading(folder) as path:
        return str(_optional(read_json(path), "task", str, "classification"))


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[Path]:
    """run.json of a folder, to be read in the block: what goes wrong there is a BadRun."""
    path = Path(folder) / RUN_JSON
    try:
        yield path
    except (FileNotFoundError, NotADirectoryError):
        raise BadRun(f"{folder} is not the folder of a run: it has no {RUN_JSON}") from None
    except OSError as error:
        raise BadRun(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, ArithmeticError) as error:  # a recipe is refused with any of them
        raise BadRun(f"{path} is not a run of lambdanets {__version__}: {error}") from error


def _check(
    record: dict[str, Any],
    task: str,
    recipe: type[TrainingRecipe],
    row: Sequence[str],
    check: Callable[[dict[str, Any]], None],
) -> None:
    """Raises ValueError or TypeError at the first field that is not as `train` writes it."""
    if _depth(record) > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if (found := _optional(record, "task", str, "classification")) != task:
        raise ValueError(f"it is one of the task {found[:60]!r}, and one of {task!r} is needed")
    learnt = recipe_of(record, recipe)
    epochs = math.inf if learnt.steps or learnt.min_steps else learnt.epochs
    field(record, "status", str)
    field(record, "seed", int)
    data = field(record, "data", dict)
    field(data, "source", str)
    field(data, "how", str)
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
    for epoch, held in enumerate(history, 1):
        if field(held, "epoch", int) != epoch or epoch > epochs:
            raise ValueError(f"its 'history' has epoch {held['epoch']} where epoch {epoch} of {epochs} is due")
        for name in (*_ROW, *row):
            if learnt.eval_epochs == 1 or not name.startswith("val_") or name in held:
                check_number(held, name)
        if "data_wait_s" in held:
            check_number(held, "data_wait_s")
    if "warnings" in record:
        strings(record, "warnings")
    check(record)


def _depth(held: Any) -> int:
    """Levels of nested objects and lists, counted level by level: a recursion would end in the very case to find."""
    level, depth = [held], 0
    while level and depth <= _DEEPEST:
        below = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level, depth = [v for inner in below for v in inner], depth + bool(below)
    return depth


def _optional(held: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    return field(held, key, (kind, type(None))) if held.get(key) is not None else default


def strings(held: dict[str, Any], key: str) -> list[str]:
    found: list[str] = field(held, key, list)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise ValueError(f"its {key!r} hold {str(wrong[0])[:60]!r}, which is no text")
    return found


def _dicts(held: dict[str, Any], key: str, default: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = field(held, key, list) if default is None or key in held else default
    if wrong := [value for value in found if not isinstance(value, dict)]:
        raise ValueError(f"its {key!r} hold {str(wrong[0])[:60]!r}, which is no object")
    return found


def check_number(held: dict[str, Any], key: str) -> None:
    if not math.isfinite(field(held, key, float)):
        raise ValueError(f"its {key!r} is {held[key]}, not finite")


def val_fingerprint(record: dict[str, Any]) -> str | None:
    """Of the samples that the run held out; None in runs that did not note it."""
    fingerprint: dict[str, str] = record["data"].get("fingerprint") or {}
    return fingerprint.get("val")


def recipe_of(record: dict[str, Any], kind: type[R]) -> R:
    """What the run learns."""
    held = field(record, "recipe", dict)
    check_types(held, kind)
    return kind.from_json(held)


def check_types(held: dict[str, Any], kind: type) -> None:
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
