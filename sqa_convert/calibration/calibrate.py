"""Calibration: every site fitted on text, and the candidates compared."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import Source
from ..conversion.build_model import build_model
from ..conversion.convert_site import Calibrated, ConvertedSite, order, read_site
from ..conversion.plan import Plan
from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import CheckpointError, QualityError, one_line
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.load import load_model
from ..evaluation.measure import Predictions, kl_to, measure, predict
from ..families import Site
from ..heads import AUTO, Method
from ..progress import Progress, no_bars_of_others, silent, step_done
from ..random_generators import generator_for
from ..text.plain_generation import settle
from ..text.suitability import misfits
from .activations import capture
from .allocation import shared_out
from .fisher import sensitivity
from .fitter import SiteFitter
from .keep_polish import kinds_of, polished
from .replaced_sites import Replacement
from .text import Text, calibration_text

CANDIDATES = {"svd": ("svd", True), "svd, contiguous": ("svd", False), "procrustes": ("procrustes", True)}
"""what `auto` chooses from: method, and whether the partition is searched"""

MEMORY = 4e9
"""bytes of activations kept at a time"""


def calibrate(
    model: Any,
    plan: Plan,
    source: Source,
    device: torch.device,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
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
        seed: of sampled text, span corruption, sampled positions, searches and batches; the same seed gives the same
            result bit for bit on one CPU.
        trust_remote_code: for a tokenizer that brings code along.
        progress: called as the work goes on.

    Raises:
        DataError: there is too little text.
        QualityError: no candidate predicts anything finite.
    """
    settings = plan.calibration
    assert settings is not None
    calibrator = Calibrator(model, plan, source, device, seed, trust_remote_code, progress)
    allocation = None
    if plan.request.adaptive:
        plan, allocation = shared_out(calibrator.fitters("weigh layers"), calibrator.replacement, plan, source)
        calibrator.plan = plan
    candidates = _candidates(plan)
    tried: dict[str, dict[Site, ConvertedSite]] = {name: {} for name in candidates}
    for site, fitter in calibrator.fitters("fit heads"):
        for number, (name, (method, searched)) in enumerate(candidates.items()):
            step_done(number / len(candidates))
            searched = searched and site not in plan.given
            made = fitter.convert(method, plan.partitions[site], searched, settings.refit)
            tried[name][site] = made if settings.refine_steps else fitter.with_halves(made)
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
    if settings.refine_steps:
        chosen = {
            site: fitter.with_halves(fitter.refine(chosen[site], settings.refine_steps))
            for site, fitter in calibrator.fitters("refine heads")
        }
    trained: Mapping[str, Tensor] = {}
    if settings.polish_steps and plan.has_language_model_head:
        trained, report["polish"] = calibrator.polished(plan, chosen)
    if plan.has_language_model_head:
        report["kl"] = calibrator.kl(plan, chosen, trained)
    if allocation is not None:
        report["allocation"] = allocation
    return Calibrated(chosen, report, plan, trained)


def _candidates(plan: Plan) -> dict[str, tuple[str | Method, bool]]:
    """What is tried: method, and whether the partition is searched."""
    if plan.method != AUTO:
        return {plan.method: (plan.own_method or plan.method, plan.searched)}
    if plan.all_given:
        return {"svd": ("svd", False), "procrustes": ("procrustes", False)}
    candidates: dict[str, tuple[str | Method, bool]] = {
        name: candidate for name, candidate in CANDIDATES.items()
        if not plan.partition_given or candidate[1] == plan.searched
    }  # fmt: skip
    if plan.partition_given and not plan.searched:
        candidates["procrustes"] = ("procrustes", False)
    return candidates


def best_of_each(tried: Mapping[str, Mapping[Site, ConvertedSite]]) -> dict[Site, ConvertedSite]:
    """For each site the candidate with the least held-out error; of equals the first.

    Raises QualityError where none has an error that is a number.
    """
    sites = next(iter(tried.values()))
    best = {site: min((made[site] for made in tried.values()), key=lambda c: order(c.record.error)) for site in sites}
    for site, candidate in best.items():
        if not math.isfinite(candidate.record.error):
            raise QualityError(
                f"{site.kind} {site.layer}: no fit of its heads is finite: the source's activations overflow on the "
                "calibration text; give another --calibration, or --no-calibration"
            )
    return best


class Calibrator:
    """A source model on calibration text: all that does not depend on how many heads are kept."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        source: Source,
        device: torch.device,
        seed: int,
        trust_remote_code: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.model, self.plan, self.source, self.device = model, plan, source, device
        self.seed, self.progress = seed, progress
        model.to(device).requires_grad_(False)
        self.text: Text = calibration_text(
            model, plan, source, device, self._generator("text"), trust_remote_code, progress
        )
        self.metrics: dict[Site, Tensor] = sensitivity(
            model, plan.converted_sites, self.text.batches, device, self._generator("sensitivity"), progress
        )

    def _generator(self, purpose: str) -> torch.Generator:
        return generator_for(purpose, self.seed)

    @property
    def sites(self) -> list[Site]:
        return self.plan.converted_sites

    def fitters(self, stage: str) -> Iterator[tuple[Site, SiteFitter]]:
        """Each site with its activations on the device, one at a time."""
        self.progress(stage, 0, len(self.sites))
        for group in self._groups():
            activations = capture(self.model, group, self.text.batches + self.text.held_out, self.device)
            for site in group:
                self.progress(stage, self.sites.index(site), len(self.sites))
                inputs, fitted = activations.pop(site), len(self.text.batches)
                yield (
                    site,
                    SiteFitter(
                        self.plan.family.attention(site, self.plan.source_config),
                        read_site(self.plan, self.source, site).tensors(),
                        inputs[:fitted],
                        inputs[fitted:],
                        self.metrics.get(site),
                        self.device,
                        self._generator(site.prefix),
                    ),
                )
        self.progress(stage, len(self.sites), len(self.sites))

    def _groups(self) -> Iterator[Sequence[Site]]:
        """Sites whose activations fit into memory together, at least one."""
        tokens = sum(batch["input_ids"].numel() for batch in self.text.batches + self.text.held_out)
        size = max(1, int(MEMORY // (tokens * self.plan.dimensions.width * 4)))
        for start in range(0, len(self.sites), size):
            yield self.sites[start : start + size]

    def kl(
        self, plan: Plan, choice: Mapping[Site, ConvertedSite], trained: Mapping[str, Tensor] = MappingProxyType({})
    ) -> float | None:
        """KL of the whole converted model to the source on the held-out sequences, nats a token; None if not finite."""
        return kl_to(self._expected, self._held_out, build_model(plan, self.source, choice, trained=trained)[0].float())

    def polished(self, plan: Plan, choice: Mapping[Site, ConvertedSite]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """As `keep_polish.polished`, on the sequences that there are."""
        settings, text, kinds = plan.calibration, self.text, [self._held_out]
        assert settings is not None
        if text.sampled and not self.model.config.is_encoder_decoder and settings.prompts is None:
            kinds = kinds_of(self._held_out, text.batches)
        drawn = self._generator("polish")
        return polished(plan, self.source, self.model, choice, text.batches, kinds, drawn, self.progress)

    @cached_property
    def replacement(self) -> Replacement:
        """The source on the held-out sequences, to put converted sites into."""
        return Replacement(self.model, self.plan, self._held_out, self._expected)

    @cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut(self.text.held_out, self.text.name, 0, self.device, self.text.unknown or 0.0)

    @cached_property
    def _expected(self) -> Predictions:
        return predict(self.model, self._held_out)

    def report(self, plan: Plan) -> dict[str, Any]:
        """What text there was."""
        settings = plan.calibration
        assert settings is not None
        report: dict[str, Any] = {
            "text": self.text.name,
            "tokens": self.text.tokens,
            "held_out_tokens": self.text.held_out_tokens,
            "refit": settings.refit,
            "refine_steps": settings.refine_steps,
        }
        report |= self._fit_of_the_text()
        unknowns = plan.unknowns + 1
        least = min(self.text.tokens, self.text.tokens if self.text.answered is None else self.text.answered)
        if least < TOKENS_PER_UNKNOWN * unknowns:
            what = (
                f"{least:,} calibration tokens for {unknowns:,} unknowns of a fit, {TOKENS_PER_UNKNOWN} for each are "
                "advised: the result may be worse than --no-calibration; give more with --calibration-tokens"
            )
            few = {"rule": "few_tokens", "value": round(least / unknowns, 2), "bound": TOKENS_PER_UNKNOWN, "text": what}
            report["warnings"].append(few)
        return report

    def _fit_of_the_text(self) -> dict[str, Any]:
        """Whether the model was made for the text, as "warnings"; of its own text "own_loss", nats a token."""
        loss = None
        with contextlib.suppress(QualityError):
            if self.plan.has_language_model_head and (self.text.sampled or self.text.unknown is not None):
                loss = measure(self._expected).loss
        if self.text.sampled:
            return {"warnings": []} | ({} if loss is None else {"own_loss": loss})
        written = self.text.unknown is not None  # else nobody did
        return {"warnings": misfits(self._held_out.fit(self.model, loss), "--calibration") if written else []}


def load_source(plan: Plan, source: Source, trust_remote_code: bool = False) -> Any:
    """The source as a float32 model in eval mode; of one in memory a copy. Raises CheckpointError."""
    if isinstance(source, ModelSource):
        return settle(copy.deepcopy(source.model).float().eval())
    assert source.folder is not None
    if plan.has_language_model_head:
        return load_model(source.folder, dtype="float32", trust_remote_code=trust_remote_code)
    import transformers

    architecture = getattr(transformers, plan.family.source_architecture(plan.source_config))
    try:
        with no_bars_of_others():
            return settle(architecture.from_pretrained(source.folder, dtype="float32").eval())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{source.name} cannot be loaded: {one_line(error)}") from error
