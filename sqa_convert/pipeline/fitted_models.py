"""The source of a sweep fitted at many numbers of heads, and models of these fits, measured and timed"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..calibration.allocation import METHOD, cheapest
from ..calibration.calibrate import Calibrator
from ..calibration.load_source import load_source
from ..calibration.memory_budget import memory_budget
from ..calibration.replaced_sites import Replacement
from ..calibration.site_fits import SiteFits
from ..checkpoints.source import Source
from ..conversion.build_model import build_model
from ..conversion.convert_site import ConvertedSite
from ..conversion.heads_by_layer import ADAPTIVE, UNIFORM, CountsByLayer, as_text
from ..conversion.plan import Plan, make_plan
from ..devices import choose_device
from ..errors import QualityError, RecipeError
from ..evaluation.measure import Quality, finite_quality, predict
from ..families import Site
from ..heads.allocate import Counts
from ..progress import Progress
from ..speed.bench import bench
from ..speed.settings import Settings
from ..text.quick_twin import is_twin
from .planned_stages import LOAD
from .run import held_out_text
from .run_options import RunOptions
from .sweep_points import Point

MEASURE, TIME = "measure", "time"
"""stages"""

LONGEST = 1024
"""tokens that are timed, at most"""
ROUNDS = 3
"""of timing"""

REFINE_STEPS = 30
"""of each fit, at most, where nobody asks for more: they tell settings apart"""

TOO_LARGE_TO_TIME = "models are timed in float32, for which there is too little memory"


@dataclass
class FittedModels:
    """A source, fitted at many numbers of heads.

    Where it is a lean copy, as float32 does not fit, no second model is put together: the source is measured with fits
    in the place of its sites, and nothing is timed. Raises RecipeError where times were asked for all the same.
    """

    plan: Plan
    source: Source
    options: RunOptions
    progress: Progress
    speed: bool | None
    """whether to time; None: where that can be"""

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        device, start = choose_device(self.options.device), time.perf_counter()
        held_out = held_out_text(self.plan, self.source, self.options) if self.source.folder else ""
        self.progress(LOAD, 0, 1)
        budget = memory_budget(self.plan, self.source, device)
        model = load_source(self.plan, self.source, self.options.trust_remote_code, budget.lean)
        if is_twin(model) and self.speed:
            raise RecipeError(
                f"{TOO_LARGE_TO_TIME}: --no-speed leaves times out, and a --target of neither prefill nor decode does"
            )
        seed, trust = self.options.seed, self.options.trust_remote_code
        self.calibrator = Calibrator(model, self.plan, self.source, device, budget, seed, trust, self.progress)
        self.text = self.calibrator.replacement.text if isinstance(held_out, str) else held_out
        self.expected = predict(model, self.text)
        self.in_place = Replacement(model, self.plan, self.text, self.expected)
        self.fits = SiteFits()
        self._spent("text", start)

    @property
    def times(self) -> bool:
        return self.speed is not False and not self.calibrator.lean

    @property
    def timed_tokens(self) -> int:
        return min(LONGEST, self.plan.dimensions.context)

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
        quality = self._quality(plan, fits)
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

    def _quality(self, plan: Plan, fits: Mapping[Site, ConvertedSite]) -> Quality | None:
        if self.calibrator.lean:
            return self.in_place.quality({site: fit.heads for site, fit in fits.items()})
        return finite_quality(build_model(plan, self.source, fits)[0].float(), self.text, self.expected)

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
