"""A folder of labels, here or on a store: labels.json says who labelled what and how, a parquet file a shard has a row
a picture.

    labels.json               format, plan, plan_sha256, places, versions; written first
    train-00000.parquet ...   the columns of `schema`, rows in the shard's order, none left out

A file's existence is the only record that its shard is done: every writer writes the same, whole or not at all, so a
shard that is done twice harms nothing. Two files are equal if their `content_sha256` are: the bytes of parquet differ
between versions of pyarrow. Which columns there are, and why: docs/pseudo-labels.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lambdanets.data.archive import check_source, filesystem, join, on_disk, retried
from lambdanets.data.shards import ShardImages, is_shards, open_pictures
from lambdanets.errors import BadData, DiskFault, need, printable, some
from lambdanets.files import field, json_object, open_file, placed, read_file

FORMAT = "lambdanets labels 1"
LABELS_JSON = "labels.json"
SUFFIX = ".parquet"
HASHES = ("bytes_hash", "look_hash")
_INT16_CLASSES = 32_767  # more need 32 bits
_LEAST_BYTES = 12  # of any parquet file
_KEY = b"lambdanets"  # of what a file's footer says, as JSON
_JSON_BYTES = 16 << 20  # 21,000 classes with long names take 2 MB
_FILE_BYTES = 1 << 30  # a million rows take 63 MB


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
        is_list = hasattr(column.type, "list_size")  # whose type is written in one way before a file, in another after
        kind = f"{column.type.value_type} {column.type.list_size}" if is_list else str(column.type)
        digest.update(f"{name} {kind}\n".encode())
        if name == "error":
            digest.update(json.dumps(column.to_pylist()).encode())
        else:
            values = column.flatten() if is_list else column
            array = values.to_numpy(zero_copy_only=False)
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


# ---- labels.json


def sha256_of_plan(plan: Mapping[str, Any]) -> str:
    """Of a plan, however its JSON is written.

    >>> sha256_of_plan({"top": 10, "fused": True}) == sha256_of_plan({"fused": True, "top": 10})
    True
    """
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Labels:
    """A folder of labels as its labels.json tells of it.

    home      the folder or URL
    plan      what decides every value: {teacher: {source, weights_sha256, model, view, classes}, data: {fingerprint,
              shards, samples}, batch_images, precision, cpu_threads, fused, top, hashes, softmax}; no place that may
              move is in it
    places    where teacher and data lay: {teacher, data, allow_sources}
    versions  of the packages that began it
    """

    home: str
    plan: dict[str, Any]
    places: dict[str, Any]
    versions: dict[str, Any]

    @property
    def plan_sha256(self) -> str:
        return sha256_of_plan(self.plan)

    @property
    def classes(self) -> tuple[str, ...]:
        """The teacher's; a label is a position here."""
        return tuple(self.plan["teacher"]["classes"])

    @property
    def schema(self) -> Any:
        """The columns of its files."""
        return schema(classes=len(self.classes), top=self.plan["top"], hashes=self.plan["hashes"])

    def json(self) -> bytes:
        held = {"format": FORMAT, "plan": self.plan, "plan_sha256": self.plan_sha256}
        held |= {"places": self.places, "versions": self.versions}
        return (json.dumps(held, indent=1, allow_nan=False) + "\n").encode()


def file_of(shard: str) -> str:
    """The name of a shard's label file.

    >>> file_of("train-00000.tar")
    'train-00000.parquet'
    """
    return shard.removesuffix(".tar") + SUFFIX


def read_labels(home: str | Path) -> Labels:
    """Reads and checks HOME/labels.json. Raises BadData where there is none, or it is damaged."""
    home = str(home)
    where = join(home, LABELS_JSON)
    try:
        content = _read(home, LABELS_JSON, _JSON_BYTES)
    except BadData as error:
        raise BadData(
            f"{printable(home)} is no folder of labels: {printable(error)}; lambdanets label makes one"
        ) from error
    return _labels(home, where, content)


def _labels(home: str, where: str, content: bytes) -> Labels:
    try:
        held = json_object(content)
        if held.get("format") != FORMAT:
            raise ValueError(f"its format is {str(held.get('format'))[:60]!r}, not {FORMAT!r}")
        plan = field(held, "plan", dict)
        teacher, data = field(plan, "teacher", dict), field(plan, "data", dict)
        classes = field(teacher, "classes", list)
        if len(classes) < 2 or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
            raise ValueError("the teacher's 'classes' should be different names, two at least")
        field(teacher, "weights_sha256", str), field(data, "fingerprint", str), field(plan, "hashes", bool)
        for of, name in ((plan, "top"), (plan, "batch_images"), (data, "shards"), (data, "samples")):
            if field(of, name, int) < 1:
                raise ValueError(f"its {name!r} is {of[name]}")
        found = Labels(home, plan, field(held, "places", dict), field(held, "versions", dict))
        if field(held, "plan_sha256", str) != found.plan_sha256:
            raise ValueError("its 'plan_sha256' is not that of its plan: somebody changed it")
    except ValueError as error:
        raise BadData(f"{where} does not tell of labels: {printable(error)}") from error
    return found


def begin(wanted: Labels) -> Labels:
    """Writes labels.json where there is none, and reads what is there then; `check_plan` compares the two.

    Of several processes that begin at once one writes. Raises BadData: a place that holds something else; a disk that
    takes nothing.
    """
    home = wanted.home
    _, path, local = filesystem(home)
    if not _is_there(home):
        try:
            if local:
                _begin_here(Path(path), wanted.json())
            else:
                _send(home, LABELS_JSON, wanted.json(), exclusive=True)
        except OSError as error:
            raise BadData(_not_written(join(home, LABELS_JSON), wanted.json(), error)) from error
    return read_labels(home)  # of a store that let two begin at once, the last one's


def check_plan(held: Labels, wanted: Labels) -> None:
    """Raises BadData that names each field in which two plans differ."""
    if differing := _differences(held.plan, wanted.plan):
        remedy = "ask for the same, or give another --out"
        raise BadData(f"{held.home} holds labels of another plan: {some(differing, between='; ')}: {remedy}")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        inner = (_differences(old.get(name), new.get(name), f"{path}.{name}" if path else name) for name in names)
        return [line for lines in inner for line in lines]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 8:
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        told = [
            f"{len(of):,}, number {first} {json.dumps(of[first]) if first < len(of) else 'none'}" for of in (old, new)
        ]
        return [f"{path} was {told[0]}, and is {told[1]}"]
    return [f"{path} was {json.dumps(old)}, and is {json.dumps(new)}"]


def _is_there(home: str) -> bool:
    found, path, local = filesystem(join(home, LABELS_JSON))
    if local:
        return os.path.lexists(path)
    return bool(retried(join(home, LABELS_JSON), lambda: found.exists(path)))


def _begin_here(folder: Path, content: bytes) -> None:
    """Writes labels.json so that the first one stays, whole. Raises OSError."""
    if folder.exists() and not folder.is_dir():
        raise BadData(f"{folder} is a file: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in os.listdir(folder) if not name.startswith(".")]
    if others and LABELS_JSON not in others:
        raise BadData(
            f"{folder} is not empty (it holds {printable(min(others))}) and no folder of labels: name a new one"
        )
    beside = folder / f".{LABELS_JSON}.{secrets.token_hex(4)}"
    try:
        with placed(beside) as file:
            file.write(content)
        try:
            os.link(beside, folder / LABELS_JSON)
        except FileExistsError:
            return  # another process was first
        except OSError:  # a disk without hard links
            os.replace(beside, folder / LABELS_JSON)
    finally:
        beside.unlink(missing_ok=True)


# ---- label files


class Footer(NamedTuple):
    """What a label file says of itself.

    plan_sha256, shard, shard_sha256   of which plan and of which shard it is
    samples, bad                       rows, and those whose picture cannot be read
    content_sha256                     of its values
    device, versions                   what computed it
    """

    plan_sha256: str
    shard: str
    shard_sha256: str
    samples: int
    bad: int
    content_sha256: str
    device: str
    versions: dict[str, Any]


def finished(home: str) -> set[str]:
    """The names of the label files that are there, by one listing; none is read. Raises BadData, DiskFault."""
    found, path, local = filesystem(home)
    if local:

        def listed() -> list[tuple[str, int]]:
            with os.scandir(path) as entries:
                return [(e.name, e.stat().st_size) for e in entries if e.name.endswith(SUFFIX)]

        sizes = on_disk(home, listed)
    else:
        found.invalidate_cache(path)  # else a store's client may tell what it was told before
        entries = retried(home, lambda: found.ls(path, detail=True))
        sizes = [(str(e["name"]).rpartition("/")[2], int(e.get("size") or 0)) for e in entries]
    return {name for name, size in sizes if name.endswith(SUFFIX) and name[0] != "." and size >= _LEAST_BYTES}


def file_bytes(
    table: Any, *, labels: Labels, shard: str, shard_sha256: str, device: str, versions: dict[str, Any]
) -> bytes:
    """A label file: zstd, one row group. The same bytes for the same values with one installation of pyarrow."""
    pa = arrow()
    footer = Footer(
        labels.plan_sha256, shard, shard_sha256, table.num_rows, table.num_rows - table.column("error").null_count,
        content_sha256(table), device, versions,
    )  # fmt: skip
    told = json.dumps({"format": FORMAT, **footer._asdict()})
    buffer = io.BytesIO()
    with_footer = table.replace_schema_metadata({_KEY: told.encode()})
    pa.parquet.write_table(with_footer, buffer, compression="zstd", row_group_size=max(1, table.num_rows))
    return buffer.getvalue()


def write(home: str, shard: str, content: bytes) -> None:
    """Puts a shard's label file in its place, whole or not at all. Raises BadData with path and bytes."""
    name = file_of(shard)
    _, path, local = filesystem(join(home, name))
    try:
        if local:
            with placed(path) as file:
                file.write(content)
        else:
            _send(home, name, content)
    except OSError as error:
        raise BadData(_not_written(join(home, name), content, error)) from error


def _not_written(where: str, content: bytes, error: OSError) -> str:
    why = error.strerror or error
    remedy = "free space or choose another place, and give the same command: finished shards are kept"
    return f"{where}, {len(content):,} bytes, cannot be written: {why}; {remedy}"


def _send(home: str, name: str, content: bytes, *, exclusive: bool = False) -> None:
    """One request to a store, which shows the object whole or not at all.

    exclusive  asks the store not to replace an object; one that has no such promise replaces it
    """
    where = join(home, name)
    found, path, _ = filesystem(where)

    def once() -> None:
        if exclusive:
            try:
                found.pipe_file(path, content, mode="create")
                return
            except FileExistsError:
                return
            except (TypeError, ValueError, NotImplementedError):  # it knows no such mode
                pass
        found.pipe_file(path, content)

    retried(where, once)


def read_file_of(labels: Labels, name: str) -> tuple[Any, Footer]:
    """One label file: its table and what it says of itself, compared with the plan and with its own content_sha256.

    Raises BadData that names the file and the remedy: cut, changed, of another plan, of other columns.
    """
    where = join(labels.home, name)
    remedy = "remove it, and label again with the same command"
    content = _read(labels.home, name, _FILE_BYTES)
    pa = arrow()
    try:
        table = pa.parquet.read_table(io.BytesIO(content), use_threads=False)
        footer = _footer(table.schema.metadata or {})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{where} is damaged, or no label file: {printable(str(error)[:300])}; {remedy}") from error
    check_footer(labels, name, footer)
    if not table.schema.equals(labels.schema):
        raise BadData(f"{where} has other columns than its plan says ({some(table.schema.names)}): {remedy}")
    table = table.replace_schema_metadata(None)
    if (seen := content_sha256(table)) != footer.content_sha256:
        raise BadData(f"{where} is damaged: its values have the sha256 {seen}, not {footer.content_sha256}; {remedy}")
    if table.num_rows != footer.samples:
        raise BadData(f"{where} has {table.num_rows:,} rows, and says {footer.samples:,}; {remedy}")
    return table, footer


def check_footer(labels: Labels, name: str, footer: Footer) -> None:
    """Raises BadData where a label file is not one of these labels, or is under another shard's name."""
    where = join(labels.home, name)
    if footer.plan_sha256 != labels.plan_sha256:
        remedy = "remove it, and label again with the same command"
        raise BadData(f"{where} is of another plan than {LABELS_JSON} ({footer.plan_sha256[:12]}): {remedy}")
    if file_of(footer.shard) != name:
        raise BadData(f"{where} has the labels of {printable(footer.shard)}: somebody renamed it; label again")


def read_footer(labels: Labels, name: str) -> Footer:
    """What a label file says of itself, its rows unread; compared with the plan. Raises BadData."""
    return read_columns(labels, name)[1]


def read_columns(labels: Labels, name: str) -> tuple[Any, Footer]:
    """The schema of a label file as it is, which may be none of ours, and `read_footer`, by one reading."""
    where = join(labels.home, name)
    found, path, local = filesystem(where)
    pa = arrow()

    def read() -> Any:
        with open_file(path) if local else found.open(path, "rb") as file:
            try:
                return pa.parquet.read_schema(file)
            except OSError as error:
                if error.errno is not None:  # the system's
                    raise
                raise ValueError(str(error)) from error  # pyarrow's own: the content is none of its format

    try:
        columns = on_disk(where, read) if local else retried(where, read)
        footer = _footer(columns.metadata or {})
    except DiskFault:
        raise
    except (pa.ArrowException, ValueError) as error:
        remedy = "remove it, and label again with the same command"
        raise BadData(f"{where} is damaged, or no label file: {printable(str(error)[:300])}; {remedy}") from error
    check_footer(labels, name, footer)
    return columns, footer


def _footer(metadata: Mapping[bytes, bytes]) -> Footer:
    held = json_object(metadata.get(_KEY, b"{}"))
    if held.get("format") != FORMAT:
        raise ValueError(f"its footer's format is {str(held.get('format'))[:60]!r}, not {FORMAT!r}")
    kinds = {"samples": int, "bad": int, "versions": dict}
    return Footer(*(field(held, name, kinds.get(name, str)) for name in Footer._fields))


def _read(home: str, name: str, most_bytes: int) -> bytes:
    where = join(home, name)
    found, path, local = filesystem(where)
    if local:
        return on_disk(where, lambda: read_file(path, most_bytes))

    def once() -> bytes:
        if int(found.info(path)["size"]) > most_bytes:
            raise BadData(f"{where} has more than {most_bytes:,} bytes")
        return bytes(found.cat_file(path))

    return retried(where, once)


def labelled_pictures(
    labels: Labels, data: str | Path | None, *, allow_sources: Sequence[str] = (), look_at_shards: bool = True
) -> ShardImages:
    """The shards that were labelled: where they are now (data), or None: where they lay then; see `open_pictures`.

    Raises BadData: they are not there, or others are; a place that the user did not name.
    """
    where = data
    if where is None:
        where = labels.places.get("data")
        if not isinstance(where, str):
            raise BadData(f"{labels.home} does not say where the shards are: give --data SHARDS")
        check_source(where, (labels.home, *allow_sources), join(labels.home, LABELS_JSON))
    if not is_shards(where):
        raise BadData(f"the shards that were labelled are not in {where}: say where they lie now, with --data SHARDS")
    images = open_pictures(where, allow_sources=allow_sources, look_at_shards=look_at_shards)
    if images.fingerprint() != labels.plan["data"]["fingerprint"]:
        remedy = "give the shards that were labelled, with --data"
        raise BadData(f"{printable(where)} holds other shards than {labels.home} has labelled: {remedy}")
    return images
