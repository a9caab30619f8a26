"""Convert pretrained GPT-2 and T5 checkpoints to Sparse Query Attention.

Importing this loads neither torch nor transformers; `import sqa_convert.models` registers the architectures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors
    from .checkpoints.find import resolve
    from .conversion.request import Calibration
    from .evaluation.evaluate import compare, evaluate
    from .evaluation.held_out_text import prepare
    from .heads import METHODS, VARIANTS, Method, Partition, register_method
    from .pipeline.conversion_object import Conversion, load
    from .pipeline.convert import convert
    from .pipeline.sweep import sweep
    from .publish import push_to_hub
    from .speed.bench import bench
    from .torch_models.convert_modules import convert_modules
    from .torch_models.converted_modules import ConvertedModules
    from .torch_models.load_modules import load_modules
    from .uptraining.recipe import Recipe, load_recipe
    from .uptraining.uptrain import uptrain

_HOMES = {
    "Calibration": "conversion.request",
    "bench": "speed.bench",
    "compare": "evaluation.evaluate",
    "convert": "pipeline.convert",
    "Conversion": "pipeline.conversion_object",
    "convert_modules": "torch_models.convert_modules",
    "ConvertedModules": "torch_models.converted_modules",
    "load_modules": "torch_models.load_modules",
    "load": "pipeline.conversion_object",
    "evaluate": "evaluation.evaluate",
    "METHODS": "heads",
    "Method": "heads",
    "VARIANTS": "heads",
    "Partition": "heads",
    "Recipe": "uptraining.recipe",
    "load_recipe": "uptraining.recipe",
    "prepare": "evaluation.held_out_text",
    "push_to_hub": "publish",
    "register_method": "heads",
    "resolve": "checkpoints.find",
    "sweep": "pipeline.sweep",
    "uptrain": "uptraining.uptrain",
}

__all__ = [
    "METHODS",
    "VARIANTS",
    "Calibration",
    "Conversion",
    "ConvertedModules",
    "Method",
    "Partition",
    "Recipe",
    "__version__",
    "bench",
    "compare",
    "convert",
    "convert_modules",
    "errors",
    "evaluate",
    "load",
    "load_modules",
    "load_recipe",
    "prepare",
    "push_to_hub",
    "register_method",
    "resolve",
    "sweep",
    "uptrain",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
