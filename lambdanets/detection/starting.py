"""First weights of a detector: a classifier's body, another detector, torchvision's; and offsets never trained."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lambdanets.detection.detector import Detector
from lambdanets.errors import BadRun, printable
from lambdanets.files import field, open_file, present, read_json
from lambdanets.layers.lambda_layer import LambdaLayer
from lambdanets.runs.checkpoints import is_checkpoint
from lambdanets.runs.record import RUN_JSON
from lambdanets.runs.weights import Weights

_BODY = "backbone.body."
_BY_CLASS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
_OF_MASKS = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")
_OWN_VIEW = ("mean", "std")  # of the data that is to be learnt; torchvision's files have none


def load_detector_weights(
    model: Detector,
    source: str | Path,
    *,
    classes: Sequence[str],
    image_px: int | None = None,
    backbone: str | None = None,
) -> dict[str, str]:
    """Start `model` from weights that were trained before; gives what run.json keeps, as `runs.weights.load_weights`.

    source    a run's folder or its RUN/step-N, of classification (its body is taken) or of detection; or a safetensors
              file with the names of either, or of torchvision's `maskrcnn_resnet50_fpn_v2`
    classes   of the model, by name: the layers that have a class each start new where the source's are others, or where
              their number differs
    backbone  the name of the model's, to be compared with that of the source's run
    image_px  at which a file without a run was trained; needed where the model has lambda layers

    A relative table trained on smaller maps has offsets that no two positions had: they got no gradient and are the
    noise they began as, and on larger maps they would be read. They are set to 0, and it is said how many.
    Raises BadRun: no such file, not finite, names or shapes of another model, or its image size is not known.
    """
    try:
        return _loaded(model, Path(source), classes, image_px, backbone)
    except BadRun as error:
        raise BadRun(f"--init-from {error}") from error


def _loaded(
    model: Detector, path: Path, classes: Sequence[str], image_px: int | None, backbone: str | None
) -> dict[str, str]:
    trained_px, trained_on, trained = _of_its_run(path)
    if None not in (trained, backbone) and trained != backbone:
        raise BadRun(
            f"{path} is a run of {printable(trained)}, and here the backbone is {backbone}: give --model {trained}"
        )
    said = []
    with Weights(path) as found:
        names = _names(model, found.shapes)
        whole = any(name.startswith(_BODY) for name in names)
        part: nn.Module = model if whole else model.backbone.body
        if not whole:  # its classifier stays behind
            names = {ours: theirs for ours, theirs in names.items() if not re.match(r"fc\.|head\.", ours)}
            said.append("the backbone of a classifier; all other layers start new")
        found.rename(names)
        own, shapes = part.state_dict(), found.shapes
        new = [n for n in own if whole and n.startswith(_BY_CLASS) and _differs(n, own, shapes, trained_on, classes)]
        if whole and not new and trained_on is None:
            said.append("its class names are not known and are taken to be these")
        if new:
            new = [n for n in own if n.startswith(_BY_CLASS)]
            said.append(f"its classes are others, so what has a class each starts new for {len(classes)}")
        if whole and not model.masks and any(n.startswith(_OF_MASKS) for n in shapes):
            said.append("its mask head is left out")
        elif whole and model.masks and not any(n.startswith(_OF_MASKS) for n in shapes):
            new += [n for n in own if n.startswith(_OF_MASKS)]
            said.append("it has no mask head, so a new one starts")
        left_out = {*new, *_OWN_VIEW, *(n for n in shapes if not model.masks and n.startswith(_OF_MASKS))}
        taken = [name for name in shapes if name not in left_out]
        if (why := found.misfit(part, taken, may_lack=[*new, *_OWN_VIEW])) is not None:
            raise BadRun(why)
        tensors = found.read(taken)
    tables = _tables(model.backbone.body)
    if tables:
        px = image_px or trained_px
        if px is None:
            raise BadRun(
                f"{path}: it is not known at which image size its relative tables were trained, and offsets that no "
                "map had would be noise: give --init-image-px PX, or name the folder of its run"
            )
        prefix = _BODY if whole else ""
        zeroed, of = _without_unreached(tensors, prefix, model.backbone.body, px)
        if zeroed:
            far = f"{zeroed:,} of {of:,} offsets of its tables are farther than maps of {px} px are wide"
            said.append(f"{far}: untrained, now 0")
    part.load_state_dict(tensors, strict=False)
    with open_file(found.file) as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    text = f"weights from {printable(found.file)}: {'; '.join(said) or 'all of it'}"
    return {"said": text, "source": str(path), "sha256": digest}


def _of_its_run(path: Path) -> tuple[int | None, list[str] | None, str | None]:
    """The image size, the classes and the model that a run tells of; None for a file without one."""
    folder = path.absolute().parent if is_checkpoint(path) or path.is_file() else path
    if not present(folder / RUN_JSON):
        return None, None, None
    try:
        record = read_json(folder / RUN_JSON)
        px = field(field(record, "view", dict), "image_px", int)
        rows: list[Any] = record["categories"] if "categories" in record else record["classes"]
        names = [field(row, "name", str) if isinstance(row, dict) else str(row) for row in rows]
        return px, names, field(field(record, "recipe", dict), "model", str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRun(f"{folder / RUN_JSON} does not tell of a run: {error}") from error


def _names(model: Detector, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Our name -> the file's: torchvision's shortcut has no pooling before its convolution, and lower numbers."""
    theirs = [n for n in shapes if re.fullmatch(r"backbone\.body\.layer\d\.\d+\.downsample\.0\.weight", n)]
    ours = model.state_dict()
    if not theirs or any(n in ours for n in theirs):
        return {name: name for name in shapes}
    pattern = re.compile(r"(backbone\.body\.layer\d\.\d+\.downsample\.)([01])(\..*)")
    return {pattern.sub(lambda m: f"{m[1]}{int(m[2]) + 1}{m[3]}", name): name for name in shapes}


def _differs(
    name: str,
    own: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    trained_on: Sequence[str] | None,
    classes: Sequence[str],
) -> bool:
    others = trained_on is not None and list(trained_on) != list(classes)
    return others or (name in shapes and tuple(own[name].shape) != shapes[name])


def _tables(body: nn.Module) -> dict[str, LambdaLayer]:
    """Name of its table -> layer."""
    layers = {f"{name}.table": m for name, m in body.named_modules() if isinstance(m, LambdaLayer)}
    return {name: layer for name, layer in layers.items() if layer.table is not None and layer.ndim == 2}


def map_sides(body: nn.Module, image_px: int) -> dict[str, tuple[int, int]]:
    """Name of a relative table -> height and width of the largest map that it saw in square images of that size."""
    shadow = copy.deepcopy(body).to("meta").eval()
    names = {id(layer): name for name, layer in _tables(shadow).items()}
    sides: dict[str, tuple[int, int]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        sides[names[id(layer)]] = tuple(inputs[0].shape[2:])

    hooks = [layer.register_forward_pre_hook(note) for layer in _tables(shadow).values()]
    first = next(m for m in shadow.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        maps: Any = shadow
        maps.forward_maps(torch.zeros(1, first.in_channels, image_px, image_px, device="meta"))
    for hook in hooks:
        hook.remove()
    shared: dict[int, tuple[int, int]] = {}  # several layers may have one table
    tables = {name: id(layer.table) for name, layer in _tables(body).items()}
    for name, (height, width) in sides.items():
        before = shared.get(tables[name], (0, 0))
        shared[tables[name]] = max(before[0], height), max(before[1], width)
    return {name: shared[tables[name]] for name in sides}


def _without_unreached(tensors: dict[str, Tensor], prefix: str, body: nn.Module, image_px: int) -> tuple[int, int]:
    """Set to 0, in place, the offsets of each table at least as far as its map is wide; how many, of how many."""
    zeroed = of = 0
    seen: set[int] = set()
    tables = _tables(body)
    for name, (height, width) in map_sides(body, image_px).items():
        held = tensors.get(prefix + name)
        if held is None:
            continue
        rows, columns = held.shape[:2]
        far_rows = (torch.arange(rows) - rows // 2).abs() >= height
        far_columns = (torch.arange(columns) - columns // 2).abs() >= width
        far = far_rows[:, None] | far_columns
        held[far] = 0
        if id(tables[name].table) not in seen:
            seen.add(id(tables[name].table))
            zeroed, of = zeroed + int(far.sum()), of + far.numel()
    return zeroed, of
