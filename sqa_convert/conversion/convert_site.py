"""One attention site: read, converted from the weights alone, and written as tensors of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..checkpoints.dtypes import check_finite, decoded_dtype, encoded
from ..checkpoints.source import Source
from ..families import Site
from ..heads import AttentionHeads, Method, Partition, get_method
from .plan import OutputTensor, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints.dtypes import Array


@dataclass(frozen=True)
class SiteRecord:
    """How one attention site was converted, for the report."""

    method: str
    partition: Partition
    errors: dict[str, float] = field(default_factory=dict)
    """of the site's output on held-out text, as a share of its variance, after each stage"""
    similarity: dict[str, list[list[float]]] | None = None
    """of the source's heads"""
    half_errors: dict[str, float] = field(default_factory=dict)
    """likewise of heads of which only the "patterns" (queries and keys) are converted, or only the "values", their
    output projections fitted again"""

    @property
    def kept(self) -> str:
        """The stage whose heads the result has: the first of the least error."""
        return min(self.errors, key=lambda stage: order(self.errors[stage]))

    @property
    def error(self) -> float:
        """Of that stage."""
        return self.errors[self.kept]


def order(error: float) -> float:
    """A key to sort errors by: one that is no number comes last."""
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class ConvertedSite:
    """The heads of a converted site."""

    heads: AttentionHeads[Any]
    record: SiteRecord


Sites = Mapping[Site, ConvertedSite]


@dataclass(frozen=True)
class Calibrated:
    """What calibration gives a conversion."""

    sites: Sites
    """those it has converted"""
    report: dict[str, Any] | None
    """what it did, None where there was none"""
    plan: Plan
    """what is converted, with the heads of each layer where calibration shared them out"""
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    """tensors of the result that were trained, in the place of converted and copied ones"""


def plan_method(plan: Plan) -> Method:
    """The method of a plan that names or gives one. Raises RecipeError."""
    return get_method(plan.own_method or plan.method)


def uses_torch(plan: Plan) -> bool:
    """Whether the sites of a plan are converted by torch."""
    if not plan.converted_sites:
        return False
    return plan.calibration is not None or plan.searched or plan_method(plan).needs_statistics


def convert_site(plan: Plan, source: Source, site: Site) -> ConvertedSite:
    """Converts one site from the weights alone. Raises CheckpointError."""
    import numpy as np

    heads, partition = read_site(plan, source, site), plan.partitions[site]
    if partition.is_identity:
        return ConvertedSite(heads, SiteRecord("none", partition))
    method, statistics = plan_method(plan), None
    if uses_torch(plan):
        import torch

        from ..heads.search import search
        from ..heads.statistics import from_norms

        torch.set_num_threads(1)
        heads = heads.tensors()
        norms = [read_norm(plan, source, prefix) for prefix in plan.family.norms(site)]
        statistics = from_norms(heads, plan.family.attention(site, plan.source_config), *norms)
        if plan.searched and site not in plan.given:
            counts = len(partition.clusters), len(partition.groups)
            partition = search(heads, statistics, *counts, torch.Generator().manual_seed(0))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is stored
        result = method.merged(heads, partition, statistics)
    return ConvertedSite(result, SiteRecord(method.name, partition))


def site_bytes(
    plan: Plan, site: Site, heads: AttentionHeads[Any], tensors: list[OutputTensor], where: str
) -> Iterator[Iterator[memoryview]]:
    """The bytes of each of a site's `tensors`, in pieces. Raises CheckpointError."""
    written = plan.family.write(site, heads.arrays())
    for tensor in tensors:
        yield tensor_bytes(written[tensor.name], tensor, where)


def tensor_bytes(array: Array, tensor: OutputTensor, where: str) -> Iterator[memoryview]:
    """The bytes of a tensor of the result, in pieces. Raises CheckpointError where one is not finite."""
    for piece in encoded(array, tensor.dtype):
        check_finite(piece, tensor.dtype, tensor.name, where)
        yield piece


def read_site(plan: Plan, source: Source, site: Site) -> AttentionHeads[Array]:
    """The source's heads of one site. Raises CheckpointError."""
    return plan.family.read(site, lambda name: read_tensor(plan, source, name), plan.dimensions)


def read_tensor(plan: Plan, source: Source, name: str) -> Array:
    """A tensor of the source by its canonical name. Raises CheckpointError."""
    import numpy as np

    absent = plan.zeros.get(name)
    if absent is not None:
        return np.zeros(absent.shape, decoded_dtype(absent.dtype))
    return source.read(plan.source_names[name])


def read_norm(plan: Plan, source: Source, prefix: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias (D,) of a norm. Raises CheckpointError."""
    import torch

    def read(name: str) -> Tensor:
        return torch.from_numpy(source.read(plan.source_names[name]))

    bias = f"{prefix}.bias"
    return read(f"{prefix}.weight"), read(bias) if bias in plan.source_names else None
