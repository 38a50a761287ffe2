"""Selections of a few coloured squares, written as `select.py` writes them, for tests that only read them."""

import hashlib
import json

import numpy as np

from lambdanets.data.shards import open_pictures
from lambdanets.pseudo_labels.selection import DRAWS, FORMAT, ROWS, SELECTION_JSON


def write_selection(folder, shards, columns, *, classes, exclude=(), **changes):
    """The selection with these columns: id, label, top_class, top_prob of each row, row of each draw."""
    folder.mkdir(parents=True)
    columns = {"confidence": np.ones(len(columns["id"])), **columns}
    hashes = {}
    for name, dtype in {**ROWS, **DRAWS}.items():
        np.save(folder / f"{name}.npy", np.asarray(columns[name]).astype(dtype))
        hashes[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    teacher = {"view": {"in_channels": 3}}
    held = {
        "format": FORMAT,
        "labels": {"source": "/labels", "plan_sha256": "0" * 64, "plan": {"teacher": teacher}},
        "pictures": {"source": str(shards), "fingerprint": open_pictures(shards).fingerprint()},
        "classes": list(classes),
        "teacher_sha256": "1" * 64,
        "rule": "label",
        "exclude": list(exclude),
        "top": np.asarray(columns["top_class"]).shape[1],
        "rows": len(columns["id"]),
        "draws": len(columns["row"]),
        "columns": hashes,
        **changes,
    }
    (folder / SELECTION_JSON).write_text(json.dumps(held))
    return folder


def a_selection(folder, shards, **changes):
    """15 of the pictures of `shards` in 21 draws, 7 a class, the two best classes of three kept; what is shown in
    them does not matter."""
    rows = np.arange(15)
    label = rows % 3
    second = (label + 1) % 3
    first = 0.6 + rows / 50
    prob = np.stack([first, (1 - first) / 2], axis=1)
    row = np.sort(np.concatenate([rows, [0, 3, 4, 7, 8, 11]]))  # two copies of some, in each class seven draws
    columns = {"id": rows + rows // 3, "label": label, "top_class": np.stack([label, second], axis=1), "top_prob": prob}
    changes = {"classes": ["blue", "green", "red"], **changes}
    return write_selection(folder, shards, {**columns, "row": row}, **changes)
