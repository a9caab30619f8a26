"""One attention site fitted to what its source does on text: closed form, refit, refine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..conversion.convert_site import ConvertedSite, SiteRecord
from ..heads import AttentionHeads, Partition, get_method
from ..heads.attend import Attention
from ..heads.refine import refine
from ..heads.refit import output_error, refit
from ..heads.search import search
from ..heads.statistics import Statistics, collect, similarity, with_ridge

PATTERN_ROWS = 8192
"""query positions that patterns are compared on"""

METRIC_RIDGE = 1e-2
"""share of an isotropic part in the metric of outputs"""

_BATCH_TOKENS = 4096

Part = tuple[Tensor, Tensor | None, Tensor]
"""inputs (N, T, D), memory (N, S, D) of cross-attention, outputs (N, T, D)"""


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
