"""Which pictures are taken: a query that DuckDB answers over the label files, with a limit of memory and a folder to
spill to.

`CANDIDATES` says which rows may be taken, and `CHOICE` which of them are. To look at labels, or to try another rule,
change them, or give them to DuckDB's own shell: what they need besides is set by `choose`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lambdanets.errors import BadData, need, printable
from lambdanets.pseudo_labels.label_files import arrow
from lambdanets.pseudo_labels.label_rows import LabelRows, verified

RULES = ("label", "rank")

# A picture's number is its place among all pictures of the data set. `shard` has the number of each file's first one,
# `excluded` the numbers of pictures that must not be taken. Whoever is last in its class has the largest `doubt`.
_READABLE = """
FROM read_parquet(getvariable('files'), filename = true) AS labels JOIN shard USING (filename)
WHERE labels.error IS NULL
  AND shard.first + labels.sample NOT IN (SELECT id FROM excluded)"""
CANDIDATES = {
    # Each picture belongs to the class that the teacher finds most probable, if it is sure enough.
    "label": f"""
SELECT shard.first + labels.sample AS id, labels.class AS class, labels.doubt AS doubt, 0 AS place
{_READABLE}
  AND labels.doubt <= getvariable('most_doubt')""",
    # Each picture belongs to all classes that are kept of it (Yalniz et al. 2019); `place` is which of those it is.
    "rank": f"""
SELECT shard.first + labels.sample AS id, unnest(labels.top_class) AS class, -unnest(labels.top_prob) AS doubt,
       unnest(range(len(labels.top_class))) AS place
{_READABLE}""",
}
# Equal doubts are put in the order of a multiple of the id: it is the same on every machine, and it is spread over all
# shards. 1640531527 / 2^32 is the golden section's; the products stay below 2^63.
CHOICE = """
SELECT id, place
FROM candidate
QUALIFY row_number() OVER (
    PARTITION BY class
    ORDER BY doubt, id % 4294967296 * 1640531527 % 4294967296, id
) <= getvariable('per_class')"""
COUNTS = "SELECT class, count(*) AS candidates FROM candidate GROUP BY class"

_BATCH_ROWS = 1 << 18


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    per_class   draws that a class is to have
    candidates  (classes,) int64: rows of each class that might be taken
    picked      (pictures, n) uint8: bit p, the lowest first, of a picture's bytes is set where it is taken for the
                class at place p of its `top_class`; of the rule "label" for its `class`, and p is 0
    """

    per_class: int
    candidates: np.ndarray[Any, np.dtype[np.int64]]
    picked: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(classes,): rows of each class that are taken."""
        return np.minimum(self.candidates, self.per_class)


def choose(
    rows: LabelRows,
    excluded: np.ndarray[Any, np.dtype[np.int64]],
    *,
    rule: str,
    most_doubt: float,
    per_class: int | None,
    spill: Path,
    memory_gb: float,
    threads: int,
) -> Choice:
    """The least doubtful rows of each class, `per_class` at most.

    excluded   ids that are not taken
    most_doubt a float32: a row above it is not taken; the rule "rank" has no such bound
    per_class  None: as many as there are candidate pictures a class in the mean
    spill      a new folder, for what does not fit in memory; what is in it is of no use afterwards
    memory_gb  what DuckDB may take for its tables; beside them the process has a byte a picture
    The result does not depend on threads, memory or the order of the files. Raises BadData: nothing may be taken; a
    file is damaged; the memory or the disk does not suffice.
    """
    if not rows.files:
        raise BadData("no shard is labelled yet: give `lambdanets label` its command again")
    with _connected(rows, spill, memory_gb, threads) as connection:
        table = arrow().table
        paths = [file.path for file in rows.files]
        connection.execute("SET VARIABLE files = $files", {"files": paths})
        connection.execute("SET VARIABLE most_doubt = $most::FLOAT", {"most": float(most_doubt)})
        firsts = np.array([file.first for file in rows.files], np.int64)
        for name, given in (
            ("shard", table({"filename": paths, "first": firsts})),
            ("excluded", table({"id": excluded.astype(np.int64)})),
        ):
            connection.register("given", given)
            connection.execute(f"CREATE TABLE {name} AS FROM given")
        connection.execute(f"CREATE TEMP VIEW candidate AS {CANDIDATES[rule]}")
        counted = connection.execute(COUNTS).fetchnumpy()
        candidates = _by_class(rows, counted["class"], counted["candidates"])
        if not candidates.any():
            bound = f", none with a doubt of {most_doubt:g} or less" if rule == "label" else ""
            raise BadData(
                f"nothing can be selected: of {len(rows):,} labelled pictures {len(excluded):,} are excluded{bound}; "
                "give a lower --confidence, or label with a better teacher"
            )
        if per_class is None:
            pictures = candidates.sum() / (rows.top if rule == "rank" else 1)
            per_class = max(1, round(float(pictures) / len(rows.classes)))
        connection.execute("SET VARIABLE per_class = $k::BIGINT", {"k": per_class})
        picked = np.zeros((rows.pictures, -(-rows.top // 8) if rule == "rank" else 1), np.uint8)
        for batch in connection.sql(CHOICE).to_arrow_reader(_BATCH_ROWS):
            ids, place = (batch.column(name).to_numpy() for name in ("id", "place"))
            if len(ids) and not (ids.min() >= 0 and ids.max() < rows.pictures):
                raise _damaged(rows, f"a picture's number is outside 0 to {rows.pictures - 1:,}")
            # `at`: a picture of the rule "rank" may be there twice
            np.bitwise_or.at(picked, (ids, place // 8), np.left_shift(1, place % 8).astype(np.uint8))
    found = Choice(per_class, candidates, picked)
    taken = int(np.bitwise_count(picked).sum())
    if taken != found.rows.sum():
        raise _damaged(rows, f"DuckDB gave {taken:,} rows where {found.rows.sum():,} were counted")
    return found


def _by_class(
    rows: LabelRows, labels: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    candidates = np.zeros(len(rows.classes), np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(rows.classes)):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise _damaged(rows, f"the labels hold a class {wrong}, and the teacher has {len(rows.classes):,}")
    candidates[labels] = counts
    return candidates


@contextlib.contextmanager
def _connected(rows: LabelRows, spill: Path, memory_gb: float, threads: int) -> Iterator[Any]:
    need("duckdb", "pseudo", "it selects among the labels")
    import duckdb

    how: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_gb * 1000:.0f}MB",
        "temp_directory": str(spill),
        "threads": threads,
        "preserve_insertion_order": False,  # no order is promised by a file; keeping one would take memory
        "autoinstall_known_extensions": False,  # nothing is fetched from a network
        "autoload_known_extensions": False,
    }
    connection = duckdb.connect(config=how)
    try:
        yield connection
    except duckdb.Error as error:
        raise BadData(_why(rows, error, spill, memory_gb)) from error
    finally:
        connection.close()


def _why(rows: LabelRows, error: Exception, spill: Path, memory_gb: float) -> str:
    text = printable(str(error).partition("\n")[0])
    if named := next((file for file in rows.files if file.path in str(error)), None):
        return str(named.refused(text))
    remedy = f"free space where {spill} is, or give a larger --memory-gb than {memory_gb:g}, and give the command again"
    return str(_damaged(rows, f"DuckDB could not select: {text}; {remedy}"))


def _damaged(rows: LabelRows, otherwise: str) -> BadData:
    """What is wrong with the first label file that is damaged: DuckDB does not look for it, nor name it always."""
    for file in rows.files:
        try:
            verified(rows.labels, file)
        except BadData as damage:
            return damage
    return BadData(otherwise)
