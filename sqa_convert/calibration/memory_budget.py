"""What calibration may hold in memory, and what of a source fits: in float32 beside its conversion, or a lean copy"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import Source
from ..conversion.plan import Plan
from ..errors import RecipeError
from ..text.quick_twin import LARGE, multiplies_bfloat16
from ..text.self_generated import CACHE
from .available_memory import available_memory, memory_of_process

LIBRARIES = 0.5e9
"""bytes that Python, torch and transformers take"""

MOST_ACTIVATIONS = 4e9
"""bytes of activations kept at a time, where there is room for more"""

LEAST_WORK = 0.4e9
"""bytes that the work takes beside the weights, whatever the model, and `_OF_A_SITE` arrays of a site's inputs"""

_OF_A_SITE = 6

_OF_PAIRS = 20
"""bytes for each number of what every head reads with what every other makes, of one site"""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that calibration shares out."""

    total: float
    """of the whole process, whole megabytes where nobody has asked; infinite where another device computes"""
    weights: float
    """held all the time"""
    needed: float
    """for the source in float32 beside its conversion"""
    lean: bool
    """whether the source is held as `lean_copy.lean_copy` makes it, and no second model beside it"""

    @property
    def left(self) -> float:
        return max(0.0, self.total - LIBRARIES - self.weights)

    @property
    def activations(self) -> float:
        """Of the inputs of sites, that are kept at a time."""
        return min(MOST_ACTIVATIONS, self.left / 2)

    @property
    def cache(self) -> float:
        """Of keys and values, while text is written."""
        return min(CACHE, self.left / 2)

    @property
    def graph(self) -> float:
        """Of what is kept for gradients."""
        return self.left / 2

    @property
    def told(self) -> dict[str, str]:
        """For a report: as "memory" the total, as `--memory` takes it: "7513MB"; nothing where it is infinite."""
        megabytes = f"{self.total / 1e6:.6f}".rstrip("0").rstrip(".")
        return {} if math.isinf(self.total) else {"memory": f"{megabytes}MB"}

    def lean_warning(self) -> dict[str, Any]:
        """What a lean copy leaves out, as other warnings of a report."""
        text = (
            f"calibration in float32 takes about {gigabytes(self.needed)} of memory and may take "
            f"{gigabytes(self.total)}: the source was run in bfloat16, candidates were compared in it, and nothing was "
            "polished; --memory says what may be taken"
        )
        return {"rule": "little_memory", "value": round(self.needed), "bound": round(self.total), "text": text}


def memory_budget(plan: Plan, source: Source, device: torch.device) -> MemoryBudget:
    """What of `--memory`, or of what is free, calibration of a plan takes for what. To be asked once, before the source
    is loaded: what the process holds already, beside its libraries, is not free.

    Raises:
        RecipeError: it is too little to hold even the least.
    """
    settings = plan.fitting_on(device.type)
    embedding = plan.source_config["vocab_size"] * plan.dimensions.width
    parameters = plan.before.parameters
    heads = plan.has_language_model_head
    twin = device.type == "cpu" and parameters >= LARGE and multiplies_bfloat16()
    whole = 4.0 * parameters + (2.0 * parameters if twin else 0)
    beside = 4.0 * plan.after.parameters if heads else 0
    lean = 2.0 * parameters + (4.0 if heads else 2.0) * embedding  # embeddings in float32, a head in bfloat16
    if device.type != "cpu":
        return MemoryBudget(math.inf, whole, whole + beside, False)
    asked = settings.memory
    total = float(asked or (available_memory() + min(memory_of_process(), LIBRARIES)) // 1e6 * 1e6)
    work = LEAST_WORK + _OF_A_SITE * 4.0 * min(settings.tokens, 1e9) * plan.dimensions.width
    work += _OF_PAIRS * plan.dimensions.heads**2 * plan.dimensions.head_dim * plan.dimensions.width
    needed = LIBRARIES + whole + beside + work
    if needed <= total:
        return MemoryBudget(total, whole, needed, False)
    stays = isinstance(source, ModelSource)
    least = LIBRARIES + (whole + beside if stays else lean) + work
    # Of what nobody has asked for only what is certain stops anything.
    if least > total and (asked or LIBRARIES + lean > total):
        there = f"--memory: {gigabytes(asked)}" if asked else f"{gigabytes(total)} of memory are there, which"
        raise RecipeError(
            f"{there} is too little; calibration of this model needs about {gigabytes(least)}; give more, fewer "
            "--calibration-tokens, or --no-calibration, which streams the weights"
            + ("; a model that is saved first, and given as its folder, takes less" if stays else "")
        )
    return MemoryBudget(total, whole if stays else lean, needed, not stays)


def gigabytes(count: float) -> str:
    """Such as "7.5GB", "20MB"."""
    return f"{count / 1e6:.0f}MB" if count < 1e8 else f"{count / 1e9:.1f}GB"
