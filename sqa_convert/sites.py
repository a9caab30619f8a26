"""One attention site: read, converted from the weights alone, and made the tensors of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .families import Site
from .heads import AttentionHeads, Partition, get_method
from .plan import OutputTensor, Plan
from .sources import Source, as_bytes, check_finite, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SiteRecord:
    """How one attention site was converted, for the report."""

    method: str
    partition: Partition
    errors: dict[str, float] = field(default_factory=dict)
    """of the site's output on held-out text, as a share of its variance, after each stage"""
    similarity: dict[str, list[list[float]]] | None = None
    """of the source's heads"""

    @property
    def kept(self) -> str:
        """The stage whose heads were kept: the first of the least error."""
        return min(self.errors, key=self.errors.__getitem__)

    @property
    def error(self) -> float:
        """Of what was kept."""
        return self.errors[self.kept]


@dataclass(frozen=True)
class ConvertedSite:
    """The heads of a converted site."""

    heads: AttentionHeads
    record: SiteRecord


Sites = Mapping[Site, ConvertedSite]


@dataclass(frozen=True)
class Calibrated:
    """What calibration gives a conversion."""

    sites: Sites
    """those it has converted"""
    report: dict[str, Any] | None
    """what it did, None where there was none"""


def convert_site(plan: Plan, source: Source, site: Site) -> ConvertedSite:
    """Converts one site from the weights alone. Raises CheckpointError."""
    import torch

    heads, partition = read_site(plan, source, site), plan.partitions[site.kind]
    if partition.is_identity:
        return ConvertedSite(heads, SiteRecord("none", partition))
    method, statistics = get_method(plan.method), None
    if method.needs_statistics or plan.searched:
        from .heads.search import search
        from .heads.statistics import from_norms

        norms = [_norm(plan, source, prefix) for prefix in plan.family.norms(site)]
        statistics = from_norms(heads, plan.family.attention(site, plan.source_config), *norms)
        if plan.searched:
            counts = len(partition.clusters), len(partition.groups)
            partition = search(heads, statistics, *counts, torch.Generator().manual_seed(0))
    return ConvertedSite(method.convert(heads, partition, statistics), SiteRecord(method.name, partition))


def site_bytes(
    plan: Plan, site: Site, heads: AttentionHeads, tensors: list[OutputTensor], where: str
) -> list[memoryview]:
    """What the result holds of a converted site, of each of its `tensors`. Raises CheckpointError."""
    made, written = [], plan.family.write(site, heads)
    for tensor in tensors:
        made.append(as_bytes(written.pop(tensor.name).to(torch_dtype(tensor.dtype))))
        check_finite(made[-1], tensor.dtype, tensor.name, where)
    return made


def read_site(plan: Plan, source: Source, site: Site) -> AttentionHeads:
    """The source's heads of one site. Raises CheckpointError."""
    return plan.family.read(site, lambda name: _get(plan, source, name), plan.dimensions)


def _norm(plan: Plan, source: Source, prefix: str) -> tuple[Tensor, Tensor | None]:
    bias = f"{prefix}.bias"
    return (
        _get(plan, source, f"{prefix}.weight"),
        _get(plan, source, bias) if bias in plan.source_names else None,
    )


def _get(plan: Plan, source: Source, name: str) -> Tensor:
    import torch

    stored = plan.source_names[name]
    tensor = source.read(stored)
    check_finite(as_bytes(tensor), source.index[stored].dtype, name, source.name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
