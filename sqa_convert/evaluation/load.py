"""Load the config or the language model of a folder, converted or not."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.find import check_folder, read_generation_config, resolve
from ..checkpoints.in_memory import unwrapped
from ..errors import CheckpointError, RecipeError, one_line
from ..progress import no_bars_of_others
from ..text.plain_generation import settle
from ..text.tokenizers import load_tokenizer, tokenizer_in_memory, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Measured:
    """A model to be measured or trained, in a folder or in memory; what is asked of it is loaded once."""

    given: str | Path | PreTrainedModel
    given_tokenizer: Any = None
    """or its name"""
    trust_remote_code: bool = False
    without: str = "copy the source's there"
    """what to do where there is no tokenizer, for messages"""

    @cached_property
    def config(self) -> Any:
        """Raises CheckpointError."""
        if isinstance(self.given, str | Path):
            return load_config(self.given, self.trust_remote_code)
        return self.given.config

    @cached_property
    def tokenizer(self) -> Any:
        """The one that was given, else the one that lies beside the model. Raises CheckpointError."""
        if self.given_tokenizer is not None:
            return tokenizer_of(self.given_tokenizer, self.trust_remote_code)
        if isinstance(self.given, str | Path):
            return load_tokenizer(self.given, self.trust_remote_code, self.without)
        return tokenizer_in_memory(self.given, self.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """Raises CheckpointError."""
        if isinstance(self.given, str | Path):
            return load_model(self.given, trust_remote_code=self.trust_remote_code)
        return self.given


class Converted(ABC):
    """What `sqa_convert.convert` returns, as far as it is measured and trained."""

    output: Path | None
    """the folder, where there is one"""
    report: dict[str, Any]

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The converted model."""

    @property
    @abstractmethod
    def loaded(self) -> PreTrainedModel | None:
        """The same, where it is in memory."""

    @property
    @abstractmethod
    def source(self) -> Path | PreTrainedModel:
        """The unconverted model: its folder, or the model itself."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Of the model, or the folder it lies in; None where nothing is known of one."""


def located(given: str | Path | PreTrainedModel | Converted) -> Path | PreTrainedModel:
    """The folder of a model, or the model where it is in memory. Raises CheckpointError, UnsupportedModelError."""
    if isinstance(given, str | Path):
        return resolve(given)
    if not isinstance(given, Converted):
        return unwrapped(given)
    return given.model if given.loaded is not None or given.output is None else given.output


@contextlib.contextmanager
def unmoved(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards a model is on the device and in the mode that it was in before."""
    device, training = model.device, {name for name, module in model.named_modules() if module.training}
    try:
        yield
    finally:
        model.to(device)
        for name, module in model.named_modules():
            module.training = name in training


def load_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """A model's config, converted or not. Raises CheckpointError."""
    from transformers import AutoConfig

    from .. import models  # noqa: F401 - registers the architectures

    check_folder(Path(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation, JSON and look-ups share no base class
        raise CheckpointError(f"{folder}: its config does not load: {one_line(error)}") from error


def load_model(
    folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A language model, converted or not, in eval mode, which generates plainly. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

    config = load_config(folder, trust_remote_code)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("Classification", "EncoderModel", "QuestionAnswering")):
        raise CheckpointError(f"{folder} is a {architecture}, which has no language model head")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    overrides |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "generation_config": GenerationConfig()}
    try:
        with no_bars_of_others():
            model = auto.from_pretrained(folder, **overrides).eval()
        return settle(model, read_generation_config(Path(folder)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config.json can make it fail in any way
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error


def leave_out(name: str, error: Exception, optional: Collection[str], device: torch.device) -> None:
    """Of a model that was not measured: returns where the others are worth having without it, by whatever it failed.

    Raises RecipeError where a model that is wanted does not fit into the device's memory, else the error itself.
    """
    if name in optional:
        return
    if not isinstance(error, torch.OutOfMemoryError):
        raise error
    raise RecipeError(f"the {name} model does not fit on {device}: --device cpu or --no-evaluate") from error
