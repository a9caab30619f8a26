"""Convert pretrained GPT-2 and T5 checkpoints to Sparse Query Attention.

Importing this loads neither torch nor transformers; `import sqa_convert.models` registers the architectures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conversion.request import Calibration
    from .evaluation.quality import evaluate
    from .heads import METHODS, VARIANTS, Partition
    from .pipeline.api import Conversion, convert
    from .publish import push_to_hub
    from .speed.bench import bench
    from .uptraining.recipe import Recipe, load_recipe
    from .uptraining.uptrain import uptrain

_HOMES = {
    "Calibration": "conversion.request",
    "bench": "speed.bench",
    "convert": "pipeline.api",
    "Conversion": "pipeline.api",
    "evaluate": "evaluation.quality",
    "METHODS": "heads",
    "VARIANTS": "heads",
    "Partition": "heads",
    "Recipe": "uptraining.recipe",
    "load_recipe": "uptraining.recipe",
    "push_to_hub": "publish",
    "uptrain": "uptraining.uptrain",
}

__all__ = [
    "METHODS",
    "VARIANTS",
    "Calibration",
    "Conversion",
    "Partition",
    "Recipe",
    "__version__",
    "bench",
    "convert",
    "evaluate",
    "load_recipe",
    "push_to_hub",
    "uptrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
