"""A model in memory, converted or not, as files that everything can load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.companions import GENERATION_CONFIG
from ..checkpoints.find import resolve
from ..checkpoints.small_files import carry_files
from ..errors import CheckpointError, one_line
from ..progress import no_bars_of_others
from .request import DEFAULT_SHARD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, max_shard_size: str = DEFAULT_SHARD) -> None:
    """Weights, config, generation config, tokenizer, and of a converted model its modeling files.

    Args:
        tokenizer: or the folder it lies in; None: there is none.

    Raises:
        CheckpointError: the tokenizer cannot be written.
    """
    with _plain_generation(model) as generation, no_bars_of_others():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    if isinstance(tokenizer, str | Path):
        carry_files(resolve(tokenizer), folder, "")
    elif tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if generation is not None:  # the model's own, not one beside the tokenizer
        generation.to_json_file(folder / GENERATION_CONFIG)


def save_tokenizer(tokenizer: Any, folder: str | Path, what: str = "") -> None:
    """The files of a tokenizer. Raises CheckpointError, which begins with `what` it was given as."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # every tokenizer library fails in its own way
        raise CheckpointError(f"{what}a {type(tokenizer).__name__} cannot be saved: {one_line(error)}") from error


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[Any]:
    """Its own generation config, which transformers refuses to write where it takes something in it for a mistake."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is None:
        yield None
        return
    model.generation_config = GenerationConfig()
    try:
        yield own
    finally:
        model.generation_config = own
