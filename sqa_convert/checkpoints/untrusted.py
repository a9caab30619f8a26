"""What a checkpoint's files must be before a library opens them. Loads no library itself.

A checkpoint may come from anywhere. What is refused here would hang or fill the memory of what reads it (devices,
headers of gigabytes, pickles that unfold), or make it read or call what is not the checkpoint's own.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line, shown

LARGEST_CONFIG = 10**6
"""bytes of config.json, which is copied again and again"""

LARGEST_INDEX = 16 * 10**6

LARGEST_HEADER = 16 * 10**6
"""bytes of a safetensors header, or of the pickle that lists a .bin file's tensors"""

LARGEST_CARRIED = 18 * 10**6
"""bytes of a tokenizer's file, and of all else that is carried over; mT5's has 16 million"""

MOST_NESTED = 10**6
"""lists and tables in one of these"""

MOST_TENSORS = 50_000


def regular_file(folder: Path, name: str, largest: int | None = None) -> Path | None:
    """A file of a checkpoint, None where it has none of that name.

    Raises:
        CheckpointError: it is a device or the like, a link to nothing or to what is not the checkpoint's own, or larger
            than `largest` bytes.
    """
    path = folder / name
    try:
        target, home = path.resolve(strict=True), folder.resolve()
        status = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {shown(str(path.readlink()), 300)}, where no file is; download the model again, "
                "or put the file itself there"
            ) from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # may not be looked at, a loop of links, a zero byte
        raise CheckpointError(f"{shown(str(path), 300)} cannot be read: {one_line(error)}") from error
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    linked = path.parent.resolve().is_relative_to(home)  # the file, not the folder that it is in
    if not target.is_relative_to(home) and not (linked and _may_lie_elsewhere(name, target)):
        raise CheckpointError(
            f"{path} is a link to {shown(str(target), 300)}, which is not the model's own; put the file itself there "
            f"(cp -rL copies a folder with what its links lead to)"
        )
    if largest is not None and status.st_size > largest:
        raise CheckpointError(f"{path} has {status.st_size:,} bytes, at most {largest:,} are read")
    return path


def _may_lie_elsewhere(name: str, target: Path) -> bool:
    """Whether a link out of the folder is followed.

    Weights may lie anywhere: of a file that is no table of tensors nothing gets into the result. Text is copied, and
    perhaps published, so it must be the model's own: a blob of the hub's cache, or a file of the same name.
    """
    return name.endswith((".safetensors", ".bin")) or "blobs" in target.parent.parts or target.name == Path(name).name


def parse_json(text: str, *, unique: bool = False, names: bool = False) -> Any:
    """JSON as the standard has it: no NaN, no number beyond a float, no half of a character.

    Args:
        unique: an object's keys must all differ.
        names: it may hold names of files that are not UTF-8, as Python reads them.

    Raises:
        ValueError, RecursionError: it is none.
    """
    content = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_without_duplicates if unique else None,
    )
    if "\\ud" in text or "\\uD" in text:
        json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape" if names else "strict")
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"{shown(next(k for k, _ in pairs if k in seen or seen.add(k)))} stands there twice")  # type: ignore[func-returns-value]
    return content


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header, which is an object with keys that differ.

    Raises:
        CheckpointError: it is damaged, or too large.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is damaged or truncated: a header of {length:,} bytes in a file of {size:,}"
                )
            if length > LARGEST_HEADER:
                raise CheckpointError(f"{path}: its header has {length:,} bytes, at most {LARGEST_HEADER:,} are read")
            header = parse_json(file.read(length).decode(), unique=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged or truncated: its header is no JSON object")
    if len(header) > MOST_TENSORS + 1:  # with its metadata
        raise CheckpointError(f"{path} holds more than {MOST_TENSORS:,} tensors")
    return length + 8, header


def is_zip(path: Path) -> bool:
    """Whether torch will take a file for a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
