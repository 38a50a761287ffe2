"""Files beside a manifest: the columns of an index, and what says more of pictures than a label; here or on a store."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lambdanets.data.archive import filesystem, join, on_disk, read, retried
from lambdanets.data.manifest import COLUMNS, MANIFEST, Manifest
from lambdanets.errors import BadData, DiskFault, printable
from lambdanets.files import open_file, placed

_HEADER_BYTES = 1 << 16  # an index file's, at most
_PART_BYTES = 16 << 20  # of a remote index, a read
_FILE_BYTES = 4 << 30  # of `Manifest.files`


def column(home: str, held: Manifest, split: str, name: str, *, compare: bool = True) -> np.ndarray[Any, Any]:
    """A column of the index, mapped; compared with its sha256 (a damaged copy of a remote one is fetched again)."""
    file, sha256 = f"{split}.{name}.npy", held.columns[split][name]
    n = sum(shard.samples for shard in held.splits[split])
    dtype = np.dtype(COLUMNS[name])
    where = join(home, file)
    _, path, local = filesystem(where)
    remedy = f"copy the index again, or remove {MANIFEST} and make it again"
    if not local:
        return array(_fetched(home, file, sha256, n * dtype.itemsize, compare=compare), where, dtype, n, remedy)
    mapped = array(path, where, dtype, n, remedy)
    if compare and (seen := on_disk(where, lambda: sha256_of(path))) != sha256:
        raise BadData(f"{where}: its sha256 is {seen}, not the manifest's {sha256}, so it was changed: {remedy}")
    return mapped


def file_beside(home: str, held: Manifest, name: str) -> Path:
    """One of `Manifest.files` on this machine, compared with its sha256; of a remote one a copy, kept under that."""
    where, sha256 = join(home, name), held.files[name]
    _, path, local = filesystem(where)
    if not local:
        return _fetched(home, name, sha256, _FILE_BYTES, compare=True)
    try:
        seen = on_disk(where, lambda: sha256_of(path))
    except DiskFault as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise BadData(f"{where} is missing, and {MANIFEST} names it: copy it again") from error
        raise
    if seen != sha256:
        remedy = "copy it again, or pack the pictures anew, into a new folder"
        raise BadData(f"{where}: its sha256 is {seen}, not the manifest's {sha256}, so it was changed: {remedy}")
    return Path(path)


# numpy lets Python parse a header, and CPython 3.11's parser counts its depth for all threads together: two at once can
# fail ("AST constructor recursion depth mismatch").
_PARSER = threading.Lock()


def array(path: str | Path, where: str, dtype: np.dtype[Any], n: int, remedy: str) -> np.ndarray[Any, Any]:
    """A .npy file of unknown origin, mapped, if it holds n values of that type. Raises BadData with `remedy`."""
    try:
        with on_disk(where, lambda: open_file(path)) as file:
            if np.lib.format.read_magic(file) != (1, 0):  # whose header has at most 65,535 bytes
                raise ValueError("its header is not that of version 1.0")
            with _PARSER:
                shape, _, found = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
        if found.hasobject:
            raise ValueError("it holds pickled objects")
    except DiskFault:
        raise
    except OSError as error:
        raise DiskFault(where, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy parses Python there: SyntaxError, TokenError, RecursionError ...
        raise BadData(f"{where} is no index: {printable(error)[:200]}; {remedy}") from error
    if shape != (n,) or found != dtype:
        raise BadData(f"{where} holds {found} {str(shape)[:60]} instead of {dtype} ({n},): it belongs to other shards")
    if size != start + n * dtype.itemsize:
        raise BadData(f"{where} has {size:,} bytes, where {n:,} samples take {start + n * dtype.itemsize:,}; {remedy}")
    return np.memmap(path, dtype, "r", offset=start, shape=(n,))


def sha256_of(path: str | Path) -> str:
    """Of a file's content. Raises OSError."""
    digest, part = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open_file(path) as file:
        while size := file.readinto(part):  # type: ignore[attr-defined]  # a buffered file's
            digest.update(part[:size])
    return digest.hexdigest()


def _fetched(home: str, name: str, sha256: str, most_bytes: int, *, compare: bool) -> Path:
    """The copy of a remote index file, named by its hash."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lambdanets"
    if not os.access(next(place for place in (cache, *cache.parents) if place.exists()), os.W_OK):
        cache = Path(tempfile.gettempdir()) / f"lambdanets-{os.getuid()}"
    place, where = cache / f"{sha256}{PurePosixPath(name).suffix}", join(home, name)
    if place.is_file() and (not compare or on_disk(str(place), lambda: sha256_of(place)) == sha256):
        return place
    found, path, _ = filesystem(where)
    size = retried(where, lambda: int(found.info(path)["size"]))
    if not 0 < size <= most_bytes + _HEADER_BYTES:
        raise BadData(f"{where} has {size:,} bytes, where the samples of the manifest take {most_bytes:,}")
    digest = hashlib.sha256()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with placed(place) as file:
            for start in range(0, size, _PART_BYTES):
                part = read(home, name, start, min(start + _PART_BYTES, size))
                digest.update(part)
                file.write(part)
            if digest.hexdigest() != sha256:
                seen = digest.hexdigest()
                raise BadData(f"{where} has the sha256 {seen}, the manifest {sha256}: copy the index again")
    except OSError as error:
        raise BadData(f"{where} cannot be kept in {cache}: {error.strerror or error}: free space there") from error
    return place
