"""The plan: every output tensor, its shape, dtype, shard and origin, made from headers before any weight is read.

Imports neither torch nor transformers, so that `--dry-run` answers at once, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from . import __version__
from .amounts import amount, parse_size
from .errors import CheckpointError, RecipeError
from .families import Config, Dimensions, Family, Site, family_of
from .heads import Partition, get_method, variant_heads
from .sources import Source, TensorInfo
from .storage import DTYPES, FLOATING
from .stored import Stored, stored_tensors
from .text_formats import TEXT_COLUMN

AUTO = "auto"
"""the method that tries several on calibration text and takes the best; without text it is `BLIND_METHOD`"""
BLIND_METHOD = "svd"
REFINE_STEPS = 100
PARTITIONS = ("searched", "contiguous")
CASTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DEFAULT_SHARD = "2GB"
TOKENS_PER_UNKNOWN = 20
_LEAST_TOKENS = 65_536  # of calibration text
_TEXT_PER_TARGET = 5  # tokens of span-corrupted text for each that a decoder predicts


@dataclass(frozen=True)
class Calibration:
    """What is asked of calibration: fitting converted heads to what the source's do on text."""

    text: str | None = None
    """As `sqa_convert.data.documents` takes it; None: GPT-2 samples its own, T5 reads the built-in corpus."""
    tokens: int | str | None = None
    """Tokens of text, also as "400k", a tenth of them held out; None: 20 for each unknown of a fit, at least 65,536."""
    refit: bool | None = None
    """Fit output projections by least squares; None: with "auto", "svd" and "procrustes"."""
    refine_steps: int | None = None
    """Steps of layer-wise training; None: 100 with "auto", "svd" and "procrustes", else 0."""
    text_column: str = TEXT_COLUMN
    """Of `text`, where it is a table: the column that holds the text."""


CALIBRATED = Calibration()


@dataclass(frozen=True)
class Fitting:
    """A `Calibration` with its defaults filled in."""

    text: str | None
    tokens: int
    refit: bool
    refine_steps: int
    text_column: str


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion."""

    q_groups: int | None = None
    """query heads to keep, Hq <= H"""
    kv_groups: int | None = None
    """key/value heads to keep, a divisor of `q_groups`"""
    variant: str | None = None
    """instead of the two numbers, a name of `sqa_convert.VARIANTS`"""
    method: str = AUTO
    """"auto", or a name of `sqa_convert.METHODS`"""
    calibration: Calibration | None = CALIBRATED
    """None: from the weights alone"""
    partition: str | None = None
    """which heads go together: "searched" or "contiguous"; None: as suits the method"""
    sites: Sequence[str] | None = None
    """kinds of attention to convert, by default all the model has"""
    dtype: str = "auto"
    """"auto" keeps each tensor's own; else a name of `CASTS`"""
    max_shard_size: str = DEFAULT_SHARD
    """such as "300MB", at least 1MB"""

    def partitions(self, config: Config) -> dict[str, Partition]:
        """The partition of every kind of attention the model has; needs nothing but its config.json.

        Raises:
            RecipeError: the heads, method, sites, dtype or shard size are not possible.
            UnsupportedModelError: the architecture cannot be converted.
        """
        family = family_of(config)
        heads = family.dimensions(config).heads
        self.fitting(1)
        if self.partition not in (None, *PARTITIONS):
            raise RecipeError(f"--partition {self.partition}: choose {' or '.join(PARTITIONS)}")
        parse_size(self.max_shard_size)
        if self.dtype != "auto" and self.dtype not in CASTS:
            raise RecipeError(f"--dtype {self.dtype}: choose auto, {', '.join(CASTS)}")
        kinds = tuple(dict.fromkeys(site.kind for site in family.sites(config)))
        for kind in self.sites or ():
            if kind not in kinds:
                raise RecipeError(f"--sites {kind}: this model has {', '.join(kinds)}")
        converted = Partition.contiguous(heads, *self.head_counts(heads))
        return {kind: converted if kind in (self.sites or kinds) else Partition.identity(heads) for kind in kinds}

    @property
    def resolved_method(self) -> str:
        return BLIND_METHOD if self.method == AUTO and self.calibration is None else self.method

    @property
    def searched(self) -> bool:
        """Whether the partition is searched for: where not told, with the methods that have something to search by."""
        if self.partition is not None:
            return self.partition == "searched"
        return self.method == AUTO or get_method(self.method).needs_statistics

    def fitting(self, unknowns: int) -> Fitting | None:
        """What calibration will do, None for a conversion from the weights alone. Raises RecipeError.

        Args:
            unknowns: of one output projection's fit, for each output: Hq d, times the text a position of it needs.
        """
        uses = self.method == AUTO or get_method(self.method).needs_statistics
        asked = self.calibration
        if asked is None:
            return None
        tokens = None if asked.tokens is None else amount(asked.tokens, "--calibration-tokens")
        if tokens == 0:
            raise RecipeError(f"--calibration-tokens {asked.tokens}: give 1 or more, or --no-calibration")
        if asked.refine_steps is not None and asked.refine_steps < 0:
            raise RecipeError(f"--refine-steps {asked.refine_steps}: give 0 or more")
        refit = uses if asked.refit is None else asked.refit
        steps = (REFINE_STEPS if uses else 0) if asked.refine_steps is None else asked.refine_steps
        if not (uses or refit or steps):
            if asked.text is not None or tokens is not None:
                raise RecipeError(f"--calibration: {self.method} fits nothing; add --refit or --refine-steps")
            return None
        tokens = tokens or max(_LEAST_TOKENS, TOKENS_PER_UNKNOWN * unknowns)
        return Fitting(asked.text, tokens, refit, steps, asked.text_column)

    def head_counts(self, heads: int) -> tuple[int, int]:
        """Hq and Hkv for a source of `heads` heads. Raises RecipeError."""
        if self.variant is not None:
            if self.q_groups is not None or self.kv_groups is not None:
                raise RecipeError("--variant sets both head counts: leave out --q-groups and --kv-groups")
            return variant_heads(self.variant, heads)
        if self.q_groups is None or self.kv_groups is None:
            missing = [f for f, n in (("--q-groups", self.q_groups), ("--kv-groups", self.kv_groups)) if n is None]
            raise RecipeError(f"give {' and '.join(missing)} too, or --variant alone")
        return self.q_groups, self.kv_groups


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
    searched: bool
    """whether the heads of a group are searched for, or neighbours"""
    partition_given: bool
    """whether that was asked for; else `auto` may try both"""
    calibration: Fitting | None
    """None: from the weights alone"""
    sites: tuple[Site, ...]
    """all of the model; `partitions` says which of them keep their heads"""
    partitions: dict[str, Partition]
    """by site kind"""
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
    def unknowns(self) -> int:
        """Of a fit of the output projection, an output: Hq d of the largest converted site."""
        return _unknowns(self.partitions, self.dimensions)

    @property
    def has_language_model_head(self) -> bool:
        return self.family.has_language_model_head(self.source_config)

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """Of the result, shard by shard."""
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
    partitions = request.partitions(source.config)
    family = family_of(source.config)
    dimensions = family.dimensions(source.config)
    stored = stored_tensors(family, source)

    cast = CASTS.get(request.dtype)
    counts = {kind: (len(p.clusters), len(p.kv_groups)) for kind, p in partitions.items()}
    tensors = _output_tensors(family, source, stored, counts, cast)
    config = family.result_config(source.config, counts)
    if cast is not None:
        config |= {"dtype": request.dtype}
    config["sqa"] = {
        "source": source.name,
        "revision": source.revision,
        "source_heads": dimensions.heads,
        "method": request.resolved_method,
        "sqa_convert": __version__,
    }
    sites = tuple(family.sites(source.config))
    unknowns = _unknowns(partitions, dimensions)
    dtype = stored.infos[family.consumed(sites[0])[0]].dtype
    before = {name: info.shape for name, info in stored.infos.items()}
    after = {tensor.name: tensor.shape for tensor in tensors}
    original = dict.fromkeys(counts, (dimensions.heads, dimensions.heads))
    return Plan(
        family=family,
        dimensions=dimensions,
        method=request.resolved_method,
        searched=request.searched,
        partition_given=request.partition is not None,
        calibration=None
        if all(p.is_identity for p in partitions.values())
        else request.fitting(unknowns * (_TEXT_PER_TARGET if "cross" in partitions else 1)),
        sites=sites,
        partitions=partitions,
        shards=_shards(tensors, parse_size(request.max_shard_size)),
        source_config=source.config,
        config=config,
        source_names=stored.names,
        zeros=stored.zeros,
        copies=stored.copies,
        notes=(*source.notes, *stored.notes),
        before=_cost(dimensions, sites, original, _parameters(before, stored.others), dtype),
        after=_cost(dimensions, sites, counts, _parameters(after, stored.others), cast or dtype),
    )


def _unknowns(partitions: Mapping[str, Partition], dimensions: Dimensions) -> int:
    return max((len(p.clusters) for p in partitions.values() if not p.is_identity), default=0) * dimensions.head_dim


def _output_tensors(
    family: Family, source: Source, stored: Stored, counts: Mapping[str, tuple[int, int]], dtype: str | None
) -> list[OutputTensor]:
    """In the source's order; a site's tensors stand where its first one stood."""
    site_of = {name: site for site in family.sites(source.config) for name in family.consumed(site)}
    tensors: list[OutputTensor] = []
    done: set[Site] = set()
    for name, info in stored.infos.items():
        site = site_of.get(name)
        if site is None:
            kept = dtype if dtype and info.dtype in FLOATING else info.dtype
            tensors.append(OutputTensor(name, info.shape, kept, name))
        elif site not in done:
            done.add(site)
            for new, written in family.written(site, source.config, *counts[site.kind]).items():
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


def _parameters(shapes: Mapping[str, tuple[int, ...]], others: frozenset[str]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in others)


def _cost(
    sizes: Dimensions, sites: Sequence[Site], counts: Mapping[str, tuple[int, int]], parameters: int, dtype: str
) -> Cost:
    tokens, d = sizes.context, sizes.head_dim
    scores = sum(4 * tokens * tokens * counts[site.kind][0] * d for site in sites)
    projections = sum(4 * tokens * sizes.width * d * sum(counts[site.kind]) for site in sites)
    return Cost(
        q_heads={kind: q for kind, (q, _) in counts.items()},
        kv_heads={kind: kv for kind, (_, kv) in counts.items()},
        parameters=parameters,
        kv_cache_bytes=sum(2 * counts[s.kind][1] * d * DTYPES[dtype][1] for s in sites if s.kind != "encoder"),
        attention_flops=projections + scores,
        score_flops=scores,
    )
