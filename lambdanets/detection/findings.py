"""What was found in a data set: one table of cases, each with what is done about it, a count and the first names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lambdanets.errors import SHOWN, BadData, printable, some

Severity = Literal["error", "dropped", "warning"]


@dataclass(frozen=True)
class Finding:
    """One case.

    id        of shared tables: "R71"
    part      "train", "val", or "" for both
    what      was found
    action    what is done about it; of an error, what to do
    severity  "error": nothing is trained on; "dropped": objects or pictures are left out; "warning": all is kept
    count     of objects, pictures or categories
    names     up to ten of them
    """

    id: str
    part: str
    what: str
    action: str
    severity: Severity
    count: int
    names: tuple[str, ...]


class Findings:
    """Rows of `Finding`, in the order in which they were made."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def add(
        self, id: str, part: str, what: str, action: str, severity: Severity, count: int, names: Iterable[object] = ()
    ) -> None:
        """A row, unless the count is 0. Of `names` the first ten are kept."""
        if count:
            shown = tuple(printable(name) for _, name in zip(range(SHOWN), names, strict=False))
            self.rows.append(Finding(id, part, what, action, severity, int(count), shown))

    @property
    def errors(self) -> list[Finding]:
        return [row for row in self.rows if row.severity == "error"]

    def table(self) -> str:
        """A paragraph a row, errors first; names below."""
        order = {"error": 0, "dropped": 1, "warning": 2}
        lines = []
        for row in sorted(self.rows, key=lambda row: order[row.severity]):
            part = f"{row.part}: " if row.part else ""
            lines.append(f"{row.severity:<8}{row.id:<4} {part}{row.count:,} {row.what}: {row.action}")
            if row.names:
                more = row.count - len(row.names)
                lines.append(f"{'':13}{some(row.names)}{f' and {more:,} more' if more > 0 else ''}")
        return "\n".join(lines)

    def refuse(self, asked: object) -> None:
        """Raises BadData with every error's row, if there is one."""
        if wrong := self.errors:
            only = Findings()
            only.rows = wrong
            remedy = "`lambdanets check` shows all that was found; its --fix OUT writes a copy without what is wrong"
            raise BadData(f"{asked} cannot be trained on:\n{only.table()}\n{remedy}")
