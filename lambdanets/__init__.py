"""LambdaNetworks (Bello, ICLR 2021): the exact operation, its layer, the LambdaResNets, and what trains them.

Names are imported when they are first used, so that `lambdanets --help` need not wait for PyTorch. The models are
registered with timm as soon as timm is there.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "lambda_op": "ops",
    "plan": "ops",
    "Problem": "ops",
    "LambdaLayer": "layers.lambda_layer",
    "LambdaLayer1d": "layers.lambda_layer",
    "LambdaLayer3d": "layers.lambda_layer",
    "resize_table": "layers.loading",
    "LambdaResNet": "models.resnet",
    "create_model": "models.create",
    "list_models": "models.create",
    "model_cost": "models.cost",
    "accelerate": "models.timm_layers",
    "from_d_li14": "models.d_li14",
    "fuse": "models.fuse",
    "create_detector": "detection.detector",
    "Detector": "detection.detector",
    "HeadSizes": "detection.detector",
    "paste": "detection.masks",
}

__all__ = [
    "Detector",
    "HeadSizes",
    "LambdaLayer",
    "LambdaLayer1d",
    "LambdaLayer3d",
    "LambdaResNet",
    "Problem",
    "accelerate",
    "create_detector",
    "create_model",
    "from_d_li14",
    "fuse",
    "lambda_op",
    "list_models",
    "model_cost",
    "paste",
    "plan",
    "resize_table",
]

if TYPE_CHECKING:
    from lambdanets.detection.detector import Detector, HeadSizes, create_detector
    from lambdanets.detection.masks import paste
    from lambdanets.layers.lambda_layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d
    from lambdanets.layers.loading import resize_table
    from lambdanets.models.cost import model_cost
    from lambdanets.models.create import create_model, list_models
    from lambdanets.models.d_li14 import from_d_li14
    from lambdanets.models.fuse import fuse
    from lambdanets.models.resnet import LambdaResNet
    from lambdanets.models.timm_layers import accelerate
    from lambdanets.ops import lambda_op
    from lambdanets.ops.planner import plan
    from lambdanets.ops.problem import Problem


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lambdanets has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Imports `lambdanets.models.create`, which registers our models, right after `timm.models` is, whoever imports it.

    So `import lambdanets, timm` in either order is enough for `timm.create_model("lambda_resnet152")`.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module(f"{__name__}.models.create")

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    importlib.import_module(f"{__name__}.models.create")
else:
    sys.meta_path.insert(0, _AfterTimm())
