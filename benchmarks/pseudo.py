"""What a selection among so many labelled pictures costs: processor time, time, memory, and whether it is the same.

    python -m benchmarks.pseudo --select-rows N [--folder DIR] [--threads N] [--memory-gb GB] [--out FILE]

The labels are synthetic: 10,000 rows a file, 1,000 classes of which the k-th has 1/k^0.9 of the pictures, log-odds of
the doubts N(1.5, 3), one row in a thousand unreadable, one in five hundred a repetition of another; top 10 with hashes.
N rows take 55 bytes each in DIR, which are removed afterwards (--keep: not).  A process of its own selects 130,000 a
class (of fewer rows as many less), twice: with the files in the manifest's order and shuffled.  Each of its parts is
timed: pictures that repeat others, the query, the columns with every value compared with its sha256.  The last line is
JSON; the target is a million and a half rows a second of processor time for the query, and at most 4 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lambdanets.data.manifest import Shard
from lambdanets.pseudo_labels import label_files
from lambdanets.pseudo_labels.label_files import Labels

ROWS_A_FILE, CLASSES, TOP = 10_000, 1_000, 10
PER_CLASS = 130_000  # of 130 million rows
_DIFFERENT = 16  # tables of values; a file takes one of them, and hashes of its own


def shards_of(rows: int) -> list[Shard]:
    whole, left = divmod(rows, ROWS_A_FILE)
    sizes = [ROWS_A_FILE] * whole + [left] * bool(left)
    return [
        Shard(f"unlabelled-{n:05d}.tar", size, 2048 * size, hashlib.sha256(str(n).encode()).hexdigest())
        for n, size in enumerate(sizes)
    ]


def labels_of(folder: Path, shards: list[Shard]) -> Labels:
    teacher = {"source": "synthetic", "weights_sha256": "0" * 64, "model": "none", "view": {}}
    plan = {
        "teacher": {**teacher, "classes": [f"class {n}" for n in range(CLASSES)]},
        "data": {"fingerprint": "0" * 64, "shards": len(shards), "samples": sum(shard.samples for shard in shards)},
        "batch_images": 256, "precision": "float32", "fused": True, "top": TOP, "hashes": True, "softmax": "float64",
    }  # fmt: skip
    return label_files.begin(Labels(str(folder), plan, {}, {}))


def values(seed: int) -> dict[str, Any]:
    """The columns of a file but for its hashes, as arrays of arrow."""
    import pyarrow as pa

    draw = np.random.default_rng(seed)
    n = ROWS_A_FILE
    share = np.cumsum(1 / np.arange(1, CLASSES + 1) ** 0.9)
    doubt = (1 / (1 + np.exp(draw.normal(1.5, 3, n)))).astype(np.float32)
    label = np.searchsorted(share, draw.random(n) * share[-1]).astype(np.int16)
    top_class = ((label[:, None] + np.arange(TOP) * 37) % CLASSES).astype(np.int16)
    top_prob = np.concatenate([1 - doubt[:, None], doubt[:, None] * 0.5 ** np.arange(1, TOP)], 1)
    bad = draw.random(n) < 0.001
    doubt[bad], label[bad], top_class[bad], top_prob[bad] = 1, -1, -1, 0

    def lists(array: np.ndarray[Any, Any], dtype: Any) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.astype(dtype).ravel()), TOP)

    return {
        "sample": pa.array(np.arange(n, dtype=np.int32)),
        "class": pa.array(label),
        "confidence": pa.array(np.where(bad, 0, 1 - doubt).astype(np.float32)),
        "doubt": pa.array(doubt),
        "top_class": lists(top_class, np.int16),
        "top_prob": lists(top_prob, np.float16),
        "error": pa.array(["is cut off" if of else None for of in bad], pa.string()),
    }


def make(folder: str, shards: list[Shard], part: int, parts: int) -> None:
    """Every `parts`-th label file from `part` on."""
    import pyarrow as pa

    labels = labels_of(Path(folder), shards)
    held = [values(seed) for seed in range(_DIFFERENT)]
    for number in range(part, len(shards), parts):
        draw, n = np.random.default_rng([1, number]), shards[number].samples
        columns = dict(held[number % _DIFFERENT])
        own = draw.integers(0, 2**64, ROWS_A_FILE, dtype=np.uint64)
        own[:20] = np.random.default_rng([1, number // 2]).integers(0, 2**64, 20, dtype=np.uint64)
        columns |= {"bytes_hash": pa.array(own)}
        columns |= {"look_hash": pa.array(draw.integers(0, 2**64, ROWS_A_FILE, dtype=np.uint64))}
        # The same values in another order, so that no two files hold the same doubts at the same places
        turn = pa.array((np.arange(ROWS_A_FILE) * 7919 + number) % ROWS_A_FILE)
        turned = {
            name: of if name in ("sample", "bytes_hash", "look_hash") else of.take(turn) for name, of in columns.items()
        }
        rows = pa.Table.from_arrays([turned[name] for name in labels.schema.names], schema=labels.schema).slice(0, n)
        content = label_files.file_bytes(
            rows,
            labels=labels,
            shard=shards[number].name,
            shard_sha256=shards[number].sha256,
            device="cpu",
            versions={},
        )
        (Path(folder) / label_files.file_of(shards[number].name)).write_bytes(content)


def fill(folder: Path, rows: int, processes: int) -> float:
    """Makes the folder of labels; gives the seconds that took."""
    start, shards = time.perf_counter(), shards_of(rows)
    folder.mkdir(parents=True)
    labels_of(folder, shards)
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make, args=(str(folder), shards, n, processes)) for n in range(processes)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"a process that makes labels ended with {maker.exitcode}")
    return time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


class Parts:
    """Seconds, processor seconds and the peak of memory so far, part by part."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        self.found[name] = {
            "s": round(time.perf_counter() - wall, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "peak_mb": round(peak_mb()),
        }
        return found


def select_once(folder: str, out: str, shuffled: bool, threads: int, memory_gb: float, answer: Any) -> None:
    """One selection, in a process of its own; puts its numbers into `answer`."""
    from lambdanets.pseudo_labels.label_files import read_labels
    from lambdanets.pseudo_labels.label_rows import label_rows
    from lambdanets.pseudo_labels.near_copies import HASHED, copies
    from lambdanets.pseudo_labels.query import choose
    from lambdanets.pseudo_labels.write_selection import written_columns

    parts, place = Parts(), Path(out)
    place.mkdir(parents=True)
    before = peak_mb()
    labels = read_labels(folder)
    shards = shards_of(labels.plan["data"]["samples"])
    rows = parts.timed("footers", lambda: label_rows(labels, shards, threads))
    found = parts.timed("repeated", lambda: copies(rows, np.zeros(0, HASHED), 3, threads))
    order = np.random.default_rng(2).permutation(len(rows.files)) if shuffled else np.arange(len(rows.files))
    asked = dataclasses.replace(rows, files=[rows.files[at] for at in order])
    per_class = max(1, PER_CLASS * len(rows) // 130_000_000)
    choice = parts.timed(
        "query",
        lambda: choose(
            asked, found.repeated, rule="label", most_doubt=float(np.float32(0.7)), per_class=per_class,
            spill=place / ".spill", memory_gb=memory_gb, threads=threads,
        ),
    )  # fmt: skip
    columns = parts.timed("columns", lambda: written_columns(rows, choice, place, "label", 0, threads))
    digest = hashlib.sha256(json.dumps(columns.sha256, sort_keys=True).encode()).hexdigest()
    answer.put(
        {
            "order": "shuffled" if shuffled else "the manifest's",
            "rows": len(rows),
            "files": len(rows.files),
            "repeated": len(found.repeated),
            "candidates": int(choice.candidates.sum()),
            "per_class": per_class,
            "selected": columns.rows,
            "draws": columns.draws,
            "classes_with_all_draws": sum(n == per_class for n in columns.classes["draws"]),
            "parts": parts.found,
            "cpu_s": round(sum(of["cpu_s"] for of in parts.found.values()), 1),
            "s": round(sum(of["s"] for of in parts.found.values()), 1),
            "peak_mb": round(peak_mb()),
            "imports_mb": round(before),
            "rows_a_cpu_s_of_the_query": round(len(rows) / max(parts.found["query"]["cpu_s"], 0.01)),
            "digest": digest,
        }
    )


def runs(folder: Path, place: Path, threads: int, memory_gb: float) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for shuffled in (False, True):
        answer = context.Queue()
        out = place / f"selection {int(shuffled)}"
        args = (str(folder), str(out), shuffled, threads, memory_gb, answer)
        process = context.Process(target=select_once, args=args)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the selection ended with {process.exitcode}")
        yield answer.get()
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select-rows", type=int, required=True, metavar="N")
    parser.add_argument("--folder", type=Path, help="where the labels go (without it: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the labels there, and take those that are there")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-gb", type=float, default=2.0, help="DuckDB's")
    parser.add_argument("--out", type=Path, help="where the last line's JSON is written, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        place = Path(temporary)
        folder = (given.folder if given.keep and given.folder else place) / f"labels-{given.select_rows}"
        made_s = 0.0 if folder.exists() else fill(folder, given.select_rows, given.threads)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{given.select_rows:,} rows, {size:,} bytes, made in {made_s:.0f} s", flush=True)
        found = []
        for one in runs(folder, place, given.threads, given.memory_gb):
            found.append(one)
            times = ", ".join(f"{name} {of['cpu_s']:.1f} ({of['peak_mb']} MB)" for name, of in one["parts"].items())
            print(f"{one['order']} order: {one['cpu_s']} CPU s, {one['s']} s, {one['peak_mb']} MB: {times}", flush=True)
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "threads": given.threads}
    equal = len({one["digest"] for one in found}) == 1
    text = json.dumps(
        {"about": about, "memory_gb": given.memory_gb, "label_bytes": size, "made_s": round(made_s, 1), "runs": found,
         "same_digest": equal}
    )  # fmt: skip
    if given.out:
        given.out.write_text(text + "\n")
    print(text)
    if not equal:
        raise SystemExit("the two orders of the files gave different selections")


if __name__ == "__main__":
    main()
