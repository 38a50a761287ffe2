"""What was found in a data set: one table of cases, each with what is done about it, a count and the first names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lambdanets.errors import SHOWN, BadData, printable, some

Severity = Literal["error", "dropped", "warning"]
_OF_ONE = (
    (r"^categories\b", "category"),
    (r"^(objects|pictures|polygons|masks|ids|category ids|category names)\b", lambda found: found[0][:-1]),
    (r"\bthat are crowds\b", "that is a crowd"),
    (r"\bthat are\b", "that is"),
    (r"\bthat have\b", "that has"),
    (r"\bthat (come|lie|differ)\b", r"that \1s"),
    (r"\btheir objects\b", "its objects"),
    (r"\btheir (box|picture|content)\b", r"its \1"),
)


def counted(n: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "object"), counted(1000, "object")
    ('1 object', '1,000 objects')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _counted(n: int, what: str) -> str:
    """A number before what is written for many.

    >>> _counted(2, "polygons that have no area"), _counted(1, "polygons that have no area")
    ('2 polygons that have no area', '1 polygon that has no area')
    """
    for pattern, of_one in _OF_ONE if n == 1 else ():
        what = re.sub(pattern, of_one, what)
    return f"{n:,} {what}"


@dataclass(frozen=True)
class Finding:
    """One case.

    id        of shared tables: "R71"
    part      "train", "val", or "" for both
    what      was found, as of many
    action    what is done about it; of an error, what to do
    severity  "error": nothing is trained on; "dropped": objects or pictures are left out; "warning": all is kept
    count     of objects, pictures or categories
    names     up to ten of them
    listed    how many names there are in all
    """

    id: str
    part: str
    what: str
    action: str
    severity: Severity
    count: int
    names: tuple[str, ...]
    listed: int


class Findings:
    """Rows of `Finding`, in the order in which they were made."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def add(
        self, id: str, part: str, what: str, action: str, severity: Severity, count: int, names: Iterable[object] = (),
        *, listed: int | None = None,
    ) -> None:  # fmt: skip
        """A row, unless the count is 0. Of `names` the first ten are kept; there are `listed` of them, else `count`."""
        if count:
            shown = tuple(printable(name) for _, name in zip(range(SHOWN), names, strict=False))
            named = int(count) if listed is None else listed
            self.rows.append(Finding(id, part, what, action, severity, int(count), shown, named))

    @property
    def errors(self) -> list[Finding]:
        return [row for row in self.rows if row.severity == "error"]

    def table(self) -> str:
        """A paragraph a row, errors first; names below."""
        order = {"error": 0, "dropped": 1, "warning": 2}
        lines = []
        for row in sorted(self.rows, key=lambda row: order[row.severity]):
            part = f"{row.part}: " if row.part else ""
            lines.append(f"{row.severity:<8}{row.id:<4} {part}{_counted(row.count, row.what)}: {row.action}")
            if row.names:
                more = row.listed - len(row.names)
                lines.append(f"{'':13}{some(row.names)}{f' and {more:,} more' if more > 0 else ''}")
        return "\n".join(lines)

    def refuse(self, asked: object, use: str = "trained on") -> None:
        """Raises BadData with every error's row, if there is one: it cannot be `use`."""
        if wrong := self.errors:
            only = Findings()
            only.rows = wrong
            remedy = "`lambdanets check` shows all that was found; its --fix OUT writes a copy without what is wrong"
            raise BadData(f"{asked} cannot be {use}:\n{only.table()}\n{remedy}")
