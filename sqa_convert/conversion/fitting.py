"""What calibration will do: its defaults by effort, and how much of them a CPU does for a large model.

On a CPU what nobody asked for is held to a number of operations, so that a conversion takes minutes: of a model of the
size of GPT-2 less text is written, and fewer steps are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..text.documents import Columns, is_own

POLISH_TOKENS = 2048
"""positions of a step of training the whole model, about"""
POLISH_ROUNDS = 8
"""through the calibration text, at most, where nobody asks for more"""

WRITE_OPERATIONS, LEAST_TOKENS = 8e12, 8192
"""floating-point, of a CPU, to run the model over its text once; tokens that are written whatever they take"""
REFINE_OPERATIONS, LEAST_REFINE = 2e13, 10
"""likewise, of layer-wise training; steps that are taken whatever they take"""
POLISH_OPERATIONS, LEAST_POLISH = 6e13, 50
"""likewise, of training the whole model; fewer steps than these are not worth it"""


@dataclass(frozen=True)
class Effort:
    """How much is computed where nobody says more."""

    tokens: int
    """of calibration text, at least"""
    refine_steps: int
    polish_steps: int
    on_cpu: float
    """share of the operations above"""


EFFORTS = {
    "light": Effort(32_768, 50, 50, 1 / 3),
    "default": Effort(65_536, 100, 150, 1.0),
    "best": Effort(262_144, 300, 500, float("inf")),
}


def effort_of(name: str) -> Effort:
    """Raises RecipeError."""
    if name not in EFFORTS:
        raise RecipeError(f"--effort {name}: choose one of {', '.join(EFFORTS)}")
    return EFFORTS[name]


@dataclass(frozen=True)
class Fitting:
    """A `Calibration` with its defaults filled in."""

    text: Any
    tokens: int
    refit: bool
    refine_steps: int
    text_column: str
    length: int | None
    prompts: str | None
    columns: Columns | None
    """of `text`, where it is pairs"""
    polish_steps: int
    effort: Effort = EFFORTS["default"]
    asked: frozenset[str] = frozenset()
    """which of "tokens", "refine_steps", "polish_steps" somebody has given: they are done whatever they take"""
    needed: int = 0
    """tokens that a fit needs, whatever they take"""
    memory: int | None = None
    """bytes that may be held on a CPU; None: what is free"""

    def affordable(self, parameters: int, attention: int, on_cpu: bool) -> Fitting:
        """What of it the machine does in minutes.

        Args:
            parameters: of the source.
            attention: parameters of the result's converted attention.
            on_cpu: whether a CPU computes.
        """
        if not on_cpu:
            return self
        from ..heads.refine import BATCH_TOKENS

        share = self.effort.on_cpu
        tokens = max(LEAST_TOKENS, self.needed, _most(share * WRITE_OPERATIONS / (2 * parameters)))
        refine = max(LEAST_REFINE, _most(share * REFINE_OPERATIONS / (6 * max(attention, 1) * BATCH_TOKENS)))
        polish = _most(share * POLISH_OPERATIONS / (8 * parameters * POLISH_TOKENS))  # forward in both, backward in one
        polish = polish if polish >= min(LEAST_POLISH, self.polish_steps) else 0
        allowed = {"tokens": tokens, "refine_steps": refine, "polish_steps": polish}
        if self.text_named is not None:
            del allowed["tokens"]  # they are there, and need not be written
        changed = {name: min(getattr(self, name), most) for name, most in allowed.items() if name not in self.asked}
        return replace(self, **changed)

    def polish_within(self, tokens: int) -> int:
        """Steps of training the whole model, by the tokens of text that there are."""
        if "polish_steps" in self.asked:
            return self.polish_steps
        return min(self.polish_steps, POLISH_ROUNDS * -(-tokens // POLISH_TOKENS))

    @property
    def text_named(self) -> Any:
        """Text that somebody else wrote."""
        return None if is_own(self.text) else self.text


def _most(number: float) -> int:
    return int(min(number, 2**62))
