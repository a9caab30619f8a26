"""What --target asks: bounds, read from words, and the point of a sweep that they pick, told and converted to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..conversion.heads_by_layer import DEFAULT_ALLOCATION, UNIFORM, as_text
from ..conversion.request import CALIBRATED, Request
from ..errors import QualityError, RecipeError
from ..text.formats import TEXT_COLUMN
from .console import Out

if TYPE_CHECKING:
    from ..pipeline.run_options import RunOptions
    from ..pipeline.sweep import Sweep
    from ..pipeline.sweep_points import Point, Target


def read_targets(texts: list[str] | None, timed: bool = True) -> list[Target]:
    """Raises RecipeError for what is no target, or needs times that are not taken."""
    from ..pipeline.sweep_points import TIMED, Target

    targets = [Target.read(text) for text in texts or ()]
    late = next((target.text for target in targets if target.measure in TIMED and not timed), None)
    if late is not None:
        raise RecipeError(f"--target {late} needs times: leave out --no-speed")
    return targets


def needs_times(targets: list[Target]) -> bool:
    from ..pipeline.sweep_points import TIMED

    return any(target.measure in TIMED for target in targets)


def told(points: Sweep, targets: list[Target]) -> tuple[Point, bool, str]:
    """The point that targets pick, whether it holds them, and a sentence that says so."""
    from ..pipeline.sweep_points import pick

    point, holds = pick(points, targets)
    asked = ", ".join(target.text for target in targets)
    values = ((target.measure, getattr(point, target.measure)) for target in targets)
    has = ", ".join(f"{name} {value:.4g}{'' if name == 'kl' else 'x'}" for name, value in values if value is not None)
    return point, holds, f"{asked}: {'' if holds else 'no point holds; closest '}{point.name}, {has}"


def aimed(model: str, request: Request, asked: list[str], options: RunOptions, out: Out, **where: Any) -> Request:
    """A request with the head counts that a sweep finds for targets.

    Raises:
        RecipeError: head counts are asked for, too, or a target is none.
        QualityError: no point holds the targets; it names the closest.
    """
    targets = read_targets(asked)
    given = (request.q_groups, request.kv_groups, request.variant)
    if given != (None, None, None) or request.allocation != DEFAULT_ALLOCATION:
        raise RecipeError("--target finds the heads: leave out --q-groups, --kv-groups, --variant and --allocation")
    if request.calibration is None:
        raise RecipeError("--target needs text that heads are fitted on: leave out --no-calibration")
    out.quieten_libraries()
    from ..pipeline.sweep import sweep
    from ..pipeline.sweep_points import asked_flags

    with out.progress() as progress:
        points = sweep(
            model,
            sites=request.sites,
            calibration=request.calibration or CALIBRATED,
            data=options.data,
            text_column=options.text_column or TEXT_COLUMN,
            speed=needs_times(targets),
            device=options.device,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            progress=progress,
            **where,
        )
    point, holds, said = told(points, targets)
    if not holds:
        flags = points.info["asked_flags"]
        flags += asked_flags(_not_swept(request, flags))
        raise QualityError(f"{said}; to convert to that: {point.command(model, flags)}")
    out.words(said)
    if point.allocation != UNIFORM:
        return replace(request, allocation=as_text(point.layers))
    return replace(request, q_groups=point.q_groups, kv_groups=point.kv_groups, allocation=UNIFORM)


def _not_swept(request: Request, flags: str) -> dict[str, Any]:
    """What a conversion is asked that is not among the flags of a sweep."""
    usual, asked = Request(), request.calibration or CALIBRATED
    told = {name: getattr(request, name) for name in ("method", "partition", "dtype")}
    told = {name: given for name, given in told.items() if given != getattr(usual, name)}
    numbers = {
        "calibration-tokens": asked.tokens,
        "refine-steps": asked.refine_steps,
        "polish-steps": asked.polish_steps,
    }
    return told | {name: str(n) for name, n in numbers.items() if n is not None and f" --{name} " not in flags}
