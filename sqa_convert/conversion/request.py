"""What is asked of a conversion, and whether a model can give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..amounts import amount, parse_size
from ..errors import RecipeError
from ..families import Config, family_of
from ..heads import Partition, get_method, variant_heads
from ..text.documents import SELF, Columns
from ..text.formats import TEXT_COLUMN

AUTO = "auto"
"""the method that tries several on calibration text and takes the best; without text it is `BLIND_METHOD`"""

BLIND_METHOD = "svd"

REFINE_STEPS = 100

PARTITIONS = ("searched", "contiguous")

CASTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

DEFAULT_SHARD = "2GB"

TOKENS_PER_UNKNOWN = 20

LEAST_LENGTH = 8
"""tokens of a calibration sequence"""

_LEAST_TOKENS = 65_536  # of calibration text


@dataclass(frozen=True)
class Calibration:
    """What is asked of calibration: fitting converted heads to what the source's do on text."""

    text: str | None = None
    """As `sqa_convert.text.documents.documents` takes it; "self": the model's own. None: the training part of `data`
    where that is named; else GPT-2 samples its own, T5 reads the built-in corpus."""
    tokens: int | str | None = None
    """Tokens of text, also as "400k", a tenth of them held out; None: 20 for each unknown of a fit, at least 65,536."""
    refit: bool | None = None
    """Fit output projections by least squares; None: with "auto", "svd" and "procrustes"."""
    refine_steps: int | None = None
    """Steps of layer-wise training; None: 100 with "auto", "svd" and "procrustes", else 0."""
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

    @property
    def columns(self) -> Columns | None:
        """Of pairs. Raises RecipeError."""
        return Columns.named(self.source_column, self.target_column, self.prefix)


CALIBRATED = Calibration()


@dataclass(frozen=True)
class Fitting:
    """A `Calibration` with its defaults filled in."""

    text: str | None
    tokens: int
    refit: bool
    refine_steps: int
    text_column: str
    length: int | None
    prompts: str | None
    columns: Columns | None
    """of `text`, where it is pairs"""

    @property
    def text_named(self) -> str | None:
        """Text that somebody else wrote."""
        return None if self.text == SELF else self.text


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
        length = None if asked.length is None else amount(asked.length, "--calibration-length")
        if length is not None and length < LEAST_LENGTH:
            raise RecipeError(f"--calibration-length {asked.length}: give {LEAST_LENGTH} or more tokens")
        columns = None if asked.text in (None, SELF) else asked.columns
        return Fitting(asked.text, tokens, refit, steps, asked.text_column, length, asked.prompts, columns)

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
