"""Uptraining recipes: typed, with units, from YAML. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import operator
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..amounts import amount
from ..errors import DataError, RecipeError, one_line, shown
from .other_trainers import HINTS

LOSSES = ("kl", "ce", "mix")

SCHEDULES = ("cosine", "linear", "constant", "wsd")

TRAINED = ("all", "attention")

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a converted model is uptrained."""

    data: str = "stdlib"
    """Text to train on: "stdlib", a file, folder or glob, or a data set on the hub (ID[:CONFIG])."""
    text_column: str = "text"
    """Of `data`, where it is a table: the column that holds the text."""
    source_column: str = ""
    """Of `data`: with target_column, train on pairs instead of plain text (T5 only)."""
    target_column: str = ""
    """Of `data`: what the model shall answer to source_column."""
    prefix: str = ""
    """Put before each source of a pair, such as "summarize: "."""
    tokens: int = 400_000
    """Tokens of text to train on, repeated when the data hold fewer; a pair counts as sequence_length."""
    sequence_length: int = 256
    """Tokens in one sequence; sources and targets of pairs are cut to it."""
    batch_size: int = 8
    """Sequences in one optimizer step, over all devices."""
    micro_batch: int = 0
    """Sequences a device computes at once; gradients are accumulated. 0: all of a step."""
    learning_rate: float = 1e-3
    """AdamW's peak rate."""
    schedule: str = "cosine"
    """"cosine", "linear": decay to zero; "constant"; "wsd": constant, then linear to zero in the last fifth."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    loss: str = "kl"
    """"kl": divergence from the source's predictions (arXiv 2407.14679); "ce": cross-entropy on the text; "mix"."""
    ce_weight: float = 0.5
    """Share of the cross-entropy in "mix"."""
    train: str = "all"
    """"all" weights, or only those of "attention"."""
    lora_rank: int = 0
    """Rank of LoRA on the attention's projections (needs the extra `lora`); 0: whole weights."""
    separate_documents: bool = True
    """Whether documents packed into one sequence are kept from attending to each other, where the model allows it."""
    precision: str = "auto"
    """Of the arithmetic; weights are trained in float32. "auto": bfloat16 on GPUs that have it."""
    compile: bool = False
    """Whether the model is compiled, by torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the processes of a torchrun."""
    evaluations: int = 8
    """Measurements on held-out text during the run; a checkpoint to resume from goes with each."""
    held_out_tokens: int = 16_384
    """Tokens of held-out text that are measured on; of pairs, 256 of them."""
    patience: int = 0
    """Stop after so many measurements without a better held-out KL, and keep the best; 0: never."""
    report_to: str = "none"
    """Trackers, comma-separated: tensorboard, wandb, trackio."""
    method: str = ""
    """How sqa-convert merges heads, where --method is not given; sqa-uptrain ignores it."""
    control: bool = False
    """Also train the source on the same tokens, by cross-entropy: what the text alone teaches."""
    seed: int = 0
    """Of the order of the data and of span corruption."""

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            try:
                value = _as(type(field.default), getattr(self, field.name))
            except ValueError as error:
                faults.append(f"{field.name}: {error}")
                value = field.default  # the others are looked at too
            object.__setattr__(self, field.name, value)
        faults += [
            f"{name}: {getattr(self, name)!r} must be {rule}"
            for name, rule, holds in (
                ("tokens", "at least sequence_length × batch_size", self.tokens >= self.tokens_per_step),
                ("sequence_length", "at least 8", self.sequence_length >= 8),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("micro_batch", "0, or a divisor of batch_size", self._divides(self.micro_batch)),
                ("learning_rate", "above 0", 0 < self.learning_rate < float("inf")),
                ("schedule", " or ".join(SCHEDULES), self.schedule in SCHEDULES),
                ("warmup", "between 0 and 1", 0 <= self.warmup < 1),
                ("weight_decay", "at least 0", 0 <= self.weight_decay < float("inf")),
                ("loss", " or ".join(LOSSES), self.loss in LOSSES),
                ("ce_weight", "between 0 and 1", 0 <= self.ce_weight <= 1),
                ("train", " or ".join(TRAINED), self.train in TRAINED),
                ("lora_rank", "at least 0", self.lora_rank >= 0),
                ("precision", " or ".join(PRECISIONS), self.precision in PRECISIONS),
                ("evaluations", "at least 1", self.evaluations >= 1),
                ("held_out_tokens", "at least 64", self.held_out_tokens >= 64),
                ("patience", "at least 0", self.patience >= 0),
                ("seed", "between 0 and 2**32 - 1", 0 <= self.seed < 2**32),
                ("target_column", "given with source_column", bool(self.source_column) == bool(self.target_column)),
            )
            if not holds
        ]
        if faults:
            raise RecipeError("; ".join(faults))

    def _divides(self, micro_batch: int) -> bool:
        return micro_batch == 0 or (0 < micro_batch <= self.batch_size and self.batch_size % micro_batch == 0)

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def ce(self) -> float:
        """Weight of the cross-entropy in the loss, 0 … 1; the rest is the divergence's."""
        return {"kl": 0.0, "ce": 1.0, "mix": self.ce_weight}[self.loss]

    @property
    def judged_by(self) -> str:
        """Which held-out measurement says how good a model is: "kl" to the source, or "loss" where that is trained."""
        return "loss" if self.ce == 1 else "kl"

    @property
    def pairs(self) -> bool:
        return bool(self.source_column)

    def check_fits(self, positions: int | None) -> None:
        """Raises DataError where a model cannot be trained so, whatever its weights.

        Args:
            positions: of a decoder-only model; None for an encoder-decoder, which has no end of them.
        """
        if positions is None:
            return
        if self.pairs:
            raise DataError("source_column and target_column are for encoder-decoder models; this one is decoder-only")
        if self.sequence_length > positions:
            raise DataError(f"sequence_length {self.sequence_length} is more than the model's {positions} positions")


def recipe_folder() -> Path:
    """Where the packaged recipes are: in the package when installed, beside it in a checkout."""
    installed = Path(__file__).parent.parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name: str, **overrides: Any) -> Recipe:
    """A packaged recipe by name, or a YAML file by path.

    Args:
        name: of a packaged recipe (`sqa-uptrain --list-recipes`), or a path.
        overrides: settings of `Recipe` that win over the file's where they are not None.

    Raises:
        RecipeError: no such recipe, or it has faults; all of them are named.
    """
    packaged = recipe_folder() / f"{name}.yaml"
    path = packaged
    try:
        if not packaged.is_file():
            path = Path(name).expanduser()
        content = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        if os.path.lexists(path):
            raise RecipeError(f"{shown(name)} cannot be read: {one_line(error)}") from error
        raise RecipeError(f"{shown(name)}: no such file or recipe ({', '.join(recipe_names())})") from error
    settings = _parsed(content, path)
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{path} must hold a table of settings")
    return _recipe({**settings, **{k: v for k, v in overrides.items() if v is not None}}, str(path))


def override(recipe: str | Path | Recipe, **settings: Any) -> Recipe:
    """A recipe, or the one of a name or path, with the settings that are not None. Raises RecipeError."""
    if isinstance(recipe, str | Path):
        return load_recipe(str(recipe), **settings)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: {shown(recipe)} is none: give a name, the path of a YAML file, or a Recipe")
    return dataclasses.replace(recipe, **{key: value for key, value in settings.items() if value is not None})


def dump_recipe(recipe: Recipe) -> str:
    """As YAML, every setting named; `load_recipe` reads it back."""
    import yaml

    return str(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))


def summary(name: str) -> str:
    """The first line of a packaged recipe: what it is for."""
    return (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def _parsed(content: bytes, path: Path) -> Any:
    """YAML's content. Raises RecipeError, also where a key stands twice: YAML takes the last and says nothing."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
                raise RecipeError(f"{path}: given twice: {', '.join(twice)}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(content, Loader)
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise RecipeError(f"{path} is no YAML: {one_line(error)}") from error


_KINDS = {
    int: "a whole number, such as 512, 400k or 5M",
    float: "a number, such as 0.1 or 2e-4",
    bool: "true or false",
    str: "text",
}


def _as(kind: type, value: Any) -> Any:
    """A value as one of a setting's kind; numbers may be text, such as "5M" or "2e-4". Raises ValueError."""
    if type(value) is kind:
        return value
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if kind is int and not isinstance(value, bool):
            return amount(str(value), "") if isinstance(value, str | float) else operator.index(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
    raise ValueError(f"{value!r} must be {_KINDS[kind]}")


def _hint(key: str, known: Collection[str]) -> str:
    """What an unknown setting may have been meant for: by what other trainers call it, or by its letters."""
    hint = HINTS.get(key.lower().replace("-", "_").replace(" ", "_"))
    if hint is not None:
        return f"; here it is {hint}"
    close = difflib.get_close_matches(key, known, 1)
    return f", did you mean {close[0]}?" if close else ""


def _recipe(content: Mapping[str, Any], where: str) -> Recipe:
    known = [field.name for field in dataclasses.fields(Recipe)]
    faults = [f"{key}: no such setting{_hint(str(key), known)}" for key in content if key not in known]
    recipe = None
    try:
        recipe = Recipe(**{key: value for key, value in content.items() if key in known})
    except RecipeError as error:
        faults.append(str(error))
    if faults or recipe is None:
        raise RecipeError(f"{where}: " + "; ".join(faults))
    return recipe
