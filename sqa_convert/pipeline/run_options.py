"""How a conversion is carried out, beside what is asked of it: where, on what, measured on which text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..text.documents import Columns
from ..text.formats import TEXT_COLUMN

if TYPE_CHECKING:
    from ..uptraining.recipe import Recipe


@dataclass(frozen=True)
class RunOptions:
    """How a conversion is carried out, beside what is asked of it (`Request`)."""

    overwrite: bool = False
    resume: bool = False
    """go on from what an earlier run of the same has left"""
    verify: bool = True
    evaluate: bool = False
    data: Any = None
    text_column: str = TEXT_COLUMN
    columns: Columns | None = None
    """of `data`, where it is pairs"""
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    measure_training: bool = True
    """of an uptraining that follows"""

    @classmethod
    def with_recipe(
        cls, recipe: Recipe | None, *, evaluate: bool, text_column: str | None, seed: int | None, **others: Any
    ) -> RunOptions:
        """Options as a recipe changes them: its seed counts, and models are measured after it, on its text."""
        return cls(
            evaluate=evaluate and recipe is None,
            text_column=text_column or TEXT_COLUMN,
            seed=recipe.seed if recipe is not None else seed or 0,
            **others,
        )
