"""What a conversion is going to do, stage by stage, as it is told of before it begins and while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..conversion.plan import Plan
from ..heads import AUTO
from ..text.documents import SELF
from .run_options import RunOptions

if TYPE_CHECKING:
    from ..uptraining.recipe import Recipe

LOAD, CHOOSE, VERIFY, WRITE_SAMPLES, DRAW = "load source", "choose", "verify", "write samples", "draw report"
"""stages that are one step each"""


def planned_stages(plan: Plan, options: RunOptions, measured: bool, recipe: Recipe | None = None) -> list[str]:
    """Names of the stages, in their order. A stage of which nobody can know beforehand is not among them.

    Args:
        measured: on text, once it is converted.
        recipe: by which it is trained then.
    """
    stages = [*_of_calibration(plan, options), "convert"]
    if measured:
        averaged = ["evaluate mean"] if plan.method != "mean" else []
        written = [WRITE_SAMPLES] if plan.has_language_model_head else []
        verified = [VERIFY] if options.verify else []
        stages += ["evaluate source", "evaluate converted", *averaged, *written, *verified, DRAW]
    return stages if recipe is None else [*stages, *recipe.stages(options.measure_training)]


def _of_calibration(plan: Plan, options: RunOptions) -> list[str]:
    if plan.calibration is None:
        return []
    from ..devices import choose_device

    settings = plan.fitting_on(choose_device(options.device).type)
    predicts, own = plan.has_language_model_head, settings.text_named is None
    decoder_only = all(site.kind == "decoder" for site in plan.sites)
    stages = [LOAD]
    stages += ["sample text"] * (predicts and own and (decoder_only or settings.text == SELF))
    stages += ["measure sensitivity"]
    stages += ["weigh layers"] * plan.shares_out
    stages += ["fit heads"]
    stages += [CHOOSE] * (predicts and plan.method == AUTO)
    stages += ["refine heads"] * bool(settings.refine_steps)
    stages += ["polish"] * bool(predicts and settings.polish_steps)
    return stages
