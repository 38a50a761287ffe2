"""Folders of labels without pictures, made from columns; and what must be selected from them, by sorting in Python."""

import hashlib
import json
from fractions import Fraction

import numpy as np
import pyarrow as pa

from lambdanets.data.manifest import Shard
from lambdanets.pseudo_labels import label_files
from lambdanets.pseudo_labels.label_files import Labels
from lambdanets.pseudo_labels.label_rows import label_rows
from lambdanets.pseudo_labels.select import Source


def table(schema, label, doubt, *, classes, top_class=None, top_prob=None, bytes_hash=None, look_hash=None):
    """One label file's table; a label of -1 is a picture that cannot be read."""
    label, doubt = np.asarray(label), np.asarray(doubt, np.float32)
    n, kept = len(label), schema.field("top_class").type.list_size
    number = schema.field("class").type.to_pandas_dtype()
    bad = label < 0
    doubt = np.where(bad, np.float32(1), doubt)
    if top_class is None:
        top_class = (label[:, None] + np.arange(kept)) % classes
    if top_prob is None:
        top_prob = np.concatenate([1 - doubt[:, None], np.repeat(doubt[:, None] / 100, kept - 1, 1)], 1)[:, :kept]
    top_class = np.where(bad[:, None], -1, top_class).astype(number)
    top_prob = np.where(bad[:, None], 0, top_prob).astype(np.float16)
    columns = {
        "sample": np.arange(n, dtype=np.int32),
        "class": label.astype(number),
        "confidence": np.where(bad, 0, 1 - doubt).astype(np.float32),
        "doubt": doubt,
        "top_class": pa.FixedSizeListArray.from_arrays(pa.array(top_class.ravel()), kept),
        "top_prob": pa.FixedSizeListArray.from_arrays(pa.array(top_prob.ravel()), kept),
        "bytes_hash": np.arange(n, dtype=np.uint64) if bytes_hash is None else np.asarray(bytes_hash, np.uint64),
        "look_hash": np.zeros(n, np.uint64) if look_hash is None else np.asarray(look_hash, np.uint64),
        "error": pa.array(["is cut off" if of else None for of in bad], pa.string()),
    }
    return pa.Table.from_arrays([pa.array(columns[name]) for name in schema.names], schema=schema)


def labels_of(folder, classes, shards, *, top=2, hashes=True, fingerprint="f" * 64, place=""):
    """A folder with a labels.json alone."""
    names = [f"class {number}" for number in range(classes)] if isinstance(classes, int) else list(classes)
    samples = sum(shard.samples for shard in shards)
    plan = {
        "teacher": {"source": "run", "weights_sha256": "a" * 64, "model": "m", "view": {}, "classes": names},
        "data": {"fingerprint": fingerprint, "shards": len(shards), "samples": samples},
        "batch_images": 8, "precision": "float32", "fused": True, "top": top, "hashes": hashes, "softmax": "float64",
    }  # fmt: skip
    return label_files.begin(Labels(str(folder), plan, {"data": str(place), "teacher": "run"}, {}))


def write(labels, shard, rows):
    content = label_files.file_bytes(
        rows, labels=labels, shard=shard.name, shard_sha256=shard.sha256, device="cpu", versions={}
    )
    label_files.write(labels.home, shard.name, content)


def folder_of(folder, parts, classes, *, top=2, hashes=True):
    """A folder of labels whose shards have these columns: (label, doubt) or dicts of `table`'s arguments."""
    parts = [part if isinstance(part, dict) else {"label": part[0], "doubt": part[1]} for part in parts]
    names = [f"unlabelled-{number:05d}.tar" for number in range(len(parts))]
    shards = [
        Shard(name, len(part["label"]), 2048 * len(part["label"]), hashlib.sha256(name.encode()).hexdigest())
        for name, part in zip(names, parts, strict=True)
    ]
    labels = labels_of(folder, classes, shards, top=top, hashes=hashes)
    first = 0
    for shard, part in zip(shards, parts, strict=True):
        part = {"bytes_hash": np.arange(first, first + shard.samples)} | part
        write(labels, shard, table(labels.schema, classes=len(labels.classes), **part))
        first += shard.samples
    return labels, shards


def source_of(labels, shards, threads=1):
    return Source(label_rows(labels, shards, threads), labels.home, None, {"source": "", "fingerprint": "f" * 64})


def mix(ids):
    """The order of equal doubts."""
    return [number % 2**32 * 1640531527 % 2**32 for number in ids]


def reference(label, doubt, *, most_doubt, per_class, excluded=(), max_copies=0):
    """{class: [(id, copies), ...]} by sorting, as semi.md defines it; numbers as Python's own."""
    found = {}
    ids = [i for i, (c, d) in enumerate(zip(label, doubt, strict=True)) if c >= 0 and d <= most_doubt]
    ids = [i for i in ids if i not in set(excluded)]
    for c in sorted({label[i] for i in ids}):
        mine = sorted((i for i in ids if label[i] == c), key=lambda i: (doubt[i], mix([i])[0], i))[:per_class]
        mine.sort()
        share = Fraction(per_class, len(mine))
        copies = [int((j + 1) * share) - int(j * share) for j in range(len(mine))]
        found[c] = [(i, min(n, max_copies) if max_copies else n) for i, n in zip(mine, copies, strict=True)]
    return found


def read(out):
    """selection.json and its columns; each has the sha256 that the JSON says."""
    held = json.loads((out / "selection.json").read_text())
    columns = {}
    for name, sha256 in held["columns"].items():
        assert hashlib.sha256((out / f"{name}.npy").read_bytes()).hexdigest() == sha256
        columns[name] = np.load(out / f"{name}.npy", allow_pickle=False)
    return held, columns


def by_class(columns):
    """{class: [(id, copies), ...]} of a selection."""
    copies = np.bincount(columns["row"], minlength=len(columns["id"]))
    found = {}
    for number, label, n in zip(columns["id"].tolist(), columns["label"].tolist(), copies.tolist(), strict=True):
        found.setdefault(label, []).append((number, n))
    return {label: found[label] for label in sorted(found)}
