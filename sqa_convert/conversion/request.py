"""What is asked of a conversion, and whether a model can give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..families import Config, Site, family_of
from ..heads import AUTO, Convert, Method, Partition, get_method
from ..parse_amounts import amount, check_steps, parse_size
from ..text.documents import Columns, is_own
from ..text.formats import TEXT_COLUMN
from .asked_partitions import HeadCounts, given_partitions, planned_partitions, site_kinds
from .fitting import Fitting, effort_of
from .heads_by_layer import ADAPTIVE, DEFAULT_ALLOCATION, UNIFORM, counts_by_site, counts_of

BLIND_METHOD = "svd"
"""what "auto" is without calibration text"""

CASTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

DEFAULT_SHARD = "2GB"

TOKENS_PER_UNKNOWN = 20

LEAST_LENGTH = 8
"""tokens of a calibration sequence"""


@dataclass(frozen=True)
class Calibration:
    """What is asked of calibration: fitting converted heads to what the source's do on text."""

    text: Any = None
    """By name or as an object, as `sqa_convert.text.documents.documents` takes it; "self": the model's own. None: the
    training part of `data` where that is given; else GPT-2 samples its own, T5 reads the built-in corpus."""
    tokens: int | str | None = None
    """Tokens of text, also as "400k", a tenth of them held out; None: 20 for each unknown of a fit, at least 65,536; on
    a CPU fewer for a large model."""
    refit: bool | None = None
    """Fit output projections by least squares; None: with "auto", "svd" and "procrustes"."""
    refine_steps: int | None = None
    """Steps of layer-wise training; None: 100 with "auto", "svd" and "procrustes", else 0; on a CPU fewer for a large
    model."""
    text_column: str = TEXT_COLUMN
    """Of `text`, where it is a table: the column that holds the text."""
    length: int | str | None = None
    """Tokens of the longest sequence; None: the model's context, at most 1,024."""
    prompts: str | None = None
    """A file of beginnings, one a line, that a decoder-only model's own texts go on from."""
    source_column: str = ""
    """Of `text`: with target_column, pairs that an encoder-decoder reads and answers."""
    target_column: str = ""
    """Of `text`: what is answered to source_column."""
    prefix: str = ""
    """Put before each source of a pair, such as "summarize: "."""
    polish_steps: int | None = None
    """Steps of end-to-end training; None: 150 with "auto", "svd" and "procrustes", else 0; on a CPU fewer for a large
    model."""
    effort: str = "default"
    """What the defaults above are of; "light" is a third of the time or less, "best" several times as long."""
    memory: str | None = None
    """Bytes that calibration on a CPU may hold, such as "8GB"; None: what is free, within a container's limit."""

    @property
    def columns(self) -> Columns | None:
        """Of pairs. Raises RecipeError."""
        return Columns.named(self.source_column, self.target_column, self.prefix)


CALIBRATED = Calibration()


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion."""

    q_groups: int | None = None
    """query heads to keep in each layer, Hq <= H; the mean of layers that they are shared out among"""
    kv_groups: int | None = None
    """key/value heads to keep, likewise; a divisor of `q_groups`"""
    variant: str | None = None
    """instead of the two numbers, a name of `sqa_convert.VARIANTS`"""
    method: str | Method | Convert = AUTO
    """"auto", a name of `sqa_convert.METHODS`, a `Method`, or a function as its `convert`"""
    calibration: Calibration | None = CALIBRATED
    """None: from the weights alone"""
    partition: str | Partition | Mapping[str, Partition] | None = None
    """which heads go together: "searched", "contiguous", a `Partition` for all sites, or one for each of some sites,
    by names such as "decoder" and "decoder.3", which may keep different numbers; None: as suits the method"""
    allocation: str | Mapping[str, Sequence[tuple[int, int]]] = DEFAULT_ALLOCATION
    """how heads are shared out among layers: "uniform", the same for each; "adaptive", as many in total, more where the
    predictions need them; "auto", adaptive where heads are fitted to text and predict, by the method's name, with no
    variant or partition given; or the counts of every layer: "4/2,8/4", of several kinds
    "encoder:8/4,8/4,decoder:4/2,6/3", or a table of (Hq, Hkv) by kind"""
    sites: str | Sequence[str] | None = None
    """kinds of attention to convert, also with commas; by default all the model has"""
    dtype: str = "auto"
    """"auto" keeps each tensor's own; else a name of `CASTS`"""
    max_shard_size: str = DEFAULT_SHARD
    """such as "300MB", at least 1MB"""

    def partitions(self, config: Config) -> dict[Site, Partition]:
        """What is given or neighbouring heads together, for each attention site of the model; needs nothing but its
        config.json.

        Raises:
            RecipeError: the heads, method, sites, dtype or shard size are not possible.
            UnsupportedModelError: the architecture cannot be converted.
        """
        family = family_of(config)
        self.fitting(1)
        parse_size(self.max_shard_size)
        if self.dtype != "auto" and self.dtype not in CASTS:
            raise RecipeError(f"--dtype {self.dtype}: choose auto, {', '.join(CASTS)}")
        counts, kinds = HeadCounts(self.q_groups, self.kv_groups, self.variant), self._kinds(config)
        by_layer, given = counts_of(self.allocation), self.given_partitions(config)
        if given and self.allocation not in (DEFAULT_ALLOCATION, UNIFORM):
            raise RecipeError("--allocation and a --partition that is given both say what each layer keeps: give one")
        if self.allocation == ADAPTIVE and self.fitting(1) is None:
            raise RecipeError(
                f"--allocation {ADAPTIVE} needs text that heads are fitted on: leave out --no-calibration, and with "
                "--method mean, first or select add --refit"
            )
        if self.allocation == ADAPTIVE and not family.has_language_model_head(config):
            raise RecipeError(
                f"--allocation {ADAPTIVE} goes by what a model predicts, and a {family.source_architecture(config)} "
                "has no language model head: give counts of every layer, or leave it out"
            )
        if by_layer is None:
            return planned_partitions(family, config, kinds, counts, given)
        heads, kept = family.dimensions(config).heads, counts_by_site(by_layer, family, config, kinds, counts)
        return {site: Partition.contiguous(heads, *kept.get(site, (heads, heads))) for site in family.sites(config)}

    def shares_out(self, config: Config) -> bool:
        """Whether heads are to be shared out among layers by what they cost. Raises RecipeError."""
        if self.allocation != DEFAULT_ALLOCATION:
            return self.allocation == ADAPTIVE
        family, method = family_of(config), self.chosen_method
        fits = isinstance(self.method, str) and (method is None or method.needs_statistics)
        if not fits or self.variant is not None or self.fitting(1) is None or self.given_partitions(config):
            return False
        kinds = [site.kind for site in family.sites(config) if site.kind in self._kinds(config)]
        return family.has_language_model_head(config) and len(set(kinds)) < len(kinds)

    def given_partitions(self, config: Config) -> dict[Site, Partition]:
        """The partitions that are given for single sites. Raises RecipeError."""
        return given_partitions(self.partition, family_of(config), config, self._kinds(config))

    def _kinds(self, config: Config) -> tuple[str, ...]:
        """Of attention, to be converted. Raises RecipeError."""
        known = site_kinds(family_of(config), config)
        given = self.sites.split(",") if isinstance(self.sites, str) else self.sites or ()
        asked = [kind for name in given if (kind := str(name).strip())]
        for kind in asked:
            if kind not in known:
                raise RecipeError(f"--sites {kind}: this model has {', '.join(known)}")
        return tuple(kind for kind in known if kind in asked) if asked else known

    @property
    def chosen_method(self) -> Method | None:
        """None where several are tried. Raises RecipeError."""
        if isinstance(self.method, str) and self.method == AUTO:
            return get_method(BLIND_METHOD) if self.calibration is None else None
        return get_method(self.method)

    @property
    def searched(self) -> bool:
        """Whether a partition that is not given is searched for: where not told, with methods that can search."""
        if isinstance(self.partition, str):
            return self.partition == "searched"
        return self.chosen_method is None or self.chosen_method.needs_statistics

    def fitting(self, unknowns: int) -> Fitting | None:
        """What calibration will do, None for a conversion from the weights alone. Raises RecipeError.

        Args:
            unknowns: of one output projection's fit, for each output: Hq d, times the text a position of it needs.
        """
        method = self.chosen_method
        uses = method is None or method.needs_statistics
        asked = self.calibration
        if asked is None:
            return None
        tokens = None if asked.tokens is None else amount(asked.tokens, "--calibration-tokens")
        if tokens == 0:
            raise RecipeError(f"--calibration-tokens {asked.tokens}: give 1 or more, or --no-calibration")
        check_steps(asked.refine_steps, "--refine-steps")
        check_steps(asked.polish_steps, "--polish-steps")
        refit = uses if asked.refit is None else asked.refit
        effort = effort_of(asked.effort)
        steps = (effort.refine_steps if uses else 0) if asked.refine_steps is None else asked.refine_steps
        polish = (effort.polish_steps if uses else 0) if asked.polish_steps is None else asked.polish_steps
        if not (uses or refit or steps or polish):
            if method is not None and (asked.text is not None or tokens is not None):
                raise RecipeError(
                    f"--calibration: {method.name} fits nothing; add --refit, --refine-steps or --polish-steps"
                )
            return None
        needed = TOKENS_PER_UNKNOWN * unknowns
        given = {"tokens": tokens, "refine_steps": asked.refine_steps, "polish_steps": asked.polish_steps}
        tokens = tokens or max(effort.tokens, needed)
        length = None if asked.length is None else amount(asked.length, "--calibration-length")
        if length is not None and length < LEAST_LENGTH:
            raise RecipeError(f"--calibration-length {asked.length}: give {LEAST_LENGTH} or more tokens")
        columns = None if asked.text is None or is_own(asked.text) else asked.columns
        how = asked.text_column, length, asked.prompts, columns, polish, effort
        named = frozenset(name for name, value in given.items() if value is not None)
        memory = None if asked.memory is None else parse_size(asked.memory, "--memory")
        return Fitting(asked.text, tokens, refit, steps, *how, named, needed, memory)
