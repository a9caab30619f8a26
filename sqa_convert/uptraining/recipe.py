"""Uptraining recipes: typed, with units, from YAML. Needs no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from ..errors import DataError, RecipeError, one_line, shown
from ..families import only_hidden_states
from ..flags_as_arguments import names_arguments
from ..text.documents import AUTO_TEXT, SELF, Columns
from .recipe_rules import Count, Number, Seed, Switch, Text, in_one_line, must_be, sentence

Schedule = Literal["cosine", "linear", "constant", "wsd"]

SCHEDULES = get_args(Schedule)


@in_one_line
@dataclass(frozen=True, config=ConfigDict(extra="forbid", validate_default=True))
class Recipe:
    """How a converted model is uptrained."""

    data: Text = AUTO_TEXT
    """Text to train on: "stdlib", a file, folder or glob, a data set on the hub (ID[:CONFIG]), or "self": what the
    source writes. "auto": "stdlib" where the source was made for such text, else "self". "given": from Python."""
    text_column: Text = "text"
    """Of `data`, where it is a table: the column that holds the text; "line" of plain text: each line is a document."""
    source_column: Text = ""
    """Of `data`: with target_column, train on pairs instead of plain text (T5 only)."""
    target_column: Text = ""
    """Of `data`: what the model shall answer to source_column."""
    prefix: Text = ""
    """Put before each source of a pair, such as "summarize: "."""
    tokens: Count = 400_000
    """Tokens of text to train on, repeated when the data hold fewer; a pair counts as sequence_length."""
    sequence_length: Annotated[Count, Field(ge=8)] = 256
    """Tokens in one sequence; sources and targets of pairs are cut to it."""
    batch_size: Annotated[Count, Field(ge=1)] = 8
    """Sequences in one optimizer step, over all devices."""
    micro_batch: Count = 0
    """Sequences a device computes at once; gradients are accumulated. 0: all of a step."""
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-3
    """AdamW's peak rate."""
    schedule: Schedule = "cosine"
    """"cosine", "linear": decay to zero; "constant"; "wsd": constant, then linear to zero in the last fifth."""
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from zero."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """AdamW's decoupled decay."""
    loss: Literal["kl", "ce", "mix", "hidden"] = "kl"
    """"kl": divergence from the source's predictions (arXiv 2407.14679); "ce": cross-entropy on the text; "mix";
    "hidden": of models without a language model head, squared error to the source's last hidden state."""
    ce_weight: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Share of the cross-entropy in "mix"."""
    train: Literal["all", "attention"] = "all"
    """"all" weights, or only those of "attention"."""
    lora_rank: Count = 0
    """Rank of LoRA on the attention's projections (needs the extra `lora`); 0: whole weights."""
    separate_documents: Switch = True
    """Whether documents packed into one sequence are kept from attending to each other, where the model allows it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; weights are trained in float32. "auto": bfloat16 on GPUs that have it."""
    compile: Switch = False
    """Whether the model is compiled, by torch.compile."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    fsdp: Switch = False
    """Shard weights, gradients and optimizer over the processes of a torchrun."""
    evaluations: Annotated[Count, Field(ge=1)] = 8
    """Measurements on held-out text during the run; a checkpoint to resume from goes with each."""
    held_out_tokens: Annotated[Count, Field(ge=64)] = 16_384
    """Tokens of held-out text that are measured on; of pairs, 256 of them."""
    patience: Count = 0
    """Stop after so many measurements without a better held-out KL, and keep the best; 0: never."""
    report_to: Text = "none"
    """Trackers, comma-separated: tensorboard, wandb, trackio."""
    method: Text = ""
    """How sqa-convert merges heads, where --method is not given; sqa-uptrain ignores it."""
    control: Switch = False
    """Also train the source on the same tokens, by cross-entropy: what the text alone teaches."""
    seed: Seed = 0
    """Of the order of the data and of span corruption."""

    @field_validator("batch_size")
    @classmethod
    def _within_tokens(cls, batch_size: int, others: ValidationInfo) -> int:
        step = batch_size * others.data.get("sequence_length", 0)
        tokens = others.data.get("tokens", step)
        if tokens < step:
            raise sentence(f"tokens: {tokens} must be at least sequence_length × batch_size")
        return batch_size

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, micro_batch: int, others: ValidationInfo) -> int:
        if micro_batch and others.data.get("batch_size", micro_batch) % micro_batch:
            raise must_be("0, or a divisor of batch_size")
        return micro_batch

    @field_validator("loss")
    @classmethod
    def _of_plain_text(cls, loss: str, others: ValidationInfo) -> str:
        if loss == "hidden" and others.data.get("data") == SELF:
            raise sentence(f"data: {SELF!r} is for models that write; with loss: hidden name text, as captions.txt")
        if loss == "hidden" and others.data.get("source_column"):
            raise sentence("source_column: what is answered is not trained on with loss: hidden; name a text_column")
        return loss

    @field_validator("control")
    @classmethod
    def _of_predictions(cls, control: bool, others: ValidationInfo) -> bool:
        if control and others.data.get("loss") == "hidden":
            raise sentence("control: a source without a language model head learns nothing from text: leave it out")
        return control

    @field_validator("target_column")
    @classmethod
    def _both_columns(cls, target: str, others: ValidationInfo) -> str:
        if bool(target) != bool(others.data.get("source_column", target)):
            raise must_be("given with source_column")
        return target

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    def stages(self, measured: bool) -> list[str]:
        """Names of a run's stages, in their order."""
        trained = ["uptrain", "control"] if self.control else ["uptrain"]
        rows = [f"evaluate {row}" for row in ("source", "converted", "uptrained", *trained[1:])]
        own = ["sample text"] if self.data == SELF else []
        written = [] if self.loss == "hidden" else ["write samples"]
        return [*own, *trained, *([*rows, *written] if measured else []), "draw report"]

    @property
    def ce(self) -> float:
        """Weight of the cross-entropy in the loss, 0 … 1; the rest is what the source says."""
        return {"ce": 1.0, "mix": self.ce_weight}.get(self.loss, 0.0)

    @property
    def judged_by(self) -> str:
        """Which held-out measurement says how good a model is: "kl" to the source, or "loss" where that is trained;
        "error" of the hidden state where there are no predictions."""
        return {"ce": "loss", "hidden": "error"}.get(self.loss, "kl")

    @property
    def columns(self) -> Columns | None:
        """Of `data`, where it is pairs."""
        return Columns.named(self.source_column, self.target_column, self.prefix)

    def check_trains(self, architecture: str, predicts: bool) -> None:
        """Raises RecipeError where the loss is not one of what a model puts out.

        Args:
            architecture: the class of the unconverted model.
            predicts: whether it has a language model head.
        """
        if predicts and self.loss == "hidden":
            raise RecipeError(
                f"loss: hidden (recipe encoder) is for models without a language model head; a {architecture} predicts "
                "tokens: kl, ce or mix"
            )
        if predicts or (self.loss == "hidden" and only_hidden_states(architecture)):
            return
        if only_hidden_states(architecture):
            raise RecipeError(
                f"a {architecture} has no language model head to train: recipe encoder trains it towards its source's "
                "hidden states"
            )
        raise RecipeError(f"a {architecture} has no language model head to train, and is no encoder of text alone")

    def check_fits(self, positions: int | None) -> None:
        """Raises DataError where a model cannot be trained so, whatever its weights.

        Args:
            positions: of a decoder-only model; None for one that has no end of them.
        """
        if positions is None:
            return
        if self.columns is not None:
            raise DataError("source_column and target_column are for encoder-decoder models; this one is decoder-only")
        if self.sequence_length > positions:
            raise DataError(f"sequence_length {self.sequence_length} is more than the model's {positions} positions")


def recipe_folder() -> Path:
    """Where the packaged recipes are: in the package when installed, beside it in a checkout."""
    installed = Path(__file__).parent.parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


@names_arguments
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
    values = _parsed(content, path)
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path} must hold a table of settings")
    given = {str(k): v for k, v in values.items()} | {k: v for k, v in overrides.items() if v is not None}
    try:
        return Recipe(**given)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def override(recipe: str | Path | Recipe, **changes: Any) -> Recipe:
    """A recipe, or the one of a name or path, with the settings that are not None. Raises RecipeError."""
    if isinstance(recipe, str | Path):
        return load_recipe(str(recipe), **changes)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: {shown(recipe)} is none: give a name, the path of a YAML file, or a Recipe")
    return dataclasses.replace(recipe, **{key: value for key, value in changes.items() if value is not None})


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
