"""Fit every attention site to what it does on text: statistics, closed forms, refit, refine, and the choice among them.

The source runs over the text; the inputs of its attention sites are kept on the CPU, as many sites at a time as fit
into a fixed amount of memory, and one site's at a time go to the device. What a site should answer is computed from
them. Each site is fitted on the source's activations, independently of the others. (Fitting each on the converted
model's own activations, one after the other, was measured and gained nothing.)
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .activations import capture, sensitivity
from .calibration_text import Text, calibration_text
from .data import BUILT_IN
from .decoding import settle
from .errors import CheckpointError, QualityError, one_line
from .evaluation import HeldOut, Predictions, load_model, measure, predict
from .execution import build_model
from .families import Site
from .heads import AttentionHeads, Partition, get_method
from .heads.attention import Attention
from .heads.refine import refine
from .heads.refit import output_error, refit
from .heads.search import search
from .heads.statistics import Statistics, collect, similarity, with_ridge
from .plan import AUTO, TOKENS_PER_UNKNOWN, Plan
from .progress import Progress, silent
from .sites import Calibrated, ConvertedSite, SiteRecord, order, read_site
from .sources import ModelSource, Source
from .text_fit import misfits

CANDIDATES = {"svd": ("svd", True), "svd, contiguous": ("svd", False), "procrustes": ("procrustes", True)}
"""what `auto` chooses from: method, and whether the partition is searched"""
PATTERN_ROWS = 8192
"""query positions that patterns are compared on"""
METRIC_RIDGE = 1e-2
"""share of an isotropic part in the metric of outputs"""
MEMORY = 4e9
"""bytes of activations kept at a time"""
_BATCH_TOKENS = 4096

Part = tuple[Tensor, Tensor | None, Tensor]
"""inputs (N, T, D), memory (N, S, D) of cross-attention, outputs (N, T, D)"""


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
    was chosen is refined.

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
    candidates = {plan.method: (plan.method, plan.searched)}
    if plan.method == AUTO:
        fits = CANDIDATES.items()
        candidates = {n: c for n, c in fits if not plan.partition_given or c[1] == plan.searched}
        if plan.partition_given and not plan.searched:
            candidates["procrustes"] = ("procrustes", False)
    tried: dict[str, dict[Site, ConvertedSite]] = {name: {} for name in candidates}
    for site, fitter in calibrator.fitters("fit heads"):
        for name, (method, searched) in candidates.items():
            tried[name][site] = fitter.convert(method, plan.partitions[site.kind], searched, settings.refit)
    report = calibrator.report(plan)
    chosen = best_of_each(tried)
    if plan.method == AUTO and plan.has_language_model_head:
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
            site: fitter.refine(chosen[site], settings.refine_steps)
            for site, fitter in calibrator.fitters("refine heads")
        }
    return Calibrated(chosen, report)


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
        self.sites = [site for site in plan.sites if not plan.partitions[site.kind].is_identity]
        self.metrics: dict[Site, Tensor] = {}
        if plan.has_language_model_head:
            self.metrics = sensitivity(
                model, self.sites, self.text.batches, device, self._generator("sensitivity"), progress
            )

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {purpose}".encode()))

    def fitters(self, stage: str) -> Iterator[tuple[Site, SiteFitter]]:
        """Each site with its activations on the device, one at a time."""
        for group in self._groups():
            activations = capture(self.model, group, self.text.batches + self.text.held_out, self.device)
            for site in group:
                self.progress(stage, self.sites.index(site), len(self.sites))
                yield (
                    site,
                    SiteFitter(
                        self.plan.family.attention(site, self.plan.source_config),
                        read_site(self.plan, self.source, site).tensors(),
                        activations.pop(site),
                        self.metrics.get(site),
                        self.text.fitted,
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

    def kl(self, plan: Plan, choice: Mapping[Site, ConvertedSite]) -> float | None:
        """KL of the whole converted model to the source on the held-out sequences, nats a token; None if not finite."""
        student = build_model(plan, self.source, choice)[0].float()
        try:
            return measure(predict(student, self._held_out), self._expected).kl
        except QualityError:
            return None

    @cached_property
    def _held_out(self) -> HeldOut:
        batches = [batch | {"labels": batch.get("labels", batch["input_ids"])} for batch in self.text.held_out]
        chosen = self.plan.calibration is not None and self.plan.calibration.text not in (None, BUILT_IN)
        return HeldOut(batches, self.text.name, 0, self.device, self.text.unknown or 0.0, chosen)

    @cached_property
    def _expected(self) -> Predictions:
        return predict(self.model, self._held_out)

    def report(self, plan: Plan) -> dict[str, Any]:
        """What text there was."""
        settings = plan.calibration
        assert settings is not None
        report: dict[str, Any] = {
            "text": self.text.name,
            "tokens": sum(batch["input_ids"].numel() for batch in self.text.batches),
            "held_out_tokens": sum(batch["input_ids"].numel() for batch in self.text.held_out),
            "refit": settings.refit,
            "refine_steps": settings.refine_steps,
        }
        report |= self._fit_of_the_text()
        unknowns = plan.unknowns + 1
        names = ("input_ids", "labels")
        least = min(sum(b.get(name, b["input_ids"]).numel() for b in self.text.batches) for name in names)
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


class SiteFitter:
    """One site's activations on the device, and what is made from them.

    Outputs are compared in the metric of what the rest of the model does with them: output projections and wanted
    outputs are multiplied by a root of it, and what is made is divided by it again.
    """

    def __init__(
        self,
        attention: Attention,
        heads: AttentionHeads,
        activations: tuple[Tensor, Tensor | None],
        metric: Tensor | None,
        fitted: int,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.attention, self.seed = attention, generator.initial_seed()
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.root = torch.eye(heads.output.shape[-1])
        if metric is not None:
            self.root = torch.linalg.cholesky(with_ridge(metric, METRIC_RIDGE)).float()
        self.heads = _through(heads, self.root)
        x, memory = (None if t is None else t.to(self.device) for t in activations)
        assert x is not None
        on_device = _to(self.heads, self.device)
        with torch.no_grad():
            wanted = torch.cat([attention.layer(on_device, *part) for part in _parts(x, memory)])
        self.fit_part: Part = (x[:fitted], None if memory is None else memory[:fitted], wanted[:fitted])
        self.held_out: Part = (x[fitted:], None if memory is None else memory[fitted:], wanted[fitted:])
        self._found: dict[tuple[int, int], Partition] = {}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def statistics(self) -> Statistics:
        x = self.fit_part[0]
        rows = min(max(1, PATTERN_ROWS // len(x)), x.shape[1])
        return collect(
            _to(self.heads, self.device), self.attention, _parts(*self.fit_part[:2]), rows, self._generator()
        )

    @cached_property
    def similarity(self) -> dict[str, list[list[float]]]:
        return similarity(self.heads, self.statistics)

    def searched(self, q_groups: int, kv_groups: int) -> Partition:
        counts = q_groups, kv_groups
        if counts not in self._found:
            self._found[counts] = search(self.heads, self.statistics, *counts, self._generator())
        return self._found[counts]

    def convert(self, method: str, planned: Partition, searched: bool, with_refit: bool) -> ConvertedSite:
        """One candidate; a refitted output projection is kept where it lowers the held-out error."""
        partition = self.searched(len(planned.clusters), len(planned.groups)) if searched else planned
        heads = _to(get_method(method).convert(self.heads, partition, self.statistics), self.device)
        errors = {"converted": self._error(heads)}
        if with_refit:
            refitted = refit(heads, self.attention, _parts(*self.fit_part))
            errors["refit"] = self._error(refitted)
            heads = refitted if errors["refit"] < errors["converted"] else heads
        return self._result(heads, SiteRecord(method, partition, errors, self.similarity))

    def refine(self, start: ConvertedSite, steps: int) -> ConvertedSite:
        """Trains a candidate; kept where that lowers the held-out error."""
        heads = _to(_through(start.heads, self.root), self.device)
        refined = refine(heads, self.attention, *self.fit_part, steps, self._generator())
        record = replace(start.record, errors=start.record.errors | {"refined": self._error(refined)})
        return self._result(refined, record) if record.kept == "refined" else replace(start, record=record)

    def _result(self, heads: AttentionHeads, record: SiteRecord) -> ConvertedSite:
        inverse = torch.linalg.inv(self.root.double()).float()
        return ConvertedSite(_through(_to(heads, "cpu"), inverse), record)

    @torch.no_grad()
    def _error(self, heads: AttentionHeads) -> float:
        return output_error(heads, self.attention, _parts(*self.held_out))


def _through(heads: AttentionHeads, matrix: Tensor) -> AttentionHeads:
    """The heads with their output multiplied by a matrix (D, D)."""
    bias = None if heads.output_bias is None else heads.output_bias @ matrix
    return replace(heads, output=heads.output @ matrix, output_bias=bias)


def _to(heads: AttentionHeads, device: torch.device | str) -> AttentionHeads:
    return AttentionHeads(*(None if t is None else t.to(device) for t in vars(heads).values()))


def _parts(*tensors: Tensor | None) -> Iterator[Any]:
    """Sequences a few at a time; None stays None."""
    first = tensors[0]
    assert first is not None
    size = max(1, _BATCH_TOKENS // first.shape[1])
    for start in range(0, len(first), size):
        yield tuple(None if t is None else t[start : start + size] for t in tensors)


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
        return settle(architecture.from_pretrained(source.folder, dtype="float32").eval())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{source.name} cannot be loaded: {one_line(error)}") from error
