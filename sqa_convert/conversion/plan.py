"""The plan: every output tensor, its shape, dtype, shard and origin, made from headers before any weight is read.

Imports neither torch nor transformers, so that `--dry-run` answers at once, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from .. import __version__
from ..checkpoints.dtypes import DTYPES, FLOATING
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError
from ..families import Config, Dimensions, Family, Site, family_of, mean_counts
from ..heads import AUTO, Method, Partition
from ..parse_amounts import parse_size
from .attention_cost import Cost, attention_cost, count_parameters, counts_by_layer
from .fitting import Fitting
from .match_tensors import Stored, stored_tensors
from .request import CASTS, Request

_TEXT_PER_TARGET = 5  # tokens of text for each token that a decoder predicts, under span corruption


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name"""
    origin: str | Site
    """the source tensor it is copied from, or the attention site it is computed for"""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do."""

    request: Request
    """what is asked"""
    family: Family
    dimensions: Dimensions
    method: str
    """its name, or "auto" """
    own_method: Method | None
    """where it was given as an object, not by name"""
    searched: bool
    """whether the heads of a group are searched for, or neighbours, where they are not given"""
    partition_given: bool
    """whether that was asked for, or is given everywhere; else `auto` may try both"""
    calibration: Fitting | None
    """None: from the weights alone"""
    shares_out: bool
    """whether heads are still to be shared out among layers; until then each layer of a kind keeps as many"""
    sites: tuple[Site, ...]
    """all of the model; `partitions` says which of them keep their heads"""
    partitions: dict[Site, Partition]
    """what is planned for each; where it is not given, a search may find another"""
    given: Mapping[Site, Partition]
    """those that were given, of single sites"""
    shards: dict[str, tuple[OutputTensor, ...]]
    """file name -> its tensors, in the order they are computed"""
    source_config: Config
    config: dict[str, Any]
    """config.json of the result"""
    source_names: dict[str, str]
    """canonical name -> name in the source"""
    zeros: dict[str, TensorInfo]
    """biases that the source does without, by canonical name"""
    copies: tuple[tuple[str, str], ...]
    """pairs of names in the source that must hold the same numbers; the second is left out"""
    notes: tuple[str, ...]
    """what there is to know of the source, in sentences"""
    before: Cost
    after: Cost

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of attention that the model has."""
        return frozenset(site.kind for site in self.sites)

    @property
    def converted_sites(self) -> list[Site]:
        """Those that do not keep all of their heads."""
        return [site for site in self.sites if not self.partitions[site].is_identity]

    @property
    def all_given(self) -> bool:
        """Whether the partition of every converted site is given."""
        return _all_given(self.partitions, self.given)

    @property
    def unknowns(self) -> int:
        """Numbers that a fit of the output projection finds for each output: Hq d of the largest converted site."""
        return _unknowns(self.partitions, self.dimensions)

    def fitting_on(self, device_type: str) -> Fitting:
        """What calibration does on such a device: on a CPU less for a large model, where nobody asks for more.

        `calibration` must be set.
        """
        assert self.calibration is not None
        kept = sum(2 * len(p.clusters) + 2 * len(p.groups) for p in self.partitions.values() if not p.is_identity)
        attention = kept * self.dimensions.head_dim * self.dimensions.width
        return self.calibration.affordable(self.before.parameters, attention, device_type == "cpu")

    @property
    def has_language_model_head(self) -> bool:
        return self.family.has_language_model_head(self.source_config)

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All tensors of the result, shard by shard."""
        return chain.from_iterable(self.shards.values())

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def make_plan(source: Source, request: Request) -> Plan:
    """Plans the conversion of `source`.

    Raises:
        RecipeError, UnsupportedModelError: as `Request.partitions`.
        CheckpointError: config and weights disagree.
    """
    partitions, given = request.partitions(source.config), request.given_partitions(source.config)
    method = AUTO if request.chosen_method is None else request.chosen_method.name
    family = family_of(source.config)
    dimensions = family.dimensions(source.config)
    stored = stored_tensors(family, source)

    cast = CASTS.get(request.dtype)
    counts = {site: (len(p.clusters), len(p.kv_groups)) for site, p in partitions.items()}
    by_layer = counts_by_layer(counts)
    tensors = _output_tensors(family, source, stored, counts, cast)
    config = family.result_config(source.config, {kind: mean_counts(layers) for kind, layers in by_layer.items()})
    if any(len(set(layers)) > 1 for layers in by_layer.values()):
        config |= family.uneven_config(by_layer)
    if cast is not None:
        config |= {"dtype": request.dtype}
    config["sqa"] = {
        "source": source.name,
        "revision": source.revision,
        "source_heads": dimensions.heads,
        "method": method,
        "sqa_convert": __version__,
    }
    sites = tuple(family.sites(source.config))
    all_given = _all_given(partitions, given)
    all_kept = all(p.is_identity for p in partitions.values())
    shares_out = not all_kept and request.shares_out(source.config)
    unknowns = dimensions.heads * dimensions.head_dim if shares_out else _unknowns(partitions, dimensions)
    dtype = stored.infos[family.consumed(sites[0])[0]].dtype
    before = {name: info.shape for name, info in stored.infos.items()}
    after = {tensor.name: tensor.shape for tensor in tensors}
    before_counts = dict.fromkeys(sites, (dimensions.heads, dimensions.heads))
    return Plan(
        request=request,
        family=family,
        dimensions=dimensions,
        method=method,
        own_method=None if isinstance(request.method, str) else request.chosen_method,
        searched=request.searched and not all_given,
        partition_given=isinstance(request.partition, str) or all_given,
        calibration=None if all_kept else request.fitting(unknowns * (_TEXT_PER_TARGET if "cross" in by_layer else 1)),
        shares_out=shares_out,
        sites=sites,
        partitions=partitions,
        given=given,
        shards=_shards(tensors, parse_size(request.max_shard_size)),
        source_config=source.config,
        config=config,
        source_names=stored.names,
        zeros=stored.zeros,
        copies=stored.copies,
        notes=(*source.notes, *stored.notes),
        before=attention_cost(dimensions, before_counts, count_parameters(before, stored.others), dtype),
        after=attention_cost(dimensions, counts, count_parameters(after, stored.others), cast or dtype),
    )


def _all_given(partitions: Mapping[Site, Partition], given: Mapping[Site, Partition]) -> bool:
    return bool(given) and all(site in given for site, p in partitions.items() if not p.is_identity)


def _unknowns(partitions: Mapping[Site, Partition], dimensions: Dimensions) -> int:
    return max((len(p.clusters) for p in partitions.values() if not p.is_identity), default=0) * dimensions.head_dim


def _output_tensors(
    family: Family, source: Source, stored: Stored, counts: Mapping[Site, tuple[int, int]], dtype: str | None
) -> list[OutputTensor]:
    """The result's tensors in the source's order; a site's stand where its first one stood."""
    site_of = {name: site for site in family.sites(source.config) for name in family.consumed(site)}
    tensors: list[OutputTensor] = []
    done: set[Site] = set()
    for name, info in stored.infos.items():
        site = site_of.get(name)
        if site is None:
            stored_as = dtype if dtype and info.dtype in FLOATING else info.dtype
            tensors.append(OutputTensor(name, info.shape, stored_as, name))
        elif site not in done:
            done.add(site)
            for new, written in family.written(site, source.config, *counts[site]).items():
                like = stored.infos[written.like].dtype
                tensors.append(OutputTensor(new, written.shape, dtype or like, site))
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(f"{source.name}: {tensor.name} stands there already, as if it had been converted")
        seen.add(tensor.name)
    return tensors


def _shards(tensors: list[OutputTensor], max_bytes: int) -> dict[str, tuple[OutputTensor, ...]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    return {file: tuple(by_name[n] for n in members) for file, members in split.filename_to_tensors.items()}
