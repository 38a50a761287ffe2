"""A folder of labels: labels.json says who labelled what and how, and a parquet file a shard has a row a picture.

    labels.json               format, plan, plan_sha256, versions; written first
    train-00000.parquet ...   the columns of `schema`, rows in the shard's order, none left out

A file's existence is the only record that its shard is done. Two files are equal if their `content_sha256` are: the
bytes of parquet differ between versions of pyarrow. Which columns there are, and why: docs/pseudo-labels.md.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from lambdanets.errors import need

FORMAT = "lambdanets labels 1"
LABELS_JSON = "labels.json"
SUFFIX = ".parquet"
HASHES = ("bytes_hash", "look_hash")
_INT16_CLASSES = 32_767  # more need 32 bits


def arrow() -> Any:
    """pyarrow. Raises BadRun where it is not installed."""
    need("pyarrow", "pseudo", "labels are kept in parquet files")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def schema(*, classes: int, top: int, hashes: bool) -> Any:
    """The columns of a label file, in order; `top` classes are kept a picture, or all where there are fewer.

    sample       int32, the picture's place in its shard, from 0
    class        the most probable one, the smallest number among equals; -1 where the picture cannot be read
    confidence   float32, 1 - doubt; 0 where it cannot be read
    doubt        float32, the sum of the other classes' probabilities, summed as such; 1 where it cannot be read
    top_class    the most probable classes, by (-probability, number); -1
    top_prob     their probabilities, float16; 0
    bytes_hash, look_hash   uint64, see hashes.py; look_hash is 0 where it cannot be read. Only where `hashes`
    error        why it cannot be read; null where it can
    """
    pa = arrow()
    number = pa.int16() if classes <= _INT16_CLASSES else pa.int32()
    kept = min(top, classes)
    columns = [
        ("sample", pa.int32()),
        ("class", number),
        ("confidence", pa.float32()),
        ("doubt", pa.float32()),
        ("top_class", pa.list_(number, kept)),
        ("top_prob", pa.list_(pa.float16(), kept)),
        *((name, pa.uint64()) for name in HASHES if hashes),
        ("error", pa.string()),
    ]
    return pa.schema(columns)


def content_sha256(table: Any) -> str:
    """Of a label file's values, little-endian, column by column in the schema's order; the same on every machine."""
    digest = hashlib.sha256()
    for name in table.schema.names:
        column = table.column(name).combine_chunks()
        digest.update(f"{name} {column.type}\n".encode())
        if name == "error":
            digest.update(json.dumps(column.to_pylist()).encode())
        else:
            values = column.flatten() if hasattr(column.type, "list_size") else column
            array = values.to_numpy(zero_copy_only=False)
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
