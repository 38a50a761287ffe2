"""What a model costs, from shapes alone: parameters, multiply-adds and the plans of its lambda layers, by stage.

Models are run once on PyTorch's meta device, which has shapes and no data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lambdanets.layers.lambda_layer import LambdaLayer
from lambdanets.layers.spatial import SpatialLayer
from lambdanets.models.create import create_lambda_resnet, list_models
from lambdanets.models.resnet import LambdaResNet
from lambdanets.ops.planner import Plan, plan
from lambdanets.ops.problem import Problem

__all__ = ["StageCost", "model_cost", "models_text", "plan_text"]


@dataclass(frozen=True)
class StageCost:
    """One stage for one image.

    stage         "stem", "c2" .. "c5" or "head"
    blocks, lambdas   bottlenecks, and how many of them hold a lambda layer
    map_px        height and width of what it returns
    params        parameters
    macs          multiply-adds by the paper's convention (`Problem.paper_macs`); GFLOPs are 2e-9 times this
    lambda_macs   the part of `macs` inside lambda operations
    plans         the plan of each different lambda problem in the stage, for the batch asked for
    """

    stage: str
    blocks: int
    lambdas: int
    map_px: tuple[int, int]
    params: int
    macs: int
    lambda_macs: int
    plans: tuple[Plan, ...]


def model_cost(
    model: str | LambdaResNet,
    image_px: int | tuple[int, int] = 224,
    *,
    batch_images: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[StageCost]:
    """Count parameters and multiply-adds of every stage.

    model         a name of `list_models()`, or a LambdaResNet on the meta device
    image_px      side, or (height, width)
    batch_images, dtype, device   what the plans of the lambda layers are made for; the counts are for one image

    >>> round(2e-9 * sum(s.macs for s in model_cost("resnet50_llll", 224)), 1)  # paper: 12.0
    12.0
    """
    if isinstance(model, str):
        with torch.device("meta"):
            model = create_lambda_resnet(model)
    model = model.eval()
    sides = (image_px, image_px) if isinstance(image_px, int) else tuple(image_px)
    if min(sides) < 1:
        raise ValueError(f"image_px must be positive and is {image_px}")
    stage_of = dict.fromkeys(("conv1", "bn1", "act1", "maxpool"), "stem")
    stage_of |= {f"layer{i}": f"c{i + 1}" for i in range(1, 5)} | {"global_pool": "head", "fc": "head"}
    macs = dict.fromkeys(stage_of.values(), 0)
    inside, maps = dict(macs), dict.fromkeys(macs, (1, 1))
    plans: dict[str, dict[Problem, Plan]] = {s: {} for s in macs}

    def count(stage: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, LambdaLayer):
            problem = module.problem(args[0])
            inside[stage] += problem.paper_macs
            macs[stage] += problem.paper_macs
            asked = replace(problem, b=batch_images, dtype=dtype, device=device)
            plans[stage].setdefault(asked, plan(asked))
        elif isinstance(module, SpatialLayer):
            macs[stage] += module.mixing_macs(*args[0].shape[2:])
        elif isinstance(module, nn.Conv2d | nn.Linear):
            macs[stage] += out.numel() * module.weight[0].numel()
        if out.dim() == 4 and stage != "head":
            maps[stage] = (out.shape[2], out.shape[3])

    hooks = []
    for name, module in model.named_modules():
        stage = stage_of.get(name.split(".")[0])
        if stage is not None:

            def hook(m: nn.Module, args: tuple[Tensor, ...], out: Tensor, stage: str = stage) -> None:
                count(stage, m, args, out)

            hooks.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
            model(torch.empty(1, channels, *sides, device="meta"))
    finally:
        for h in hooks:
            h.remove()

    rows = []
    for stage in macs:
        parts = [getattr(model, name) for name, s in stage_of.items() if s == stage]
        layers = [m for p in parts for m in p.modules() if isinstance(m, LambdaLayer)]
        params = {id(t): t.numel() for p in parts for t in p.parameters()}
        blocks = len(parts[0]) if stage.startswith("c") else 0
        chosen = tuple(plans[stage].values())
        total = sum(params.values())
        rows.append(StageCost(stage, blocks, len(layers), maps[stage], total, macs[stage], inside[stage], chosen))
    return rows


def plan_text(
    name: str, image_px: int = 224, *, batch_images: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> str:
    """The table that `lambdanets plan` prints: each stage's cost, then each lambda problem's plan."""
    rows = model_cost(name, image_px, batch_images=batch_images, dtype=dtype, device=device)
    total, params = sum(r.macs for r in rows), sum(r.params for r in rows)
    lines = [
        f"{name} at {image_px} px: {params:,} parameters, {2e-9 * total:.2f} GFLOPs an image (2 x multiply-adds)",
        "",
        f"{'stage':<6} {'blocks':>6} {'lambda':>6} {'map':>9} {'params':>12} {'GFLOPs':>8} {'in lambdas':>10}"
        "  strategy",
    ]
    for r in rows:
        chosen = ", ".join(dict.fromkeys(p[0].strategy for p in r.plans))
        lines.append(
            f"{r.stage:<6} {r.blocks or '':>6} {r.lambdas or '':>6} "
            f"{'x'.join(map(str, r.map_px)):>9} {r.params:12,} "
            f"{2e-9 * r.macs:8.3f} {2e-9 * r.lambda_macs:10.3f}  {chosen}"
        )
    for r in rows:
        for p in r.plans:
            lines += ["", f"{r.stage}: {p}"]
    return "\n".join(lines)


def models_text(image_px: int = 224, *, detector_params: Callable[[str], int] | None = None) -> str:
    """The table that `lambdanets models` prints: names, parameters, GFLOPs, where the lambda layers are.

    detector_params   of the detector on a model of that name: a column more
    """
    more = "" if detector_params is None else f" {'of a detector':>13}"
    lines = [f"{'model':<22} {'params':>12}{more} {f'GFLOPs at {image_px}':>14}  blocks (lambda layers) in c2..c5"]
    for name in list_models():
        rows = model_cost(name, image_px)
        stages = "  ".join(f"{r.blocks} ({r.lambdas})" for r in rows if r.stage.startswith("c"))
        total = 2e-9 * sum(r.macs for r in rows)
        more = "" if detector_params is None else f" {detector_params(name):13,}"
        lines.append(f"{name:<22} {sum(r.params for r in rows):12,}{more} {total:14.2f}  {stages}")
    return "\n".join(lines)
