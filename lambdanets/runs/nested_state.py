"""A training state, nested as torch's state_dicts are, taken apart into named tensors and JSON, and put together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
"""What a tensor may hold, and what the safetensors format calls it."""


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A nested state as named tensors and a tree that JSON can hold; `unflatten` gives the same back, to the bit.

    state  dict (keys str or int), list, tuple, tensor, number, str, bool, None, in any depth: the state_dict of a
           model, of an optimiser, of a random generator
    The names are paths: "optimizer/state/0/exp_avg". A tensor's memory format is kept with it: after a resume in
    another one the same step would be computed in another order. Raises TypeError, with the path, for anything else.

    >>> tensors, tree = flatten({"a": {0: torch.ones(2), "lr": 0.1}, "betas": (0.9, None)})
    >>> list(tensors), tree["betas"]
    (['a/0'], {'$tuple': [0.9, None]})
    >>> unflatten(tensors, tree)
    {'a': {0: tensor([1., 1.]), 'lr': 0.1}, 'betas': (0.9, None)}
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.dtype not in DTYPES:
                found = f"{path or 'the state'} is a tensor of {value.dtype}, {value.layout}"
                raise TypeError(f"{found}: dense ones of {', '.join(map(str, DTYPES))} can be saved")
            name = path or "tensor"
            while name in tensors or name == "__metadata__":  # {"a/b": x} beside {"a": {"b": x}}; safetensors' own
                name += "'"
            tensors[name] = value.detach()
            strides = list(torch.empty_like(value, device="meta").stride())
            return {"$tensor": name} if value.is_contiguous() else {"$tensor": name, "strides": strides}
        if value is None or isinstance(value, (bool, str, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(float(value))}
        if type(value) in (list, tuple):
            items = [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            if wrong := [k for k in value if type(k) not in (str, int)]:
                raise TypeError(f"{path or 'the state'} has the key {wrong[0]!r}: keys are str or int")
            pairs = [(k, walk(v, f"{path}/{k}" if path else str(k))) for k, v in value.items()]
            plain = all(isinstance(k, str) and not k.startswith("$") for k in value)
            return dict(pairs) if plain else {"$items": [[k, v] for k, v in pairs]}
        raise TypeError(
            f"{path or 'the state'} is a {type(value).__name__}: a checkpoint holds dicts, lists, tuples, tensors, "
            "numbers, strings and None"
        )

    return tensors, walk(state, "")


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The state that `flatten` took apart. Raises KeyError where the tree names a tensor that is not there."""
    if isinstance(tree, list):
        return [unflatten(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        value = tensors[tree["$tensor"]]
        strides = tree.get("strides")
        return value if strides is None else torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)
    if "$tuple" in tree:
        return tuple(unflatten(tensors, item) for item in tree["$tuple"])
    if "$float" in tree:
        return float(tree["$float"])
    if "$items" in tree:
        return {key: unflatten(tensors, value) for key, value in tree["$items"]}
    return {key: unflatten(tensors, value) for key, value in tree.items()}


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, tensor by tensor: each is hashed and written from where it lies.

    Not safetensors' own `save`, which holds the interpreter for another copy of all, nor its `save_file`, whose errors
    are not the system's. Widest elements first, as the library has it, so that each tensor is aligned.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data


def is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    wide = value if value.element_size() > 1 else value.float()  # eight-bit floats have no isfinite
    return bool(wide.isfinite().all())
