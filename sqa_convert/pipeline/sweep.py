"""`sqa_convert.sweep`: what a model loses and costs at many numbers of heads, from fits that are each made once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.allocation import METHOD, cheapest
from ..calibration.calibrate import Calibrator
from ..calibration.load_source import load_source
from ..calibration.site_fits import SiteFits, check_room
from ..caller_settings import undisturbed
from ..checkpoints.source import Source
from ..conversion.build_model import build_model
from ..conversion.heads_by_layer import ADAPTIVE, UNIFORM, CountsByLayer, as_text
from ..conversion.plan import Plan, make_plan
from ..conversion.request import CALIBRATED, Calibration, Request
from ..devices import choose_device, device_name, within_memory
from ..errors import QualityError, RecipeError
from ..evaluation.measure import finite_quality, predict
from ..families import Site
from ..heads import check_head_counts
from ..heads.allocate import Counts
from ..parse_amounts import check_seed
from ..progress import Progress, Stages, in_notebooks, told_within
from ..report.provenance import machine
from ..speed.bench import bench
from ..speed.settings import Settings
from ..text.formats import TEXT_COLUMN
from ..text.python_data import repeatable
from .planned_stages import LOAD, planned_stages
from .preflight import check_run, fitted_to, prepared
from .run import held_out_text
from .run_options import RunOptions
from .sweep_points import Point, asked_flags, default_settings, pairs_of, rank_correlation, with_frontier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURE, TIME = "measure", "time"
"""stages"""
NOT_SWEPT = "refine heads", "polish", "convert"

LONGEST = 1024
"""tokens that are timed, at most"""
ROUNDS = 3
"""of timing"""

REFINE_STEPS = 30
"""of each fit, at most, where nobody asks for more: they tell settings apart"""


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
    speed: bool = True,
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
        speed: time the points of the frontier, against the source.
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
        RecipeError: a setting is not possible, or the model has no language model head or only one head.
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
    named = {"sites": sites, "data": data, "text-column": "" if text_column == TEXT_COLUMN else text_column}
    flags = asked_flags(named | {"calibration": calibration.text} | where)
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
    stages = Stages(progress, [*planned, MEASURE, *([TIME] if speed else [])])
    with (
        told_within(stages),
        within_memory("the sweep", choose_device(device), "--device cpu, or fewer --calibration-tokens"),
    ):
        work = _Sweeper(plan, opened, options, stages)
        work.fit(settings)
        points = with_frontier(work.points(settings))
        if speed:
            points = work.timed(points)
    work.seconds["all"] = round(time.perf_counter() - start, 1)
    info = {
        "schema": 1,
        "source": opened.name,
        "asked_flags": flags,
        "source_heads": plan.dimensions.heads,
        "data": work.text.name,
        "tokens": work.text.tokens or work.calibrator.text.held_out_tokens,
        "calibration": work.calibrator.report(plan),
        "spearman": rank_correlation(points),
        "seconds": work.seconds,
        "timed_tokens": work.timed_tokens if speed else None,
        "machine": machine(device_name(choose_device(device))),
    }
    return Sweep(points, info)


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


@dataclass
class _Sweeper:
    """A source, fitted at many numbers of heads."""

    plan: Plan
    source: Source
    options: RunOptions
    progress: Progress

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.timed_tokens = min(LONGEST, self.plan.dimensions.context)
        device, start = choose_device(self.options.device), time.perf_counter()
        held_out = held_out_text(self.plan, self.source, self.options) if self.source.folder else ""
        self.progress(LOAD, 0, 1)
        model = load_source(self.plan, self.source, self.options.trust_remote_code, device)
        self.calibrator = Calibrator(
            model, self.plan, self.source, device, self.options.seed, self.options.trust_remote_code, self.progress
        )
        self.text = self.calibrator.replacement.text if isinstance(held_out, str) else held_out
        self.expected = predict(model, self.text)
        self.fits = SiteFits()
        self._spent("text", start)

    def _spent(self, stage: str, start: float) -> None:
        self.seconds[stage] = round(time.perf_counter() - start, 1)

    def fit(self, settings: Sequence[Counts]) -> None:
        """Fits every site at each setting."""
        start, fitting = time.perf_counter(), self.calibrator.settings
        sites = self.calibrator.fitters("fit heads")
        most = fitting.refine_steps if "refine_steps" in fitting.asked else REFINE_STEPS
        self.fits.add(
            sites, settings, self.calibrator.replacement, METHOD, fitting.refit, min(most, fitting.refine_steps)
        )
        self._spent("fit", start)

    def points(self, settings: Sequence[Counts]) -> list[Point]:
        """Of each setting the even point, and the one with heads shared out where it differs. Raises QualityError."""
        start, found, done = time.perf_counter(), [], 0
        for setting in settings:
            layers = {kind: (setting,) * len(sites) for kind, sites in self._sites().items()}
            try:
                shared = cheapest(self.fits.kl_alone, setting)
            except ValueError:  # not all fits are finite, and the others keep no such total
                shared = layers
            for allocation, counts in ((UNIFORM, layers), (ADAPTIVE, shared)):
                self.progress(MEASURE, done, 2 * len(settings))
                done += 1
                if allocation == UNIFORM or counts != layers:
                    point = self._point(setting, allocation, counts)
                    found += [] if point is None else [point]
        self.progress(MEASURE, done, done)
        self._spent("measure", start)
        if not found:
            raise QualityError(f"{self.source.name}: no setting predicts anything finite")
        return found

    def _sites(self) -> dict[str, list[Site]]:
        sites = self.plan.converted_sites
        return {kind: [s for s in sites if s.kind == kind] for kind in dict.fromkeys(s.kind for s in sites)}

    def _by_site(self, counts: CountsByLayer) -> dict[Site, Counts]:
        return {s: kept for kind, sites in self._sites().items() for s, kept in zip(sites, counts[kind], strict=True)}

    def _plan_of(self, counts: CountsByLayer) -> Plan:
        asked = replace(self.plan.request, q_groups=None, kv_groups=None, allocation=as_text(counts))
        return make_plan(self.source, asked)

    def _point(self, setting: Counts, allocation: str, counts: CountsByLayer) -> Point | None:
        """None where the model predicts nothing finite."""
        by_site, plan = self._by_site(counts), self._plan_of(counts)
        fits = self.fits.model(by_site)
        if fits is None:
            return None
        quality = finite_quality(build_model(plan, self.source, fits)[0].float(), self.text, self.expected)
        if quality is None:
            return None
        assert quality.kl is not None and quality.top1 is not None
        before, after = plan.before, plan.after
        return Point(
            q_groups=setting[0],
            kv_groups=setting[1],
            allocation=allocation,
            layers=counts,
            kl=quality.kl,
            loss=quality.loss,
            top1=quality.top1,
            predicted_kl=sum(self.fits.kl_alone[site][kept] for site, kept in by_site.items()),
            parameters=after.parameters / before.parameters,
            flops=after.attention_flops / before.attention_flops,
            cache=after.kv_cache_bytes / before.kv_cache_bytes if before.kv_cache_bytes else None,
        )

    def timed(self, points: Sequence[Point]) -> list[Point]:
        """The points, those of the frontier timed beside the source."""
        start, result = time.perf_counter(), list[Point]()
        frontier = sum(point.frontier for point in points)
        settings = Settings(
            lengths=(self.timed_tokens,), modes=("prefill", "decode"), parts=("model",), repeats=ROUNDS,
            device=self.options.device, dtype="float32",
        )  # fmt: skip
        for point in points:
            if point.frontier:
                self.progress(TIME, sum(p.frontier for p in result), frontier)
                fits = self.fits.model(self._by_site(point.layers))
                model = build_model(self._plan_of(point.layers), self.source, fits or {})[0]
                rows = bench({"source": self.calibrator.model, "converted": model}, settings)["rows"]
                shares = {row["mode"]: 1 / row["speedup"]["median"] for row in rows if row["model"] == "converted"}
                point = replace(point, **shares)
            result.append(point)
        self._spent("time", start)
        return result
