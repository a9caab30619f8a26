"""What lies beside a model's weights: which files the result needs as they are, and which are left behind.

They belong to the tokenizer, to generation, to sentence embedding, or are the licence. What names code elsewhere is
left behind: the result is loaded with `trust_remote_code`, for our files alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line, shown
from .pickle_check import check_pickle
from .untrusted import LARGEST_CARRIED, LARGEST_CONFIG, MOST_NESTED, parse_json, read_header, regular_file

CONFIG, CARD = "config.json", "README.md"

TOKENIZER_CONFIG = "tokenizer_config.json"

GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.*.json", "vocab.json", "vocab.txt", "vocab-*.json", "*_vocab.json", "encoder.json",
    "*.model", "tokenizer.model.*", "*.spm", "*.bpe", "*.codes", "*.tiktoken", "*.tokenizer", "*.vocab", "tekken.json",
    "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
"""patterns of the vocabularies that transformers' tokenizer classes name (their `vocab_files_names`), now and before"""

MODULES = "modules.json"
"""of sentence-transformers: the layers that come after the model"""

_TEMPLATES = "additional_chat_templates"

_ALWAYS = (
    *TOKENIZER_FILES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    f"{_TEMPLATES}/*.jinja",
    GENERATION_CONFIG,
    "LICEN[CS]E",
    "LICEN[CS]E.*",
    "LICEN[CS]E-*",
    "COPYING",
    "NOTICE",
    "NOTICE.*",
    "USE_POLICY.md",
)

_SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")

ON_THE_HUB = (CONFIG, CARD, *_ALWAYS, *_SENTENCES, "[1-9]_*/*")  # layers; 0 is the model
"""patterns of what is downloaded beside the weights"""

_LARGEST_LAYER = 2**28  # bytes

_WEIGHTS = (".safetensors", ".bin")

_OF_A_LAYER = (CONFIG, "*_config.json", "model.safetensors", "pytorch_model.bin")

_OWN_LAYERS = "sentence_transformers."

_KNOWN_CODE = ("torch.nn.", _OWN_LAYERS)

_MOST_LAYERS = 20

_MOST_LISTED = 50

_FOLDER = re.compile(r"\w[\w.-]*")

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # how a class is named


def companions(folder: Path) -> list[str]:
    """The files of a model folder that go into the result as they are, by their names within it."""
    layers = _sentence_layers(folder)
    patterns = _ALWAYS if layers is None else (*_ALWAYS, *_SENTENCES)
    names = [name for name in _files(folder) if _matches(name, patterns)]
    for layer in layers or ():
        names += [name for name in _files(folder, layer) if _matches(Path(name).name, _OF_A_LAYER)]
    return names


def check_companions(folder: Path) -> None:
    """Raises CheckpointError where a companion is no plain file of the folder, or not fit for those that read it."""
    for name in companions(folder):
        if name.endswith(_WEIGHTS):
            _check_weights(folder, name)
        else:
            _check_text(folder, name)


def _check_text(folder: Path, name: str) -> None:
    """Raises CheckpointError where a file that is carried over is not fit for it, or for the tokenizer's libraries."""
    path = regular_file(folder, name, LARGEST_CARRIED)
    if path is None or path.suffix != ".json":
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if content.count(b"[") + content.count(b"{") > MOST_NESTED:
        raise CheckpointError(f"{path} holds more than {MOST_NESTED:,} lists and tables")


def _check_weights(folder: Path, name: str) -> None:
    """Raises CheckpointError where weights that are carried over are not fit for the libraries that read them."""
    path = regular_file(folder, name, _LARGEST_LAYER)
    if path is not None and path.suffix == ".bin":
        check_pickle(path)
    elif path is not None:
        read_header(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer; ByT5's is a config without a vocabulary.

    Where there is nothing, transformers would make up an empty one.
    """
    return any(_matches(name, (TOKENIZER_CONFIG, *TOKENIZER_FILES)) for name in _files(folder))


def left_behind(folder: Path, read: Collection[str]) -> list[str]:
    """Names of what the result does not have of a folder, fit for one line; whole folders end in a slash.

    Args:
        read: the files of weights.
    """
    carried = set(companions(folder))
    known = {*carried, *read, CONFIG, CARD}
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.name in known or _lists(path.name, read):
            continue
        inside = _files(folder, path.name) if path.is_dir() else []
        if carried.isdisjoint(inside):
            names.append(path.name + "/" if path.is_dir() else path.name)
        else:
            names += [name for name in inside if name not in carried]
    listed = [shown(name) for name in names[:_MOST_LISTED]]
    return listed + ([f"and {len(names) - _MOST_LISTED:,} more"] if len(names) > _MOST_LISTED else [])


def _lists(name: str, read: Collection[str]) -> bool:
    """Whether a file is the index of the weights that were read."""
    whole = name.removesuffix(".index.json")
    return whole not in (name, *read) and any(file.endswith(Path(whole).suffix) for file in read)


def _files(folder: Path, inside: str = "") -> list[str]:
    """Sorted names, within `folder`, of files in it and in its folder of templates; or of files `inside` another."""
    names = []
    for place in [inside] if inside else ["", _TEMPLATES]:
        try:
            names += [f"{place}/{path.name}".lstrip("/") for path in (folder / place).iterdir() if not path.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CheckpointError(f"{folder / place} cannot be looked into: {one_line(error)}") from error
    return sorted(names)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sentence_layers(folder: Path) -> list[str] | None:
    """Folders of the layers that sentence-transformers puts after the model.

    None where it is no such model, or one with code of its own.
    """
    modules = read_quietly(folder, MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return None
    layers = [str(module.get("path", "")) for module in modules if module.get("path")]
    classes = [str(module.get("type")) for module in modules]
    whole = all(_FOLDER.fullmatch(layer) and (folder / layer).is_dir() for layer in layers)
    if not whole or not all(name.startswith(_OWN_LAYERS) for name in classes) or len(layers) > _MOST_LAYERS:
        return None
    configs = (read_quietly(folder, f"{layer}/{CONFIG}") for layer in layers)
    if any(not name.startswith(_KNOWN_CODE) for content in configs for name in _named_code(content)):
        return None
    return layers


def read_quietly(folder: Path, name: str) -> Any:
    """The JSON in a file of a model folder; None where there is none, or it is damaged. Raises CheckpointError."""
    path = regular_file(folder, name, LARGEST_CONFIG)
    try:
        return None if path is None else parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _named_code(content: Any) -> Iterator[str]:
    """All strings in it that may name a class."""
    if isinstance(content, str):
        if _DOTTED.fullmatch(content):
            yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _named_code(value)
