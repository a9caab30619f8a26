"""Names of the files in a model folder, and the small ones read and written: JSON, what is carried over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line
from .companions import TOKENIZER_CONFIG, companions, has_tokenizer
from .dtypes import PIECE
from .untrusted import LARGEST_CONFIG, parse_json, regular_file

REPORT = "report.json"
"""in every output; a folder without it was not made here"""


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False, too, for a name that no file can have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_config(name: str, folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", f"{name} holds no config.json, so it is no model folder", LARGEST_CONFIG)


def read_json(path: Path, missing: str, largest: int | None = None) -> dict[str, Any]:
    """A JSON object of at most `largest` bytes. Raises CheckpointError, with the text `missing` where no file is."""
    if regular_file(path.parent, path.name, largest) is None:
        raise CheckpointError(missing)
    try:
        content = parse_json(path.read_text(encoding="utf-8"), names=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def is_ours(report: Any) -> bool:
    """Whether this package wrote the content of a report.json."""
    return isinstance(report, dict) and isinstance(report.get("schema"), int) and "sqa_convert" in report


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(PIECE):
            digest.update(data)
    return digest.hexdigest()


def _is_unicode(content: Mapping[str, Any] | list[Any]) -> bool:
    """False where a name on the disk is not, which Python reads as lone surrogates: JSON can escape them."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Writes JSON so that a reader finds either the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    try:
        text = json.dumps(content, indent=2, ensure_ascii=not _is_unicode(content), allow_nan=False) + "\n"
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def carry_files(source: Path, output: Path, tokenizer_class: str) -> None:
    """Copies what a model needs beside its weights (`companions`), as far as the source has it.

    Args:
        tokenizer_class: for the oldest hub folders, which do not name theirs: transformers knew it by the model type,
            and does not know the result's.
    """
    for name in companions(source):
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, output / name)
    if has_tokenizer(output):
        path = output / TOKENIZER_CONFIG
        try:
            config = read_json(path, "") if path.is_file() else {}
        except CheckpointError:  # it is damaged in the source, too
            return
        carried = {key: value for key, value in config.items() if key != "auto_map"}
        carried["tokenizer_class"] = carried.get("tokenizer_class") or tokenizer_class
        if carried != config:
            write_json(path, carried)
