"""The errors of runs; and what a person is shown: names of unknown origin made fit for it, lists cut short."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

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
