"""Load the config or the language model of a folder, converted or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.find import check_folder, read_generation_config
from ..errors import CheckpointError, one_line
from ..text.plain_generation import settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return settle(auto.from_pretrained(folder, **overrides).eval(), read_generation_config(Path(folder)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config.json can make it fail in any way
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error
