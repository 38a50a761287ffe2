"""A selection made from labels: as many draws of each class, the least doubtful pictures first.

What is read is the folder of labels and, where pictures must be seen, the shards; label_rows.py, near_copies.py and
query.py say how it is decided, selection.py what is written. What a killed job has finished (hashes of held-out
pictures, copies of them, the choice) lies in the target folder under names that hold what it depends on, so the same
command goes on from there and ends, byte for byte, where an undisturbed one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lambdanets.data.images import Images
from lambdanets.data.source import absolute, open_source
from lambdanets.errors import BadData, printable, some
from lambdanets.files import placed, present, read_json, write_json
from lambdanets.pseudo_labels.label_files import arrow, labelled_pictures, read_labels
from lambdanets.pseudo_labels.label_rows import LabelRows, label_rows, on_this_machine
from lambdanets.pseudo_labels.near_copies import HASHED, MOST_BITS, Copies, Joined, Pair, confirmed, copies, hashed
from lambdanets.pseudo_labels.query import RULES, Choice, choose
from lambdanets.pseudo_labels.selection import DRAWS, FORMAT, ROWS, SELECTION_JSON
from lambdanets.pseudo_labels.write_selection import Columns, written_columns

CONFIDENCE = 0.3
NEAR_BITS = 3
MEMORY_GB = 2.0
_MOST_PER_CLASS = 10**9  # draws are written one by one, 4 bytes each
EXCLUDED = "excluded.jsonl"
_SPILL, _LABELS = ".spill", ".labels"
_OWN = {EXCLUDED, "classes.png", "report.html", *(f"{name}.npy" for name in (*ROWS, *DRAWS))}  # before SELECTION_JSON

# Most is said of a class by its share, and by how often its pictures are repeated.
_FEW_FRAC, _LARGE_FRAC, _MANY_COPIES, _LOOSE = 0.1, 0.2, 10, 2.0


@dataclass(frozen=True)
class Asked:
    """What a selection is asked for, checked.

    per_class   draws a class; None: as many as there are candidates a class in the mean
    confidence  the least, 1 - doubt; the rule "rank" has no such bound
    rule        "label": a picture serves the class that is most probable; "rank": all classes that are kept of it
    max_copies  of one picture in the draws; 0: no limit
    near_bits   in which the looks of copies may differ
    incomplete  shards without labels are left out; else an error
    """

    per_class: int | None = None
    confidence: float = CONFIDENCE
    rule: str = "label"
    max_copies: int = 0
    near_bits: int = NEAR_BITS
    incomplete: bool = False

    def __post_init__(self) -> None:
        if self.per_class is not None and not 1 <= self.per_class <= _MOST_PER_CLASS:
            raise BadData(f"--per-class is {self.per_class}: 1 to {_MOST_PER_CLASS:,}")
        if not 0 <= self.confidence <= 1:
            raise BadData(f"--confidence is {self.confidence}: 0 to 1")
        if self.rule not in RULES:
            raise BadData(f"--rule is {self.rule!r}: one of {', '.join(RULES)}")
        if self.max_copies < 0 or not 0 <= self.near_bits <= MOST_BITS:
            raise BadData(
                f"--max-copies is {self.max_copies}, --near {self.near_bits}: 0 or more, and 0 to {MOST_BITS}"
            )

    @property
    def most_doubt(self) -> float:
        """The largest doubt that is confident enough, a float32 as those of the labels are."""
        return float(np.float32(1 - self.confidence))


@dataclass(frozen=True)
class HeldOut:
    """One `--exclude`: where its pictures are, those held out, and its training pictures if they are excluded, too."""

    source: str
    val: Images
    train: Images | None

    @classmethod
    def open(cls, data: str, allow_sources: Sequence[str] = ()) -> HeldOut:
        """DATA, or DATA:all. Raises BadData."""
        place, train = data.removesuffix(":all"), data.endswith(":all")
        train_images, val_images, _, _ = open_source(None if place == "digits" else place, allow_sources)
        return cls("digits" if place == "digits" else absolute(place), val_images, train_images if train else None)

    def json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "held_out": self.val.fingerprint(),
            "train": None if self.train is None else self.train.fingerprint(),
        }

    def parts(self) -> list[tuple[str, Images]]:
        return [("held_out", self.val)] + ([] if self.train is None else [("train", self.train)])


@dataclass(frozen=True)
class Selected:
    """What a selection holds; str() is the sentence that the command ends with."""

    place: str
    held: dict[str, Any]

    def __str__(self) -> str:
        held = self.held
        classes = held["counts"]["classes"]
        full = sum(n > 0 for n in classes["draws"])
        said = f"{self.place}: {held['draws']:,} draws of {held['rows']:,} pictures"
        said += f" for {full:,} of {len(classes['draws']):,} classes, up to {held['per_class']:,} a class"
        said += f"; {held['counts']['labelled']:,} were labelled"
        if left := [f"{n:,} {why.replace('_', ' ')}" for why, n in held["excluded"].items() if n]:
            said += f"; left out: {', '.join(left)}"
        if held["exclude"]:
            said += f"; copies are listed in {EXCLUDED}, and a crop or a mirrored copy is not found"
        if missing := held["incomplete"]:
            said += f"; {missing['shards']:,} shards with {missing['pictures']:,} pictures have no labels yet"
        return "\n".join([said, *(f"warning: {warning}" for warning in held["warnings"])])


@dataclass(frozen=True)
class Source:
    """What is selected from.

    rows         of the label files
    place        where the labels are
    pictures     those that were labelled; None: nothing is compared or shown
    pictures_at  where they are, with their fingerprint
    """

    rows: LabelRows
    place: str
    pictures: Images | None
    pictures_at: dict[str, str]


def select(
    labels: str | Path,
    out: str | Path,
    asked: Asked,
    *,
    exclude: Sequence[str] = (),
    pictures: str | None = None,
    allow_sources: Sequence[str] = (),
    memory_gb: float = MEMORY_GB,
    threads: int | None = None,
    workers: int = 0,
) -> Selected:
    """Selects among the labels of a folder or URL; writes a folder, see selection.py.

    exclude    data sets whose held-out pictures, and copies of them, are left out; DATA:all: its training ones, too
    pictures   where the shards that were labelled are now; None: where they were then
    memory_gb  what DuckDB may take for its tables; beside them 16 bytes a picture are needed
    threads    that read and select; None: one a processor. The result does not depend on them, nor on workers
    workers    processes that read pictures: those of `exclude`, and what may be a copy of them
    Raises BadData: labels or shards that are missing, damaged or of another plan; nothing to select; a target that
    holds something else, or a full disk: the same call then goes on. BadRun: another process writes there.
    """
    arrow()
    labels, out = absolute(labels), Path(out)
    held = read_labels(labels)
    images = labelled_pictures(held, pictures, allow_sources=allow_sources)
    opened = [HeldOut.open(data, allow_sources) for data in exclude]
    threads = threads or len(os.sched_getaffinity(0))
    with _folder(out):
        here = on_this_machine(held, out / _LABELS, threads)
        source = Source(
            label_rows(here, images.shards, threads),
            labels,
            images,
            {"source": absolute(pictures or held.places["data"]), "fingerprint": images.fingerprint()},
        )
        return _Job(source, out, asked, opened).done(memory_gb, threads, workers)


def select_from(
    source: Source,
    out: Path,
    asked: Asked,
    exclude: Sequence[HeldOut] = (),
    *,
    memory_gb: float = MEMORY_GB,
    threads: int = 1,
    workers: int = 0,
) -> Selected:
    """`select`, of what is opened already."""
    with _folder(out):
        return _Job(source, out, asked, exclude).done(memory_gb, threads, workers)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The target folder, held for this process. Raises BadData with a remedy where the disk does not take something."""
    from lambdanets.runs.lock import locked, unlock

    if out.exists() and not out.is_dir():
        raise BadData(f"{out} is a file: name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = set(os.listdir(out))
        if ".lock" in held:  # a begun selection's, or of a run of `lambdanets train`, whose report would be lost
            held = {name for name in held - _OWN if not name.startswith(".")} if SELECTION_JSON not in held else set()
        if held:
            raise BadData(f"{out} is not empty (it holds {printable(min(held))}): name a new folder")
        file = locked(out)
        try:
            shutil.rmtree(out / _SPILL, ignore_errors=True)
            yield
        finally:
            shutil.rmtree(out / _SPILL, ignore_errors=True)
            unlock(file)
    except OSError as error:
        free = shutil.disk_usage(out).free if out.is_dir() else 0
        remedy = "free space or choose another place, and give the same command: what is finished is kept"
        where = f"{error.filename or out} cannot be written: {error.strerror or error}, {free:,} bytes are free there"
        raise BadData(f"{where}; {remedy}") from error


class _Job:
    def __init__(self, source: Source, out: Path, asked: Asked, exclude: Sequence[HeldOut]) -> None:
        self.source, self.rows, self.out, self.asked, self.exclude = source, source.rows, out, asked, exclude
        if missing := self.rows.missing:
            names = some(shard.name for shard in missing)
            if not asked.incomplete:
                found = f"{len(missing):,} of {len(missing) + len(self.rows.files):,} shards have no labels yet"
                raise BadData(f"{found}: {names}; give `lambdanets label` its command again, or --incomplete")
        if exclude and (not self.rows.hashes or source.pictures is None):
            raise BadData(
                "the labels have no hashes (label --no-hashes), so no copy of a held-out picture can be found: label "
                "again with hashes, or leave --exclude out"
            )
        self.held_out = [of.json() for of in exclude]
        self.request = {
            "labels": {"plan_sha256": self.rows.labels.plan_sha256, "content_sha256": self.rows.content_sha256()},
            "pictures": source.pictures_at["fingerprint"],
            "exclude": [{key: of[key] for key in ("held_out", "train")} for of in self.held_out],
            **dataclasses.asdict(asked),
        }

    def done(self, memory_gb: float, threads: int, workers: int) -> Selected:
        held = self._finished()
        if held is None:
            held = self._run(memory_gb, threads, workers)
        for left in self.out.glob(".*"):
            if left.name == _LABELS:
                shutil.rmtree(left, ignore_errors=True)
            elif left.is_file() and left.name != ".lock":
                left.unlink(missing_ok=True)
        return Selected(str(self.out), held)

    def _finished(self) -> dict[str, Any] | None:
        if not present(self.out / SELECTION_JSON):
            return None
        try:
            held = read_json(self.out / SELECTION_JSON)
        except ValueError as error:
            raise BadData(f"{self.out / SELECTION_JSON} is damaged ({error}): remove {self.out}") from error
        request = held.get("request")
        if request != self.request:
            theirs = request if isinstance(request, dict) else {}
            wrong = [
                f"{key} {theirs.get(key)!r}, not {of!r}" for key, of in self.request.items() if theirs.get(key) != of
            ]
            raise BadData(f"{self.out} holds another selection ({some(wrong)}): name a new folder")
        return held

    def _kept(self, what: str, *depends_on: str) -> Path:
        """The file in which a finished part is kept; its name says what it was made of."""
        # A damaged file that was labelled again has the content that its footer told before: its time differs.
        found = [os.stat(file.path) for file in self.rows.files]
        stamps = [(of.st_size, of.st_mtime_ns) for of in found]
        key = hashlib.sha256(json.dumps([stamps, *(self.request[name] for name in depends_on)]).encode()).hexdigest()
        return self.out / f".{what}-{key[:16]}"

    def _run(self, memory_gb: float, threads: int, workers: int) -> dict[str, Any]:
        lines, choice, repeated = self._chosen(memory_gb, threads, workers)
        try:
            columns = written_columns(self.rows, choice, self.out, self.asked.rule, self.asked.max_copies, threads)
        except BadData:  # what was made of damaged files is of no use, nor are copies of those
            for left in (*self.out.glob(".copies-*"), *self.out.glob(".choice-*")):
                left.unlink()
            shutil.rmtree(self.out / _LABELS, ignore_errors=True)
            raise
        with placed(self.out / EXCLUDED) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        labels = self.request["labels"] | {"source": self.source.place, "plan": self.rows.labels.plan}
        missing = {"shards": len(self.rows.missing), "pictures": sum(shard.samples for shard in self.rows.missing)}
        held = {
            "format": FORMAT,
            "labels": labels,
            "pictures": self.source.pictures_at,
            "classes": list(self.rows.classes),
            "teacher_sha256": self.rows.labels.plan["teacher"]["weights_sha256"],
            **dataclasses.asdict(self.asked),
            "per_class": choice.per_class,
            "incomplete": missing if missing["shards"] else None,
            "exclude": self.held_out,
            "top": self.rows.top,
            "rows": columns.rows,
            "draws": columns.draws,
            "counts": {
                "labelled": len(self.rows),
                "candidates": int(choice.candidates.sum()),
                "classes": columns.classes,
                "confidence": columns.confidence,
                "copies": columns.copies,
            },
            "excluded": self._reasons(lines, repeated, choice, columns.unreadable),
            "warnings": warnings_of(self.rows, self.asked, choice, columns),
            "columns": columns.sha256,
            "request": self.request,
        }
        from lambdanets.pseudo_labels import select_page  # here: pages take seconds to import

        select_page.write(self.out, held, columns.doubtful, lines, self.source.pictures, _known(self.exclude))
        write_json(self.out / SELECTION_JSON, held)
        return held

    def _chosen(self, memory_gb: float, threads: int, workers: int) -> tuple[list[dict[str, Any]], Choice, int]:
        """The copies of held-out pictures, what is taken, and how many pictures repeat the bytes of others."""
        kept_lines = self._kept("copies", "labels", "pictures", "exclude", "near_bits")
        kept_choice = self._kept("choice", *self.request)
        lines = None
        if present(kept_lines):
            lines = [json.loads(line) for line in kept_lines.read_bytes().splitlines()]
        if lines is not None and present(kept_choice):
            with np.load(kept_choice, allow_pickle=False) as held:
                return lines, Choice(int(held["per_class"]), held["candidates"], held["picked"]), int(held["repeated"])
        repeated = np.zeros(0, np.int64)
        if self.rows.hashes:
            known = np.zeros(0, HASHED) if lines is not None else self._held_out_hashes(workers)
            found = copies(self.rows, known, self.asked.near_bits, threads)
            repeated = found.repeated
            if lines is None:
                lines = self._lines(found, workers)
        lines = lines or []
        with placed(kept_lines) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        ids = np.array([line["id"] for line in lines], np.int64)
        repeated = np.setdiff1d(repeated, ids)
        choice = choose(
            self.rows,
            np.concatenate([ids, repeated]),
            rule=self.asked.rule,
            most_doubt=self.asked.most_doubt,
            per_class=self.asked.per_class,
            spill=self.out / _SPILL,
            memory_gb=memory_gb,
            threads=threads,
        )
        with placed(kept_choice) as file:
            np.savez(
                file,
                picked=choice.picked,
                candidates=choice.candidates,
                per_class=choice.per_class,
                repeated=len(repeated),
            )
        return lines, choice, len(repeated)

    def _held_out_hashes(self, workers: int) -> np.ndarray[Any, Any]:
        parts = [np.zeros(0, HASHED)]
        for images in _known(self.exclude).sets:
            key = json.dumps([images.fingerprint(), images.stamp()])
            kept = self.out / f".hashes-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            if present(kept):
                parts.append(np.load(kept, allow_pickle=False))
                continue
            parts.append(hashed(images, workers))
            with placed(kept) as file:
                np.save(file, parts[-1], allow_pickle=False)
        return np.concatenate(parts)

    def _lines(self, found: Copies, workers: int) -> list[dict[str, Any]]:
        """A line a copy of a held-out picture, by id."""
        known = _known(self.exclude)
        names = [(of.source, part, images) for of in self.exclude for part, images in of.parts()]
        lines = []

        def line(pair: Pair, kind: str, **besides: Any) -> None:
            number, at = known.place(pair.known)
            source, part, images = names[number]
            of = {"source": source, "name": printable(images.names[at]), "picture": pair.known}
            lines.append({"id": pair.id, "reason": f"{part}_{kind}", **besides, "of": of})

        for pair in found.equal:
            line(pair, "equal")
        if self.source.pictures is not None:
            for copy in confirmed(found.near, self.source.pictures, known, workers):
                seen = {"name": printable(copy.name), "bits": copy.pair.bits, "difference": round(copy.difference, 4)}
                line(copy.pair, "near", **seen)
        return sorted(lines, key=lambda one: one["id"])

    def _reasons(
        self, lines: Sequence[dict[str, Any]], repeated: int, choice: Choice, unreadable: int
    ) -> dict[str, int]:
        """Why a labelled picture is no candidate, the first of these that holds."""
        reasons = {"unreadable": unreadable} | {
            f"{part}_{kind}": sum(line["reason"] == f"{part}_{kind}" for line in lines)
            for part in ("held_out", "train")
            for kind in ("equal", "near")
        }
        reasons["repeated"] = repeated
        if self.asked.rule == "label":
            reasons["doubtful"] = len(self.rows) - sum(reasons.values()) - int(choice.candidates.sum())
        return reasons


def _known(exclude: Sequence[HeldOut]) -> Joined:
    return Joined.of([images for of in exclude for _, images in of.parts()])


def warnings_of(rows: LabelRows, asked: Asked, choice: Choice, columns: Columns) -> list[str]:
    """What in a selection looks as if the teacher, or what was asked for, were wrong."""
    names, told = rows.classes, []
    total = int(choice.candidates.sum())
    if empty := [name for name, n in zip(names, choice.candidates, strict=True) if not n]:
        told.append(f"{len(empty):,} classes have no picture, and so no draws: {some(empty)}")
    most = [-(-choice.per_class // n) if n else 0 for n in choice.rows.tolist()]
    many = [f"{name} ({n:,})" for name, n in zip(names, most, strict=True) if n > _MANY_COPIES]
    if many and not 0 < asked.max_copies <= _MANY_COPIES:
        told.append(f"{len(many):,} classes have so few pictures that each is drawn often: {some(many)}; --max-copies")
    if asked.rule == "label":
        if total < _FEW_FRAC * len(rows):
            share = f"{total:,} of {len(rows):,} pictures ({total / len(rows):.1%})"
            told.append(f"only {share} may be taken: the teacher is unsure, or --confidence is high")
        bound = max(_LARGE_FRAC, min(2 / len(names), 0.9))  # twice its share, where there are few classes
        shares = choice.candidates / total
        large = [f"{names[at]} ({shares[at]:.1%})" for at in np.argsort(-shares, kind="stable") if shares[at] > bound]
        if large:
            told.append(f"one class has an outsized share of the candidates: {some(large)}; the teacher may be broken")
    medians = {name: n for name, n in zip(names, columns.classes["median_doubt"], strict=True) if n is not None}
    middle = float(np.median(list(medians.values())))
    loose = [f"{name} ({of:.2g})" for name, of in medians.items() if of > _LOOSE * middle]
    if loose and len(medians) > 2:
        which = f"{len(loose):,} classes are taken with twice the doubt of the others ({middle:.2g} in the median)"
        told.append(f"{which}: {some(loose)}; --per-class may be too large for them")
    return told
