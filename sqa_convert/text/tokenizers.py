"""Load a tokenizer, once for all folders with the same files, and check that it fits a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from ..checkpoints.companions import CONFIG, has_tokenizer
from ..checkpoints.find import check_folder, resolve
from ..checkpoints.small_files import read_config, sha256_of
from ..checkpoints.source import stamp
from ..errors import CheckpointError, DataError, one_line

_LARGE_TOKENIZER = 2**26  # bytes

_MAY_BE_A_TOKENIZERS = (
    ".bpe", ".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".tokenizer", ".txt", ".vocab"
)  # fmt: skip

_NEVER_A_TOKENIZERS = ("config.json", "generation_config.json", "model.safetensors.index.json", "report.json")


@dataclass(frozen=True)
class _Files:
    """A tokenizer's files; those of two folders are equal where their content is."""

    content: tuple[object, ...]
    folder: Path = field(compare=False)


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool = False, without: str = "copy the source's there"
) -> Any:
    """The folder's tokenizer, one for all folders with the same files: it must not be changed.

    Raises CheckpointError when there is none, saying what to do `without` one.
    """
    way_out = without and f"; {without}"
    check_folder(Path(folder))
    if not has_tokenizer(Path(folder)):
        raise CheckpointError(f"{folder} holds no tokenizer{way_out}")
    try:
        if trust_remote_code:  # there may be more to it than its files
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        return _load(_files(Path(folder)))
    except Exception as error:  # every tokenizer library fails in its own way
        raise CheckpointError(f"{folder}: its tokenizer does not load ({one_line(error, 200)}){way_out}") from error


def tokenizer_of(given: Any, trust_remote_code: bool = False) -> Any:
    """A tokenizer as it was given, or by its name: a folder or a hub id. Raises CheckpointError."""
    if isinstance(given, str | Path):
        return load_tokenizer(resolve(given), trust_remote_code, without="")
    if not callable(given):
        raise CheckpointError(f"tokenizer={type(given).__name__}: give a tokenizer, a folder or a hub id")
    return given


def tokenizer_in_memory(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model in memory: what lies where the model was loaded from. Raises DataError."""
    name = getattr(model.config, "name_or_path", "")
    way_out = "give its tokenizer too"
    if not name:
        raise DataError(f"nothing says which tokenizer a {type(model).__name__} in memory has: {way_out}")
    try:
        return load_tokenizer(resolve(name), trust_remote_code, without="")
    except CheckpointError as error:
        raise DataError(f"the tokenizer of the model in memory: {one_line(error)}; {way_out}") from error


@lru_cache(maxsize=8)  # a tokenizer that has encoded keeps 0.4 MB for ever, even when it is gone
def _load(files: _Files) -> Any:
    return AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)


def _files(folder: Path) -> _Files:
    """All that a tokenizer may be made of: what the config says of it, the folder's small files."""
    config = read_config(str(folder), folder) if (folder / CONFIG).is_file() else {}
    paths = sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*")))
    files = [p for p in paths if p.suffix in _MAY_BE_A_TOKENIZERS and p.name not in _NEVER_A_TOKENIZERS and p.is_file()]
    contents = ((str(path.relative_to(folder)), _content(path)) for path in files)
    return _Files((str(config.get("model_type")), str(config.get("tokenizer_class")), *contents), folder)


def _content(path: Path) -> object:
    small = path.stat().st_size < _LARGE_TOKENIZER
    return sha256_of(path) if small else stamp(path)


def check_vocabulary(blocks: Tensor, vocabulary: int) -> None:
    """Raises DataError when a text holds tokens that the model does not know."""
    smallest, largest = int(blocks.min()), int(blocks.max())
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise DataError(f"the text holds token {wrong}, the model knows {vocabulary} tokens: their tokenizers differ")
