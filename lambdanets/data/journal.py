"""What packing has finished: a line a shard in the target folder, from which a killed job goes on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from lambdanets.data.index_files import array
from lambdanets.data.manifest import (
    COLUMNS,
    MANIFEST,
    SPLITS,
    UNLABELLED,
    Manifest,
    Shard,
    columns_of,
    manifest,
    shard_of,
)
from lambdanets.errors import BadData, BadImage
from lambdanets.files import field, json_object, lock, open_to_append, placed, to_stderr

BAD_SAMPLES = "bad_samples.jsonl"


_JOURNAL = "packing.jsonl"


_ROW = np.dtype(list(COLUMNS.items()))


@contextlib.contextmanager
def _job(out: Path, plan: dict[str, Any], *, shared: bool) -> Iterator[Job | None]:
    """The job in that folder, begun or continued; None where it is done. shared: other files may lie there."""
    plan = json.loads(json.dumps(plan))
    if os.path.isfile(out / MANIFEST):
        if manifest(str(out)).plan != plan:
            raise BadData(f"{out} holds the shards of another folder, or of other sizes: name a new folder")
        _tidy(out)
        yield None
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
        if held and _JOURNAL not in held and not shared:
            raise BadData(f"{out} is not empty (it holds {held[0]}): name a new folder")
        with open_to_append(out / _JOURNAL) as file:
            try:
                lock(file, out)
            except BlockingIOError:
                raise BadData(f"{out} is being written by another process") from None
            yield Job(out, file, plan, anew=shared)
    except OSError as error:
        remedy = "free space or choose another place, and give the same command: finished shards are kept"
        raise BadData(f"{out} cannot be written: {error}; {remedy}") from error
    _tidy(out)


def _tidy(out: Path) -> None:
    for left in [*out.glob(".*.tar.npy"), *out.glob(".*.part"), out / _JOURNAL]:
        left.unlink(missing_ok=True)


class Job:
    """Finished shards: a line each in the journal, rows of the index in a file each until `finish` joins them."""

    def __init__(self, out: Path, file: IO[bytes], plan: dict[str, Any], *, anew: bool) -> None:
        self.out, self._file, self._plan = out, file, plan
        file.seek(0)
        content = file.readall()  # type: ignore[attr-defined]  # an unbuffered file's
        lines: list[dict[str, Any]] = []
        good = 0
        for number, text in enumerate(
            content.split(b"\n")[:-1]
        ):  # after the last line end: nothing, or what a kill cut
            try:
                lines.append(_plan_of(text) if number == 0 else _finished(text))
                good += len(text) + 1
            except ValueError as error:
                where = f"{out / _JOURNAL}, line {number + 1}"
                if number == 0 and not anew:
                    raise BadData(f"{where} is damaged ({error}): remove {out} and give the same command") from error
                to_stderr(f"{where} is damaged ({error}): the shards from there on are made again")
                break
        if lines and lines[0]["plan"] != plan and anew:  # an archive was repaired: indexing loses nothing but time
            lines, good = [], 0
        file.truncate(good)
        if not lines:
            self._write({"plan": plan})
        elif lines[0]["plan"] != plan:
            remedy = "finish that with its own command, or remove it"
            raise BadData(f"{out} holds an unfinished job on other pictures, or of other sizes: {remedy}")
        self._lines = lines[1:]

    def _write(self, line: dict[str, Any]) -> None:
        left = memoryview(json.dumps(line).encode() + b"\n")
        while left:  # a disk that is almost full takes a part, and refuses the rest
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())

    def forget_repaired(self, prepared: Callable[[str], object]) -> None:
        """Goes back to before the first shard that left out a picture which can be read now: it is packed again."""
        for place, line in enumerate(self._lines):
            if any(not isinstance(prepared(name), BadImage) for name in line["bad"]):
                self._file.seek(0)
                texts = self._file.readall().split(b"\n")  # type: ignore[attr-defined]
                self._file.truncate(sum(len(text) + 1 for text in texts[: place + 1]))
                os.fsync(self._file.fileno())
                again, self._lines = self._lines[place:], self._lines[:place]
                for shard in (Shard(*line["shard"]) for line in again if line["shard"]):
                    (self.out / shard.name).unlink(missing_ok=True)
                return

    def shards(self, split: str) -> list[Shard]:
        return [Shard(*line["shard"]) for line in self._lines if line["split"] == split and line["shard"]]

    def next(self, split: str) -> int:
        return next((int(line["next"]) for line in reversed(self._lines) if line["split"] == split), 0)

    def bad(self, split: str) -> dict[str, str]:
        return {name: why for line in self._lines if line["split"] == split for name, why in line["bad"].items()}

    def rows(self, shard: Shard) -> np.ndarray[Any, Any]:
        place = self._rows_file(shard)
        return array(place, str(place), _ROW, shard.samples, f"remove {self.out / _JOURNAL} and begin again")

    def _rows_file(self, shard: Shard) -> Path:
        name = shard.name if len(os.fsencode(shard.name)) <= 200 else f"{shard.sha256}.tar"  # 255 with what is added
        return self.out / f".{name}.npy"

    def with_others(self, split: str) -> int:
        """Samples of the finished shards beside whose picture something lay that was passed over."""
        return sum(int(line.get("with_others", 0)) for line in self._lines if line["split"] == split)

    def add(
        self,
        split: str,
        shard: Shard | None,
        rows: list[tuple[int, int, int]],
        *,
        next_place: int,
        bad: dict[str, str],
        with_others: int = 0,
    ) -> None:
        if shard is not None:
            with placed(self._rows_file(shard)) as file:
                np.save(file, np.array(rows, _ROW), allow_pickle=False)
        line = {"split": split, "shard": shard, "next": next_place, "bad": bad}
        if with_others:
            line["with_others"] = with_others
        self._write(line)
        self._lines.append(json.loads(json.dumps(line)))

    def finish(
        self,
        classes: tuple[str, ...],
        *,
        paths: bool,
        base: str = "",
        files: dict[str, str] | None = None,
        splits: Iterable[str] = SPLITS,
    ) -> None:
        columns = {split: {name: self._join(split, name) for name in columns_of(split)} for split in splits}
        bad = {name: why for line in self._lines for name, why in line["bad"].items()}
        if bad:
            with placed(self.out / BAD_SAMPLES) as file:
                file.writelines(json.dumps({"name": name, "reason": bad[name]}).encode() + b"\n" for name in bad)
        shards = {split: self.shards(split) for split in splits}
        held = Manifest(classes, paths, len(bad), base, self._plan, shards, columns, files or {})
        with placed(self.out / MANIFEST) as file:
            file.write(held.text().encode())

    def _join(self, split: str, column: str) -> str:
        """Writes one column of the index from the rows of all shards; gives its sha256."""
        shards, digest = self.shards(split), hashlib.sha256()
        start = io.BytesIO()
        shape = (sum(shard.samples for shard in shards),)
        np.lib.format.write_array_header_1_0(start, {"descr": COLUMNS[column], "fortran_order": False, "shape": shape})
        with placed(self.out / f"{split}.{column}.npy") as file:
            for part in itertools.chain([start.getvalue()], (self.rows(s)[column].tobytes() for s in shards)):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()


def _plan_of(text: bytes) -> dict[str, Any]:
    return {"plan": field(json_object(text), "plan", dict)}


def _finished(text: bytes) -> dict[str, Any]:
    """A line of the journal, checked. Raises ValueError."""
    held = json_object(text)
    if field(held, "split", str) not in (*SPLITS, UNLABELLED) or field(held, "next", int) < 0:
        raise ValueError(f"its split is {str(held['split'])[:60]!r}, its 'next' {held['next']}")
    shard = field(held, "shard", (list, type(None)))
    if shard is not None:
        shard_of(dict(zip(Shard._fields, shard, strict=False)), shard[4] if len(shard) > 4 else "")
    if "with_others" in held and field(held, "with_others", int) < 0:
        raise ValueError(f"its 'with_others' is {held['with_others']}")
    bad = field(held, "bad", dict)
    if not all(isinstance(why, str) and "\0" not in name for name, why in bad.items()):
        raise ValueError("its 'bad' should be names and reasons")
    return held
