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
    "LambdaLayer": "layer",
    "LambdaLayer1d": "layer",
    "LambdaLayer3d": "layer",
    "resize_table": "layer",
    "LambdaResNet": "resnet",
    "create_model": "weights",
    "list_models": "resnet",
    "model_cost": "cost",
    "accelerate": "weights",
    "from_d_li14": "weights",
    "fuse": "inference",
}

__all__ = [
    "LambdaLayer",
    "LambdaLayer1d",
    "LambdaLayer3d",
    "LambdaResNet",
    "Problem",
    "accelerate",
    "create_model",
    "from_d_li14",
    "fuse",
    "lambda_op",
    "list_models",
    "model_cost",
    "plan",
    "resize_table",
]

if TYPE_CHECKING:
    from .cost import model_cost
    from .inference import fuse
    from .layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d, resize_table
    from .ops import Problem, lambda_op, plan
    from .resnet import LambdaResNet, list_models
    from .weights import accelerate, create_model, from_d_li14


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lambdanets has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Imports `lambdanets.resnet`, which registers its models, right after `timm.models`, however that gets imported.

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
            importlib.import_module(f"{__name__}.resnet")

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    importlib.import_module(f"{__name__}.resnet")
else:
    sys.meta_path.insert(0, _AfterTimm())
