"""`sqa_convert.sweep`: what a model loses and costs at many numbers of heads, from fits that are each made once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.allocation import METHOD
from ..calibration.site_fits import check_room
from ..caller_settings import undisturbed
from ..checkpoints.source import Source
from ..conversion.heads_by_layer import UNIFORM
from ..conversion.plan import Plan, make_plan
from ..conversion.request import CALIBRATED, Calibration, Request
from ..devices import choose_device, device_name, within_memory
from ..errors import RecipeError
from ..heads import check_head_counts
from ..heads.allocate import Counts
from ..parse_amounts import check_seed
from ..progress import Progress, Stages, in_notebooks, told_within
from ..report.provenance import machine
from ..text.formats import TEXT_COLUMN
from ..text.python_data import repeatable
from .fitted_models import MEASURE, TIME, TOO_LARGE_TO_TIME, FittedModels
from .planned_stages import planned_stages
from .preflight import check_run, fitted_to, prepared
from .run_options import RunOptions
from .sweep_points import (
    Point,
    asked_flags,
    calibration_flags,
    default_settings,
    pairs_of,
    rank_correlation,
    with_frontier,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_SWEPT = "refine heads", "polish", "convert"
"""stages"""


class Sweep(list[Point]):
    """The points of a sweep, and what else there is to know of it."""

    def __init__(self, points: Iterable[Point], info: dict[str, Any]) -> None:
        super().__init__(points)
        self.info = info

    def to_json(self) -> dict[str, Any]:
        model, flags = self.info["source"], self.info["asked_flags"]
        return self.info | {"points": [point.to_json() | {"command": point.command(model, flags)} for point in self]}


@undisturbed
def sweep(
    source: str | Path | PreTrainedModel,
    settings: Sequence[Counts] | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    calibration: Calibration = CALIBRATED,
    data: Any = None,
    text_column: str = TEXT_COLUMN,
    speed: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = in_notebooks,
) -> Sweep:
    """What a model loses and costs at many numbers of heads, to choose among them.

    Every attention is fitted to what it does on text once at each setting, as `convert` with "svd" does before it
    polishes, with up to 30 steps of refine unless told otherwise; models are put together from these fits, each setting
    with the same heads in all layers, and with as many shared out among layers.

    Args:
        source: a hub id, a folder, a sample, or a model in memory.
        settings: pairs (Hq, Hkv); by default some twenty, from all query heads to a quarter of them.
        sites: kinds of attention to convert, as for `convert`.
        calibration: how heads are fitted to text.
        data: the text to measure on, as for `convert`; heads are fitted to its training part.
        text_column: of a table given as `data`.
        speed: time the points of the frontier, against the source; None: where there is memory for both in float32.
        revision: of a hub id.
        subfolder: of a pipeline of several models, the one meant.
        tokenizer: if not beside the weights.
        device: to compute on: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of everything random.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        A list of `Point`, the settings in their order, each "uniform" and then "adaptive"; its `info` tells the text,
        the seconds of each stage, the machine, and how well the sum of what layers cost alone predicts the KL, by rank
        ("spearman").

    Raises:
        RecipeError: a setting is not possible, the model has no language model head or only one head, or `speed` is
            True and there is too little memory to time in.
        CheckpointError, UnsupportedModelError, DataError, QualityError: as `convert`.
    """
    check_seed(seed)
    if not isinstance(calibration, Calibration):
        raise RecipeError(f"--calibration of {type(calibration).__name__}: give a Calibration, its text as `text`")
    data, start = repeatable(data), time.perf_counter()
    calibration = replace(calibration, text=repeatable(calibration.text))
    sites = sites if isinstance(sites, str | None) else ",".join(sites)
    tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    where = {"revision": revision, "subfolder": subfolder, "tokenizer": tokenizer}
    opened, plan, settings = _planned(source, settings, sites, calibration, data, text_column, **where)
    options = RunOptions(
        data=data,
        text_column=text_column,
        columns=None if data is None else calibration.columns,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    check_run(plan, opened, None, options)
    planned = [stage for stage in planned_stages(plan, options, False) if stage not in NOT_SWEPT]
    stages = Stages(progress, [*planned, MEASURE, *([] if speed is False else [TIME])])
    with (
        told_within(stages),
        within_memory("the sweep", choose_device(device), "--device cpu, or fewer --calibration-tokens"),
    ):
        work = FittedModels(plan, opened, options, stages, speed)
        work.fit(settings)
        points = with_frontier(work.points(settings))
        if work.times:
            points = work.timed(points)
    work.seconds["all"] = round(time.perf_counter() - start, 1)
    info = {
        "schema": 1,
        "source": opened.name,
        "asked_flags": asked_flags({"sites": sites, **_flags(options, calibration, plan), **where}),
        "source_heads": plan.dimensions.heads,
        "data": work.text.name,
        "tokens": work.text.tokens or work.calibrator.text.held_out_tokens,
        "calibration": work.calibrator.report(plan),
        "spearman": rank_correlation(points),
        "seconds": work.seconds,
        "timed_tokens": work.timed_tokens if work.times else None,
        "not_timed": "" if work.times or speed is False else TOO_LARGE_TO_TIME,
        "machine": machine(device_name(choose_device(device))),
    }
    return Sweep(points, info)


def _flags(options: RunOptions, calibration: Calibration, plan: Plan) -> dict[str, Any]:
    """What a conversion needs to be told to give what was swept, by flags."""
    assert plan.calibration is not None
    flags = {"data": options.data, **calibration_flags(calibration, plan.calibration), "seed": options.seed}
    flags |= {} if options.text_column == TEXT_COLUMN else {"text-column": options.text_column}
    device = "" if options.device == "auto" else options.device
    return flags | {"device": device, "trust-remote-code": options.trust_remote_code}


def _planned(
    given: Any, settings: Sequence[Counts] | None, sites: Any, calibration: Calibration, data: Any, column: str,
    **where: Any,
) -> tuple[Source, Plan, list[Counts]]:  # fmt: skip
    """The source, a plan with the most query heads of any setting, and all settings. Raises RecipeError."""
    asked = Request(1, 1, method=METHOD, calibration=calibration, sites=sites, allocation=UNIFORM)
    request = fitted_to(asked, data, column, None)
    opened, first = prepared(given, request, lambda partitions: None, **where)
    heads = first.dimensions.heads
    if heads == 1 or not first.has_language_model_head:
        lacking = "only one head" if heads == 1 else "no language model head, so nothing tells what layers cost"
        raise RecipeError(f"{opened.name} has {lacking}: there is nothing to sweep")
    chosen = default_settings(heads) if settings is None else pairs_of(settings)
    for counts in chosen:
        check_head_counts(heads, *counts)
    if not chosen or (heads, heads) in chosen:
        raise RecipeError(f"--settings: give one or more of Hq/Hkv below {heads}/{heads}")
    most = max(chosen)
    plan = make_plan(opened, replace(request, q_groups=most[0], kv_groups=most[1]))
    check_room(len(plan.converted_sites), plan.dimensions.width, plan.dimensions.head_dim, chosen)
    return opened, plan, chosen
