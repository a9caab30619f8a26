"""Calibration: every site fitted on text, and the candidates compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..conversion.build_model import build_model
from ..conversion.convert_site import Calibrated, ConvertedSite
from ..conversion.fitting import Fitting
from ..conversion.plan import Plan
from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import QualityError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import Predictions, kl_to, predict
from ..families import Site
from ..heads import AUTO
from ..progress import Progress, silent
from ..random_generators import generator_for
from ..text.quick_twin import is_twin, twin_of
from .allocation import shared_out, weigh
from .candidates import best_of_each, candidates_of
from .fisher import sensitivity
from .fitter import SiteFitter
from .keep_polish import kinds_of, polished
from .kept_for_resume import KeptParts
from .memory_budget import MemoryBudget
from .replaced_sites import Replacement
from .site_fitters import SiteFitters, first
from .text import Text, calibration_text
from .text_report import text_report

WEIGHED_TOKENS = 2048
"""of the text that tells what the layers of a large model cost, about"""

COMPARED_TOKENS = 16_384
"""of the text that candidates of a large model are compared on, at least; the chosen one is fitted to all of it"""


def calibrate(
    model: Any,
    plan: Plan,
    source: Source,
    device: torch.device,
    budget: MemoryBudget,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    kept: KeptParts | None = None,
) -> Calibrated:
    """Converts every attention site of a plan by what it does on text.

    Each candidate is converted and its output projection refitted; `auto` takes the one that leaves the whole model
    nearest to the source (KL on held-out sequences), and where there is no language model head for each site the
    candidate of the least held-out error. (Mixing candidates by site where there is one was measured and lost.) What
    was chosen is refined, and then trained as a whole; that is kept where it is nearer to the source.

    Args:
        model: the source, in eval mode; it is moved to `device`.
        plan: with `plan.calibration` set.
        source: the same model's weights.
        device: to compute on.
        budget: what may be held, from before `model` was loaded.
        seed: of sampled text, span corruption, sampled positions, searches and batches; the same seed gives the same
            result bit for bit on one CPU with as many threads and the same budget: how many texts are written and
            positions differentiated at a time goes by it. The report has its total as "memory".
        trust_remote_code: for a tokenizer that brings code along.
        progress: called as the work goes on.
        kept: what an earlier run of the same has finished; what this one finishes is put there.

    Raises:
        DataError: there is too little text.
        QualityError: no candidate predicts anything finite.
    """
    kept = KeptParts() if kept is None else kept
    calibrator = Calibrator(model, plan, source, device, budget, seed, trust_remote_code, progress, kept)
    settings, shared = calibrator.settings, None
    if plan.shares_out:
        weighed = kept.weighed(
            calibrator.sites,
            partial(calibrator.fitters, "weigh layers", calibrator.compared),
            lambda site, fitter: weigh(fitter, site, calibrator.weighing, plan, settings.refit),
        )
        shared = shared_out(weighed, calibrator.weighing, plan, source)
        plan = calibrator.plan = shared.plan if shared else plan
    refits_again = settings.refit and calibrator.compared < 1
    finishes = refits_again or settings.refine_steps > 0
    tried = calibrator.candidates("fit", kept, with_halves=not finishes)
    if shared and not any(shared.kept(fits) for fits in tried.values()):
        plan = calibrator.plan = shared.evenly
        tried = calibrator.candidates("fit evenly", kept, with_halves=not finishes)
    report = calibrator.report(plan)
    chosen = best_of_each(tried)
    if plan.method == AUTO and plan.has_language_model_head:
        progress("choose", 0, 1)
        kl = {name: kl for name, choice in tried.items() if (kl := calibrator.kl(plan, choice)) is not None}
        if not kl:
            raise QualityError(
                f"{AUTO}: of {', '.join(tried)} none predicts anything finite: the weights overflow in their dtype; "
                "try --dtype float32 or --dtype bfloat16, or name a --method"
            )
        report["kl_before_refine"] = kl
        report["chosen"] = min(kl, key=kl.__getitem__)
        chosen = tried[report["chosen"]]
    if finishes:
        start = chosen

        def finish(name: str, site: Site, fitter: SiteFitter) -> ConvertedSite:
            return fitter.with_halves(fitter.finish(start[site], refits_again, settings.refine_steps))

        everything = partial(calibrator.fitters, "refine heads", 1.0)
        chosen = kept.converted("refine", [""], calibrator.sites, everything, finish)[""]
    calibrator.site_fitters.forget()
    trained: Mapping[str, Tensor] = {}
    assert plan.calibration is not None
    if plan.calibration.polish_steps and plan.has_language_model_head:
        trained, report["polish"] = kept.trained(lambda: calibrator.polished(plan, chosen))
    if plan.has_language_model_head:
        report["kl"] = calibrator.kl(plan, chosen, trained)
    if shared:
        report["allocation"] = shared.told
    return Calibrated(chosen, report, plan, trained)


class Calibrator:
    """A source model on calibration text: all that does not depend on how many heads are kept."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        source: Source,
        device: torch.device,
        budget: MemoryBudget,
        seed: int,
        trust_remote_code: bool = False,
        progress: Progress = silent,
        kept: KeptParts | None = None,
    ) -> None:
        kept = KeptParts() if kept is None else kept
        self.model, self.plan, self.source, self.device = model, plan, source, device
        self.seed, self.progress = seed, progress
        model.to(device).requires_grad_(False)
        self.budget, self.lean = budget, is_twin(model)
        self.twin = twin_of(model, device)
        self.has_twin = self.lean or self.twin is not model
        if self.lean:  # what is kept is of that copy
            kept.depend_on(b"lean")
        self.text: Text = kept.text(
            self.settings.text_named is None,  # what others wrote is read again: it may be another
            lambda: calibration_text(
                self.twin, plan, source, device, self._generator("text"), trust_remote_code, progress, self.budget.cache
            ),
        )
        least = max(COMPARED_TOKENS, TOKENS_PER_UNKNOWN * (plan.unknowns + 1))
        self.compared = min(1.0, least / self.text.tokens) if self.has_twin else 1.0
        """share of the text that candidates are compared on, evenly or shared out: of a large model a part"""
        graph = self.budget.graph
        self.metrics: dict[Site, Tensor] = kept.metrics(
            self.sites,
            lambda: sensitivity(
                self.twin, self.sites, self.text.batches, device, self._generator("sensitivity"), progress, graph
            ),
        )

        self.site_fitters = SiteFitters(
            self.twin, plan, source, device, self.text, self.metrics, budget.activations, self._generator, self.has_twin
        )

    def _generator(self, purpose: str) -> torch.Generator:
        return generator_for(purpose, self.seed)

    @property
    def settings(self) -> Fitting:
        return self.plan.fitting_on(self.device.type)

    @property
    def sites(self) -> list[Site]:
        return self.plan.converted_sites

    def fitters(
        self, stage: str, share: float = 1.0, sites: Sequence[Site] | None = None
    ) -> Iterator[tuple[Site, SiteFitter]]:
        """Each site with its activations on the device, one at a time.

        Args:
            stage: told as the work goes on.
            share: of each batch of the text, to fit to.
            sites: some of the converted ones; None: all.
        """
        self.progress(stage, 0, len(self.sites))
        for site, fitter in self.site_fitters(self.sites if sites is None else sites, share):
            self.progress(stage, self.sites.index(site), len(self.sites))
            yield site, fitter
        self.progress(stage, len(self.sites), len(self.sites))

    def candidates(self, stage: str, kept: KeptParts, with_halves: bool) -> dict[str, dict[Site, ConvertedSite]]:
        """All that is tried at every site, by name.

        Args:
            stage: under which it is kept.
            kept: what an earlier run has finished.
            with_halves: whether to tell what each half has cost, as nothing comes after.
        """
        plan, refit, candidates = self.plan, self.settings.refit, candidates_of(self.plan)

        def convert(name: str, site: Site, fitter: SiteFitter) -> ConvertedSite:
            method, searched = candidates[name]
            searched = searched and site not in plan.given
            made = fitter.convert(method, plan.partitions[site], searched, refit)
            return fitter.with_halves(made) if with_halves else made

        fitters = partial(self.fitters, "fit heads", self.compared)
        return kept.converted(stage, list(candidates), self.sites, fitters, convert)

    def kl(
        self, plan: Plan, choice: Mapping[Site, ConvertedSite], trained: Mapping[str, Tensor] = MappingProxyType({})
    ) -> float | None:
        """KL of the whole converted model to the source on the held-out sequences, nats a token; None if not finite.

        Of a lean source it is that of the source with the converted sites in it.
        """
        if self.lean:
            return self.replacement.kl({site: converted.heads for site, converted in choice.items()})
        return kl_to(self._expected, self._held_out, build_model(plan, self.source, choice, trained=trained)[0].float())

    def polished(self, plan: Plan, choice: Mapping[Site, ConvertedSite]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """As `keep_polish.polished`, on the sequences that there are."""
        if self.lean:
            return {}, {"steps": 0, "kept": False, "why": "there is too little memory for it"}
        text, kinds = self.text, [self._held_out]
        if text.sampled and not self.model.config.is_encoder_decoder and self.settings.prompts is None:
            kinds = kinds_of(self._held_out, text.batches)
        drawn = self._generator("polish")
        return polished(plan, self.source, self.model, choice, text.batches, kinds, drawn, self.progress)

    @cached_property
    def replacement(self) -> Replacement:
        """The source on the held-out sequences, to put converted sites into."""
        return Replacement(self.model, self.plan, self._held_out, self._expected)

    @cached_property
    def weighing(self) -> Replacement:
        """The same, of a large model its twin on a part of them: it runs once for each site."""
        if not self.has_twin:
            return self.replacement
        share = min(1.0, WEIGHED_TOKENS / self.text.held_out_tokens)
        text = replace(self._held_out, batches=[first(batch, share) for batch in self.text.held_out])
        return Replacement(self.twin, self.plan, text, predict(self.twin, text))

    @cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut(self.text.held_out, self.text.name, 0, self.device, self.text.unknown or 0.0)

    @cached_property
    def _expected(self) -> Predictions:
        return predict(self.model, self._held_out)

    def report(self, plan: Plan) -> dict[str, Any]:
        """What text there was, and memory."""
        expected = self._expected if plan.has_language_model_head else None
        report = self.budget.told | text_report(self.text, plan, self.settings, self.model, self._held_out, expected)
        if self.lean:
            report["warnings"].insert(0, self.budget.lean_warning())
        return report
