"""The weights of d-li14/lambda.pytorch in our model."""

from collections.abc import Mapping
from typing import Any

import torch

from lambdanets.errors import mismatch
from lambdanets.models.create import create_lambda_resnet
from lambdanets.models.resnet import LambdaResNet


def from_d_li14(state_dict: Mapping[str, Any]) -> LambdaResNet:
    """Load the state dict of d-li14's lambda_resnet50 (github.com/d-li14/lambda.pytorch) into `resnet50_llll`.

    state_dict   torchvision's names, `module.` in front or not, and `layerL.B.conv2.` conv_qkv.weight (rows q, k, v;
                 q head-major), norm_q, norm_v, lambda_conv.weight (16, 1, 1, 23, 23) indexed by context - query,
                 lambda_conv.bias (16,)
    returns      a model in training mode whose outputs are theirs: with the constant on the position lambda, and
                 3x3 pooling that counts the padding. As many classes as `fc` has; dtype and device of the weights

    Raises RuntimeError, naming at most ten keys a kind, where a key is missing, unknown, or of another shape. The
    layout is that of lambda_layer.py and lambda_resnet.py at commit 7a10beb; published top-1 78.208 (its README).

    >>> model = create_lambda_resnet("resnet50_llll", lambda_args={"position_bias": True, "pool_count_padding": True})
    >>> sum(p.numel() for p in model.parameters())  # 14,995,592 and a bias of 16 in each of 16 layers
    14995848
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    fc = state.get("fc.weight")
    model = create_lambda_resnet(
        "resnet50_llll",
        num_classes=1000 if fc is None else len(fc),
        lambda_args={"position_bias": True, "pool_count_padding": True},
    )
    # What their model would have, from ours. Ours has a place for pooling at the start of each shortcut.
    shapes = {_shortcut(key, -1): tuple(value.shape) for key, value in model.state_dict().items()}
    rows: dict[str, list[int]] = {key.removesuffix("table"): [] for key in shapes if key.endswith("conv2.table")}
    for at in rows:
        parts = [shapes.pop(f"{at}to_{part}.weight") for part in "qkv"]
        rows[at] = [part[0] for part in parts]
        r_y, r_x, k, u = shapes.pop(f"{at}table")
        shapes[f"{at}conv_qkv.weight"] = (sum(rows[at]), *parts[0][1:])
        shapes[f"{at}lambda_conv.weight"] = (k, u, 1, r_y, r_x)
        shapes[f"{at}lambda_conv.bias"] = shapes.pop(f"{at}position_bias")
    wrong = {key: (shapes[key], tuple(state[key].shape)) for key in shapes.keys() & state.keys()}
    wrong = {key: pair for key, pair in sorted(wrong.items()) if pair[0] != pair[1]}
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if wrong or missing or extra:
        raise RuntimeError(mismatch("d-li14's lambda_resnet50", wrong, missing, extra))

    for at, counts in rows.items():
        for part, weight in zip("qkv", state.pop(f"{at}conv_qkv.weight").split(counts), strict=True):
            state[f"{at}to_{part}.weight"] = weight
        state[f"{at}table"] = state.pop(f"{at}lambda_conv.weight")[:, :, 0].permute(2, 3, 0, 1)
        state[f"{at}position_bias"] = state.pop(f"{at}lambda_conv.bias")
    # Copies: the rows of conv_qkv share one memory, and the caller goes on with its state dict.
    own = {_shortcut(key, 1): v.detach().clone(memory_format=torch.contiguous_format) for key, v in state.items()}
    model.load_state_dict(own, assign=True)  # in their own dtype: copied into ours they would be rounded
    return model


def _shortcut(key: str, by: int) -> str:
    """Move the index in `layerL.B.downsample.INDEX.rest`; other keys as they are."""
    front, found, rest = key.partition(".downsample.")
    if not found:
        return key
    index, dot, rest = rest.partition(".")
    return f"{front}{found}{int(index) + by}{dot}{rest}"
