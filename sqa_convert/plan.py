"""The plan: every output tensor, its shape, dtype, shard and origin, made from headers before any weight is read.

Imports neither torch nor transformers, so that `--dry-run` answers at once, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__
from .checkpoint import FLOATING, ITEM_SIZE, Source
from .errors import CheckpointError, RecipeError
from .families import Dimensions, Family, Site, family_of
from .heads.partition import Partition, check_head_counts, variant_heads

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DEFAULT_SHARD = "5GB"


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
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Cost:
    """What the attention of a model costs."""

    q_heads: dict[str, int]
    """by site kind"""
    kv_heads: dict[str, int]
    parameters: int
    """of the whole model"""
    kv_cache_bytes: int
    """per token of context, all layers: decoder self-attention, or for T5 also cross-attention per encoder token"""
    attention_flops: int
    """of all attention sites for one input of `context` tokens, projections included"""
    score_flops: int
    """of those, the two (T, T) products: what falls by H / Hq"""


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do."""

    family: Family
    dimensions: Dimensions
    method: str
    sites: tuple[Site, ...]
    """those that are converted; the others keep their heads"""
    partitions: dict[str, Partition]
    """by site kind"""
    shards: dict[str, tuple[OutputTensor, ...]]
    """file name -> its tensors, in the order they are computed"""
    config: dict[str, Any]
    """config.json of the result"""
    source_names: dict[str, str]
    """canonical name -> name in the source"""
    before: Cost
    after: Cost

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.shards.values() for tensor in tensors)


def make_plan(
    source: Source,
    q_groups: int | None = None,
    kv_groups: int | None = None,
    *,
    variant: str | None = None,
    method: str = "mean",
    sites: Sequence[str] | None = None,
    dtype: str = "auto",
    max_shard_size: str = DEFAULT_SHARD,
) -> Plan:
    """Plans the conversion of `source` to `q_groups` query heads and `kv_groups` key/value heads.

    Args:
        source: the model.
        q_groups, kv_groups: Hq and Hkv, with kv_groups | q_groups <= H; or take both from `variant`.
        variant: a name of `sqa_convert.heads.VARIANTS`.
        method: a name of `sqa_convert.heads.METHODS`.
        sites: kinds of attention to convert, by default all the family has.
        dtype: "auto" keeps each tensor's own; else a name of `DTYPES`.
        max_shard_size: such as "300MB" or "5GB".

    Raises:
        RecipeError: the heads, sites, dtype or shard size are not possible.
        UnsupportedModelError: the architecture cannot be converted.
        CheckpointError: config and weights disagree.
    """
    family = family_of(source.config)
    dimensions = family.dimensions(source.config)
    q_groups, kv_groups = _head_counts(dimensions.heads, q_groups, kv_groups, variant)
    chosen = _site_kinds(family, source, sites)
    if dtype != "auto" and dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: choose auto, {', '.join(DTYPES)}")
    shard_bytes = parse_size(max_shard_size)

    converted, kept = (
        Partition.contiguous(dimensions.heads, q_groups, kv_groups),
        Partition.identity(dimensions.heads),
    )
    all_sites = family.sites(source.config)
    kinds = dict.fromkeys(site.kind for site in all_sites)
    partitions = {kind: converted if kind in chosen else kept for kind in kinds}
    names = _canonical_names(family, source)
    _check_shapes(family, source, names)

    counts = {kind: (len(p.clusters), len(p.kv_groups)) for kind, p in partitions.items()}
    tensors = _output_tensors(family, source, names, counts, DTYPES.get(dtype))
    config = family.result_config(source.config, counts)
    if dtype != "auto":
        config |= {"dtype": dtype}
    config["sqa"] = {
        "source": source.name,
        "revision": source.revision,
        "source_heads": dimensions.heads,
        "method": method,
        "partition": {kind: p.groups for kind, p in partitions.items()},
        "sqa_convert": __version__,
    }
    stored = source.index[names[family.consumed(all_sites[0])[0]]].dtype
    original = dict.fromkeys(kinds, (dimensions.heads, dimensions.heads))
    parameters = sum(math.prod(source.index[name].shape) for name in names.values())
    return Plan(
        family=family,
        dimensions=dimensions,
        method=method,
        sites=tuple(all_sites),
        partitions=partitions,
        shards=_shards(tensors, shard_bytes),
        config=config,
        source_names=names,
        before=_cost(family, source, original, parameters, stored),
        after=_cost(family, source, counts, sum(math.prod(t.shape) for t in tensors), DTYPES.get(dtype, stored)),
    )


def _head_counts(heads: int, q_groups: int | None, kv_groups: int | None, variant: str | None) -> tuple[int, int]:
    if variant is not None:
        if q_groups is not None or kv_groups is not None:
            raise RecipeError("--variant sets both head counts: leave out --q-groups and --kv-groups")
        return variant_heads(variant, heads)
    if q_groups is None or kv_groups is None:
        raise RecipeError("give --q-groups and --kv-groups, or --variant")
    check_head_counts(heads, q_groups, kv_groups)
    return q_groups, kv_groups


def _site_kinds(family: Family, source: Source, sites: Sequence[str] | None) -> tuple[str, ...]:
    present = tuple(dict.fromkeys(site.kind for site in family.sites(source.config)))
    for kind in sites or ():
        if kind not in present:
            raise RecipeError(f"--sites {kind}: this model has {', '.join(present)}")
    return tuple(sites) if sites else present


def parse_size(text: str) -> int:
    """Bytes of "300MB", "5GB" (powers of ten) or "5GiB". Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise RecipeError(f"--max-shard-size {text}: give a size such as 300MB or 5GB")
    return size


def _canonical_names(family: Family, source: Source) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in source.index:
        canonical = family.canonical(name)
        if canonical is None:
            continue
        if canonical in names:
            raise CheckpointError(f"{source.name}: {names[canonical]} and {name} are the same tensor")
        names[canonical] = name
    return names


def _check_shapes(family: Family, source: Source, names: Mapping[str, str]) -> None:
    for name, shape in family.required(source.config).items():
        if name not in names:
            raise CheckpointError(f"{source.name}: tensor {name} is missing, which config.json calls for")
        info = source.index[names[name]]
        if info.shape != shape:
            raise CheckpointError(
                f"{source.name}: {names[name]} has shape {list(info.shape)}, config.json calls for {list(shape)}"
            )
        if info.dtype not in FLOATING:
            raise CheckpointError(
                f"{source.name}: {names[name]} is {info.dtype}; weights must be {', '.join(FLOATING)}"
            )
    for name, info in source.index.items():
        if info.dtype not in ITEM_SIZE:
            raise CheckpointError(f"{source.name}: {name} is {info.dtype}, which is not supported")


def _output_tensors(
    family: Family, source: Source, names: Mapping[str, str], counts: Mapping[str, tuple[int, int]], dtype: str | None
) -> list[OutputTensor]:
    """In the source's order; a site's tensors stand where its first one stood."""
    site_of = {name: site for site in family.sites(source.config) for name in family.consumed(site)}
    tensors: list[OutputTensor] = []
    done: set[Site] = set()
    for name, source_name in names.items():
        info = source.index[source_name]
        site = site_of.get(name)
        if site is None:
            kept = dtype if dtype and info.dtype in FLOATING else info.dtype
            tensors.append(OutputTensor(name, info.shape, kept, name))
        elif site not in done:
            done.add(site)
            for new, written in family.written(site, source.config, *counts[site.kind]).items():
                like = source.index[names[written.like]].dtype
                tensors.append(OutputTensor(new, written.shape, dtype or like, site))
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


def _cost(family: Family, source: Source, counts: Mapping[str, tuple[int, int]], parameters: int, dtype: str) -> Cost:
    sizes = family.dimensions(source.config)
    tokens, d, width = sizes.context, sizes.head_dim, sizes.width
    sites = family.sites(source.config)
    cache = sum(2 * counts[s.kind][1] * d * ITEM_SIZE[dtype] for s in sites if s.kind != "encoder")
    scores = sum(4 * tokens * tokens * counts[s.kind][0] * d for s in sites)
    projections = sum(4 * tokens * width * d * sum(counts[s.kind]) for s in sites)
    return Cost(
        q_heads={kind: q for kind, (q, _) in counts.items()},
        kv_heads={kind: kv for kind, (_, kv) in counts.items()},
        parameters=parameters,
        kv_cache_bytes=cache,
        attention_flops=projections + scores,
        score_flops=scores,
    )
