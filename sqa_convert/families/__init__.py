"""What a checkpoint of a family looks like: tensor names, and one attention site read and written.

May import: heads, errors.
Exports: `family_of`, `FAMILIES`, `Family`; a family is one file.
"""

from __future__ import annotations

from ..errors import UnsupportedModelError, shown
from .base import Config, Dimensions, Family, Site, Written, mean_counts
from .gpt2 import GPT2
from .t5 import T5
from .umt5 import UMT5

FAMILIES: dict[str, Family] = {name: family for family in (GPT2(), T5(), UMT5()) for name in family.model_types}


def family_of(config: Config) -> Family:
    """The family a config.json belongs to.

    Raises:
        UnsupportedModelError: of another architecture, or of one of its kinds that cannot be converted.
    """
    model_type = str(config.get("model_type"))
    supported = ", ".join(sorted(FAMILIES))
    if model_type.startswith("sqa_"):
        raise UnsupportedModelError(
            f"model_type {shown(model_type)}: already converted; give the original ({supported})"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"model_type {shown(model_type)} is not supported; supported: {supported}")
    family = FAMILIES[model_type]
    family.check(config)
    return family


def only_hidden_states(architecture: str) -> bool:
    """Whether what a model of this class puts out is hidden states of the text that it reads."""
    return architecture.endswith("EncoderModel") or architecture in ("GPT2Model", "SQAGPT2Model")


def completed(config: Config) -> Config:
    """config.json as transformers reads it, as far as a family needs it. Raises UnsupportedModelError."""
    family = FAMILIES.get(str(config.get("model_type")))
    return config if family is None else family.completed(config)


__all__ = [
    "FAMILIES", "Config", "Dimensions", "Family", "Site", "Written", "completed", "family_of", "mean_counts",
    "only_hidden_states",
]  # fmt: skip
