"""Uptraining recipes: typed, with units, from YAML. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecipeError

LOSSES = ("kl", "ce")


@dataclass(frozen=True)
class Recipe:
    """How a converted model is uptrained."""

    data: str = "stdlib"
    """Text to train on: "stdlib", a file, folder or glob, or a data set on the hub (ID[:CONFIG])."""
    tokens: int = 400_000
    """Tokens of text to train on, repeated when the data hold fewer."""
    sequence_length: int = 256
    """Tokens in one sequence."""
    batch_size: int = 8
    """Sequences in one optimizer step."""
    learning_rate: float = 1e-3
    """AdamW's peak rate; cosine decay to zero."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    loss: str = "kl"
    """"kl": divergence from the source's predictions (arXiv 2407.14679); "ce": cross-entropy on the text."""
    seed: int = 0
    """Of data order and span corruption."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: {getattr(self, name)!r} must be {rule}"
            for name, rule, holds in (
                ("tokens", "at least sequence_length × batch_size", self.tokens >= self.tokens_per_step),
                ("sequence_length", "at least 8", self.sequence_length >= 8),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("learning_rate", "above 0", self.learning_rate > 0),
                ("warmup", "between 0 and 1", 0 <= self.warmup < 1),
                ("weight_decay", "at least 0", self.weight_decay >= 0),
                ("loss", " or ".join(LOSSES), self.loss in LOSSES),
            )
            if not holds
        ]
        if faults:
            raise RecipeError("; ".join(faults))

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step


def recipe_folder() -> Path:
    """Where the packaged recipes are: in the package when installed, beside it in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name: str, **overrides: Any) -> Recipe:
    """A packaged recipe by name, or a YAML file by path; `overrides` that are not None win.

    Raises:
        RecipeError: no such recipe, or it has faults; all of them are named.
    """
    packaged = recipe_folder() / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    try:
        import yaml

        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--uptrain {name}: no such file or recipe ({', '.join(recipe_names())})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path} must hold a table of settings")
    return _recipe({**content, **{k: v for k, v in overrides.items() if v is not None}}, str(path))


def _recipe(content: Mapping[str, Any], where: str) -> Recipe:
    fields = {name: type(value) for name, value in dataclasses.asdict(Recipe()).items()}
    values: dict[str, Any] = {}
    faults = []
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            faults.append(f"{key}: no such setting" + (f", did you mean {close[0]}?" if close else ""))
        elif isinstance(value, bool) or not isinstance(value, (int, float) if fields[key] is float else fields[key]):
            faults.append(f"{key}: {value!r} is no {fields[key].__name__}")
        else:
            values[key] = fields[key](value)
    recipe = None
    try:
        recipe = Recipe(**values)
    except RecipeError as error:
        faults.append(str(error))
    if faults or recipe is None:
        raise RecipeError(f"{where}: " + "; ".join(faults))
    return recipe
