"""The errors that a command answers, with their exit codes; names made fit to be shown, lists cut short."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import unicodedata
from collections.abc import Iterable
from typing import Any

SHOWN = 10  # names in a message

# Marks that turn the direction of the text around them, so that a name reads as another one.
_TURNS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(name: object) -> str:
    r"""A name (a file's, a class's) as a terminal, a page, a picture and JSON can show it.

    Control characters, line breaks, bytes that are not UTF-8 and marks that turn the text around are written as Python
    writes them (\x1b, \n, \xff, \u202e); all else stays, in any script. To open a file take the name itself.

    >>> printable("caf\udce9/\x1b[31mred.png")
    'caf\\xe9/\\x1b[31mred.png'
    """
    text = str(name)
    return text if text.isascii() and text.isprintable() else "".join(map(_fit, text))


def printable_text(text: object) -> str:
    """`printable`, line by line: for a message that holds names."""
    return "\n".join(map(printable, str(text).split("\n")))


def _fit(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    if letter in _TURNS or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
        return repr(letter)[1:-1]
    return letter


def some(names: Iterable[object], shown: int = SHOWN, *, between: str = ", ") -> str:
    """The first names of a list, fit to be shown, and how many there are besides.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    listed = list(names)
    more = len(listed) - shown
    text = between.join(printable(name) for name in listed[:shown])
    if more <= 0:
        return text
    return f"{text}{' ' if between == ', ' else between}and {more:,} more"


class BadRun(ValueError):
    """A run that cannot start or cannot be read: the folder, the device, the model or its weights."""


class NotForThis(BadRun):
    """A checkpoint that is whole, and not this run's or this version's to use: it is neither used nor passed over."""


class NonFiniteState(ArithmeticError):
    """A checkpoint was refused, since it holds a NaN or an infinity; the message names the tensors."""


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient that is not a number; the message names the step, the images and the weights that remain."""


class _OfOneFile(ValueError):
    """What is wrong with one file: `name` says which, `reason` why, `str()` both."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args: the error travels from a worker process unchanged
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


class BadImage(_OfOneFile):
    """One picture cannot be read: `name` says which, `reason` why, `str()` both.

    >>> str(BadImage("cats/1.jpg", "the file is empty"))
    'cats/1.jpg: the file is empty'
    """


class BadData(ValueError):
    """The data set as a whole is unusable; the message says what to do about it."""


class DiskFault(_OfOneFile, BadData):
    """A file could not be read, though it was tried again: nothing is known of its content.

    The fault is the machine's or the network's (a folder that is away, EIO, EACCES), not the picture's, so nothing may
    be concluded from it: no substitute, no line in a list of bad pictures. `name` says which file, `reason` why.
    """


class BadRecipe(ValueError):
    """A recipe, or a change to one, that cannot be trained; the message names the argument."""


class Terminated(Exception):
    """SIGTERM or SIGHUP asked the run to stop, and it did; the message says after which step, and what was saved."""

    code = 128 + signal.SIGTERM
    """The exit code that says so."""


class LostProcess(RuntimeError):
    """A process that the run needs is gone or failed: another rank, or one that reads images; the message names it."""


class EvaluationStopped(Exception):
    """`go_on` said no on some rank, so that there are no scores."""


HANG, LOST = 4, 5

EXIT_CODES = {
    0: "done",
    1: "some images could not be predicted",
    2: "wrong argument, data, run or device",
    3: "the loss was not finite",
    HANG: "nothing moved for --hang-timeout-s",
    LOST: "a process of the run (another rank, one that reads images), or a disk it reads, was lost",
    128 + signal.SIGHUP: "hung up",
    128 + signal.SIGINT: "interrupted",
    128 + signal.SIGTERM: "terminated",
}
"""What the exit code of a command says."""

EXIT_CODES_TEXT = (
    f"Exit codes: {', '.join(f'{code} {what}' for code, what in EXIT_CODES.items())}. "
    "After 4, 5, 129, 130 and 143 a run goes on with --resume."
)

_EXIT_CODE_OF: dict[type[BaseException], int] = {
    BadRun: 2,
    BadRecipe: 2,
    BadData: 2,
    BadImage: 2,
    NonFiniteLoss: 3,
    NonFiniteState: 3,
    DiskFault: LOST,
    LostProcess: LOST,
}


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that a command answers with its message; None for any other.

    >>> exit_code(DiskFault("cat.png", "Input/output error")), exit_code(BadData("no images")), exit_code(OSError())
    (5, 2, None)
    """
    if isinstance(error, Terminated):
        return error.code
    return next((_EXIT_CODE_OF[kind] for kind in type(error).__mro__ if kind in _EXIT_CODE_OF), None)


def lost_reader(error: BaseException) -> LostProcess | None:
    """What a RuntimeError of torch's loader means, if it is about a process that reads images; else None."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or isinstance(error, LostProcess):
        return None
    if "Bus error" in text or "shared memory" in text or "unable to mmap" in text or "</torch_" in text:
        size = ""
        with contextlib.suppress(OSError):
            size = f", {shutil.disk_usage('/dev/shm').total >> 20:,} MiB"
        lost = LostProcess(
            f"shared memory (shm: /dev/shm{size}) is too small for the images that --workers read ahead: give it more, "
            f"as with `docker run --shm-size 8g`, or take fewer --workers; a run goes on with --resume ({text[:200]})"
        )
    elif "DataLoader worker" in text:
        lost = LostProcess(
            f"a process that reads images is gone ({text}): go on with --resume, maybe with less --workers"
        )
    else:
        return None
    lost.__cause__ = error
    return lost


def need(module: str, extra: str, why: str) -> None:
    """Raises BadRun, with the command that installs it, where an optional module is missing."""
    if importlib.util.find_spec(module) is None:
        raise BadRun(f"{module} is not installed ({why}): pip install 'lambdanets[{extra}]'")


def mismatch(model: str, wrong: dict[str, tuple[Any, Any]], missing: list[str], extra: list[str]) -> str:
    """The message: keys missing, unknown, of another shape (key -> ours, theirs), ten a kind, and the remedy."""
    lines = [f"the state dict does not fit {model}:"]
    if missing:
        lines.append(f"  {len(missing)} keys missing: {some(missing)}")
    if extra:
        lines.append(f"  {len(extra)} keys unknown: {some(extra)}")
    if wrong:
        shapes = [f"{k} is {theirs}, the model's {ours}" for k, (ours, theirs) in wrong.items()]
        lines.append(f"  {len(wrong)} shapes differ: {some(shapes)}")
    if any(k.endswith("table") for k in wrong):
        lines.append("  tables of another map size: state[key] = lambdanets.resize_table(state[key], (H, W))")
    if any(k.startswith(("fc.", "head.")) for k in wrong):
        lines.append("  another class count: build the model with that num_classes, load, then reset_classifier(...)")
    if missing or extra:
        lines.append(
            "  weights of another model, or with a prefix such as 'module.': build the model they were saved from"
        )
    return "\n".join(lines)
