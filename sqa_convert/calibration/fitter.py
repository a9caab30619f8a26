"""One attention site fitted to what its source does on text: closed form, refit, refine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..conversion.convert_site import ConvertedSite, SiteRecord
from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import QualityError
from ..heads import AttentionHeads, Method, Partition, get_method
from ..heads.attend import Attention
from ..heads.group_cost import CircuitGrams, GroupCost
from ..heads.refine import refine
from ..heads.refit import output_error, refit
from ..heads.restored_half import CONVERTED_ALONE
from ..heads.search import search_by
from ..heads.site_inputs import Inputs, concatenated
from ..heads.statistics import Statistics, collect, similarity, with_ridge

PATTERN_ROWS = 8192
"""query positions that patterns are compared on, about"""

LITTLE_WORK = 2e9
"""multiplications of a search that only tells what some numbers of heads would lose"""

METRIC_RIDGE = 1e-2
"""share of an isotropic part in the metric of outputs"""

OVERFLOW = "the source's activations overflow on the calibration text; give another --calibration, or --no-calibration"

_BATCH_TOKENS = 4096

Part = tuple[Inputs, Tensor]
"""inputs of sequences of one length, and the outputs (N, T, D) that the source makes of them"""


class SiteFitter:
    """One site's activations on the device, and what is made from them.

    Outputs are compared in the metric of what the rest of the model does with them: output projections and wanted
    outputs are multiplied by a root of it, and what is made is divided by it again.

    Raises QualityError where the outputs, or what they do, are no numbers.
    """

    def __init__(
        self,
        attention: Attention,
        heads: AttentionHeads,
        fitted: Sequence[Inputs],
        held_out: Sequence[Inputs],
        metric: Tensor | None,
        device: torch.device,
        generator: torch.Generator,
        bfloat16: bool = False,
    ) -> None:
        self.attention, self.seed, self.bfloat16 = attention, generator.initial_seed(), bfloat16
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.root = torch.eye(heads.output.shape[-1])
        if metric is not None:
            _check_finite(metric)
            self.root = torch.linalg.cholesky(with_ridge(metric, METRIC_RIDGE)).float()
        self.heads = _through(heads, self.root)
        self.fit_parts, self.held_out = self._with_outputs(fitted), self._with_outputs(held_out)
        self._found: dict[tuple[int, int], Partition] = {}

    @torch.no_grad()
    def _with_outputs(self, batches: Sequence[Inputs]) -> list[Part]:
        heads = _to(self.heads, self.device)
        parts = []
        for inputs in (together.to(self.device).float() for together in concatenated(batches)):
            outputs = [
                self.attention.layer(heads, *part.arguments)
                for part in (inputs[rows] for rows in inputs.split(_BATCH_TOKENS))
            ]
            parts.append((inputs, torch.cat(outputs)))
            _check_finite(inputs.count(parts[-1][1]))
        return parts

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def statistics(self) -> Statistics:
        share = min(1.0, PATTERN_ROWS / sum(inputs.positions for inputs, _ in self.fit_parts))
        batches = (inputs for inputs, _ in _batches(self.fit_parts))
        return collect(_to(self.heads, self.device), self.attention, batches, share, self._generator())

    @cached_property
    def similarity(self) -> dict[str, list[list[float]]]:
        return similarity(self.heads, self.statistics)

    def searched(self, q_groups: int, kv_groups: int) -> Partition:
        counts = q_groups, kv_groups
        if counts not in self._found:
            self._found[counts] = search_by(self._grams, *counts, self._generator())
        return self._found[counts]

    def loss(self, q_groups: int, kv_groups: int) -> float:
        """Energy of the output that such counts lose in closed form, in a good partition, before any fit."""
        counts = q_groups, kv_groups
        found = self._found.get(counts) or search_by(self._grams, *counts, self._generator(), LITTLE_WORK)
        return sum(GroupCost(self._grams, 1, self._generator()).costs(found.groups))

    @cached_property
    def _grams(self) -> CircuitGrams:
        return CircuitGrams(self.heads, self.statistics)

    def convert(self, method: str | Method, planned: Partition, searched: bool, with_refit: bool) -> ConvertedSite:
        """One candidate; a refitted output projection is kept where it lowers the held-out error."""
        partition = self.searched(len(planned.clusters), len(planned.groups)) if searched else planned
        chosen = get_method(method)
        heads = _to(chosen.merged(self.heads, partition, self.statistics), self.device)
        errors = {"converted": self._error(heads)}
        if with_refit:
            refitted = refit(heads, self.attention, _batches(self.fit_parts))
            errors["refit"] = self._error(refitted)
            heads = refitted if errors["refit"] < errors["converted"] else heads
        return self._result(heads, SiteRecord(chosen.name, partition, errors, self.similarity))

    def finish(self, start: ConvertedSite, refit_again: bool, steps: int) -> ConvertedSite:
        """A candidate that was fitted to other text, or to less, refitted to this where that lowers the held-out error,
        and trained."""
        if refit_again:
            heads = _to(_through(start.heads, self.root), self.device)
            heads = refit(heads, self.attention, _batches(self.fit_parts))
            error, record = self._error(heads), start.record
            if error < record.error:
                start = self._result(heads, replace(record, errors=record.errors | {"refit": error}))
        return self.refine(start, steps) if steps else start

    def refine(self, start: ConvertedSite, steps: int) -> ConvertedSite:
        """Trains a candidate; kept where that lowers the held-out error."""
        heads = _to(_through(start.heads, self.root), self.device)
        refined = refine(heads, self.attention, self.fit_parts, steps, self._generator(), self.bfloat16)
        record = replace(start.record, errors=start.record.errors | {"refined": self._error(refined)})
        return self._result(refined, record) if record.kept == "refined" else replace(start, record=record)

    def with_halves(self, made: ConvertedSite) -> ConvertedSite:
        """The same with what each half of it alone has cost: patterns, values."""
        errors = {half: self._error(self._half_alone(made, half)) for half in CONVERTED_ALONE}
        finite = {half: error for half, error in errors.items() if math.isfinite(error)}
        return replace(made, record=replace(made.record, half_errors=finite))

    def half_alone(self, made: ConvertedSite, half: str) -> AttentionHeads:
        """Heads of which one half, "patterns" or "values", is converted and the other the source's, their output
        projections fitted again."""
        inverse = torch.linalg.inv(self.root.double()).float()
        return _through(_to(self._half_alone(made, half), "cpu"), inverse)

    def _half_alone(self, made: ConvertedSite, half: str) -> AttentionHeads:
        heads = _to(_through(made.heads, self.root), self.device)
        alone = CONVERTED_ALONE[half](_to(self.heads, self.device), heads, made.record.partition)
        wanted = TOKENS_PER_UNKNOWN * (alone.output.shape[0] * alone.output.shape[1] + 1)
        share = min(1.0, wanted / sum(inputs.positions for inputs, _ in self.fit_parts))
        some = [(math.ceil(share * len(inputs)), inputs, outputs) for inputs, outputs in self.fit_parts]
        return refit(alone, self.attention, _batches([(inputs[:n], outputs[:n]) for n, inputs, outputs in some]))

    def _result(self, heads: AttentionHeads, record: SiteRecord) -> ConvertedSite:
        inverse = torch.linalg.inv(self.root.double()).float()
        return ConvertedSite(_through(_to(heads, "cpu"), inverse), record)

    @torch.no_grad()
    def _error(self, heads: AttentionHeads) -> float:
        return output_error(heads, self.attention, _batches(self.held_out))


def _check_finite(made: Tensor) -> None:
    """Raises QualityError."""
    if not made.isfinite().all():
        raise QualityError(f"an attention makes what is no number: {OVERFLOW}")


def _through(heads: AttentionHeads, matrix: Tensor) -> AttentionHeads:
    """The heads with their output multiplied by a matrix (D, D)."""
    bias = None if heads.output_bias is None else heads.output_bias @ matrix
    return replace(heads, output=heads.output @ matrix, output_bias=bias)


def _to(heads: AttentionHeads, device: torch.device | str) -> AttentionHeads:
    return AttentionHeads(*(None if t is None else t.to(device) for t in vars(heads).values()))


def _batches(parts: Sequence[Part]) -> Iterator[Part]:
    """A few sequences at a time."""
    return ((inputs[rows], wanted[rows]) for inputs, wanted in parts for rows in inputs.split(_BATCH_TOKENS))
