"""The register of methods: plain functions from the source's heads and a partition to the converted heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from .partition import Partition
from .weights import AttentionHeads

Convert = Callable[[AttentionHeads[Any], Partition, Any], AttentionHeads[Any]]


@dataclass(frozen=True)
class Method:
    """A way to turn the heads of a partition into fewer heads."""

    name: str
    summary: str
    """One line: what it does."""
    source: str
    """Where it was published."""
    convert: Convert
    """(heads, partition, statistics) -> heads; a group of one head is copied verbatim."""
    needs_statistics: bool = False
    """Of the site's inputs: from calibration text, or without it from the norms' weights; others use none, and take
    arrays as well as tensors."""


METHODS: dict[str, Method] = {}
"""The methods by name, the best first."""


def method(name: str, *, summary: str, source: str, needs_statistics: bool = False) -> Callable[[Convert], Convert]:
    """Registers a function as a method under `name`.

    Args:
        name: for `--method`.
        summary: one line, for `--list-methods` and the model card.
        source: where it was published.
        needs_statistics: whether the function is to be given `Statistics`.
    """

    def register(convert: Convert) -> Convert:
        METHODS[name] = Method(name, summary, source, convert, needs_statistics)
        return convert

    return register


def get_method(name: str) -> Method:
    """Raises RecipeError when there is no such method."""
    if name not in METHODS:
        raise RecipeError(f"--method {name}: choose one of auto, {', '.join(METHODS)}")
    return METHODS[name]
