"""Points of a sweep: what a model keeps, loses and costs at each; the frontier among them, its knee, and targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from ..conversion.fitting import Fitting
from ..conversion.heads_by_layer import UNIFORM, CountsByLayer, as_text
from ..conversion.request import Calibration
from ..errors import RecipeError, shown
from ..heads.allocate import Counts, some_head_counts
from ..text.formats import TEXT_COLUMN

MEASURES = {
    "kl": "KL divergence to the source on held-out text, nats a token",
    "prefill": "time to read a text",
    "decode": "time of a decoding step",
    "cache": "bytes of the KV cache",
    "flops": "operations of attention",
    "parameters": "of the whole model",
}
"""what a target may bound; all but the first as a share of the source's"""

FEW_HEADS = 8
"""of which every setting is tried"""

TIMED = ("prefill", "decode")


@dataclass(frozen=True)
class Point:
    """What a model keeps, loses and costs. Shares are of the source's."""

    q_groups: int
    """query heads of a layer, on average"""
    kv_groups: int
    """key/value heads of a layer, on average"""
    allocation: str
    """"uniform" or "adaptive": the same for each layer, or shared out among them"""
    layers: CountsByLayer
    """(Hq, Hkv) of every layer, by kind of attention"""
    kl: float
    """to the source on held-out text, nats a token"""
    loss: float
    """nats a token"""
    top1: float
    """share of the predictions whose most likely token is the source's"""
    predicted_kl: float
    """sum of what the layers cost alone, on calibration text"""
    parameters: float
    """share"""
    flops: float
    """of attention, share"""
    cache: float | None
    """share; None of a model that keeps none"""
    prefill: float | None = None
    """time, share; None where it was not measured"""
    decode: float | None = None
    """time of a step, share"""
    frontier: bool = False
    """whether no other point has less KL at no more operations and cache"""
    knee: bool = False
    """where the frontier turns: what is saved beyond it costs more than on the way to it"""

    @property
    def cost(self) -> float:
        """Mean share of attention's operations and of the cache."""
        return self.flops if self.cache is None else (self.flops + self.cache) / 2

    @property
    def name(self) -> str:
        return f"{self.q_groups}/{self.kv_groups}" + ("" if self.allocation == UNIFORM else " adaptive")

    def command(self, model: str, flags: str = "") -> str:
        """That converts the model to this point; `flags` are put behind it."""
        heads = f"--q-groups {self.q_groups} --kv-groups {self.kv_groups} --allocation {UNIFORM}"
        if self.allocation != UNIFORM:
            heads = f"--allocation {as_text(self.layers)}"
        return f"sqa-convert {shlex.quote(model)} {heads}{flags}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cost": self.cost, "name": self.name}


def default_settings(heads: int) -> list[Counts]:
    """Settings that are tried of a model with so many heads, those that keep the most first."""
    return [counts for counts in reversed(some_head_counts(heads, FEW_HEADS)) if counts != (heads, heads)]


def asked_flags(asked: Mapping[str, Any]) -> str:
    """What else was asked of a sweep, as flags of sqa-convert: those that a command line can say."""
    said = {flag: given for flag, given in asked.items() if given and isinstance(given, str | int | PathLike)}
    return "".join(
        f" --{flag}" + ("" if given is True else f" {shlex.quote(str(given))}") for flag, given in said.items()
    )


def calibration_flags(calibration: Calibration, fitting: Fitting) -> dict[str, Any]:
    """What was asked of calibration, by flags of sqa-convert.

    Of text and steps what is more than a conversion takes by itself: who sweeps with less wants a look, no conversion.
    """
    usual = {name: getattr(fitting.effort, name) for name in ("tokens", "refine_steps", "polish_steps")}
    usual["tokens"] = max(usual["tokens"], fitting.needed)
    more = {name: n for name in usual if name in fitting.asked and (n := getattr(fitting, name)) > usual[name]}
    return {
        "calibration": calibration.text,
        "calibration-prompts": calibration.prompts,
        "calibration-length": calibration.length,
        "calibration-tokens": more.get("tokens"),
        "refine-steps": more.get("refine_steps"),
        "polish-steps": more.get("polish_steps"),
        "refit": calibration.refit is True,
        "no-refit": calibration.refit is False,
        "effort": "" if calibration.effort == Calibration.effort else calibration.effort,
        "memory": calibration.memory,
        "text-column": "" if calibration.text_column == TEXT_COLUMN else calibration.text_column,
        "source-column": calibration.source_column,
        "target-column": calibration.target_column,
        "prefix": calibration.prefix,
    }


def pairs_of(settings: Any) -> list[Counts]:
    """Settings of a sweep as (Hq, Hkv), each once. Raises RecipeError where they are not pairs."""
    if isinstance(settings, Iterable) and not isinstance(settings, str):
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in settings]
        if all(len(pair) == 2 for pair in pairs):
            return list(dict.fromkeys(pairs))
    raise RecipeError(f"--settings {shown(settings)}: give pairs such as (8, 4)")


def with_frontier(points: Sequence[Point]) -> list[Point]:
    """The points, with those of the frontier and its knee marked."""

    def beaten(point: Point) -> bool:
        mine = point.kl, point.flops, point.cache or 0.0
        others = ((other.kl, other.flops, other.cache or 0.0) for other in points)
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in others)

    marked = [replace(point, frontier=not beaten(point)) for point in points]
    knee = _knee([point for point in marked if point.frontier])
    return [replace(point, knee=point is knee) for point in marked]


def _knee(frontier: Sequence[Point]) -> Point | None:
    """The point that lies furthest below the line from the cheapest point to the source, both axes as shares of it.

    Source: Satopää et al., Finding a "Kneedle" in a Haystack, ICDCSW 2011.
    """
    cheapest = min(frontier, key=lambda point: (point.cost, point.kl))
    width, height = 1 - cheapest.cost, cheapest.kl
    if len(frontier) < 3 or width <= 0 or height <= 0:
        return None
    return max(frontier, key=lambda point: (1 - point.cost) / width - point.kl / height)


@dataclass(frozen=True)
class Target:
    """A bound that a point is to keep."""

    measure: str
    most: float
    text: str

    @classmethod
    def read(cls, text: str) -> Target:
        """From "kl<=0.05" or "cache<=0.33x". Raises RecipeError."""
        match = re.fullmatch(r"\s*([a-z]+)\s*<=?\s*(\d*\.?\d+)\s*(x?)\s*", str(text))
        if match is None or match[1] not in MEASURES or (match[1] == "kl") == bool(match[3]):
            others = ", ".join(name for name in MEASURES if name != "kl")
            raise RecipeError(
                f"--target {shown(text)}: write kl<=0.05, or a share of the source's as prefill<=0.8x: of {others}"
            )
        return cls(match[1], float(match[2]), text)

    def excess(self, point: Point) -> float:
        """By how much a point misses it, as a share of the bound; nothing where it holds, all where it is not known."""
        value = getattr(point, self.measure)
        return float("inf") if value is None else max(0.0, value - self.most) / max(self.most, 1e-9)


def pick(points: Iterable[Point], targets: Sequence[Target]) -> tuple[Point, bool]:
    """The cheapest point that holds all targets, and True; else the one that comes closest, and False.

    Where none of the targets bounds the KL, the point of the least KL that holds is taken: the cheapest of all would
    hold, too. What comes closest misses by the least, all targets together.
    """
    bounded = any(target.measure == "kl" for target in targets)
    ranked = sorted(points, key=lambda point: (point.cost, point.kl) if bounded else (point.kl, point.cost))
    holding = [point for point in ranked if all(target.excess(point) == 0 for target in targets)]
    if holding:
        return holding[0], True
    return min(ranked, key=lambda point: sum(target.excess(point) for target in targets)), False


def rank_correlation(points: Sequence[Point]) -> float | None:
    """Spearman's, of predicted and measured KL; None of fewer than three points."""
    import numpy as np

    if len(points) < 3:
        return None
    predicted, measured = (
        np.argsort(np.argsort(v)) for v in zip(*((p.predicted_kl, p.kl) for p in points), strict=True)
    )
    return float(np.corrcoef(predicted, measured)[0, 1])
