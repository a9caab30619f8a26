"""Text that is tokens already: of one row, and long streams of them in arrays and files. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, one_line, shown

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[Any, Any]

INPUT_IDS = "input_ids"
"""the column of a row's tokens"""

LABELS = "labels"
"""the column of what an encoder-decoder answers to them"""

MASK = "attention_mask"

NOT_PREDICTED = -100
"""a label that is none"""

STREAM_PIECE = 2**16
"""tokens of a stream that are one document"""

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
"""of a file of bare tokens"""

_LLM_C = 20240520  # the first of 256 numbers before the tokens of such a file

_LLM_C_HEADER = 1024  # bytes


def token_ids(value: Any) -> Ids | None:
    """A list, array or tensor of token ids (T,); None where it is none."""
    import numpy as np

    if isinstance(value, str | bytes | Mapping) or value is None:
        return None
    try:
        ids = np.asarray(_on_cpu(value))
    except Exception:  # rows of different lengths, objects
        return None
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None


def _on_cpu(value: Any) -> Any:
    return value.cpu() if hasattr(value, "cpu") else value


def row_tokens(row: Mapping[str, Any], column: str) -> Ids | None:
    """The tokens in a column of a row, without padding; None where it holds none."""
    import numpy as np

    ids = token_ids(row.get(column))
    if ids is None:
        return None
    if column == LABELS:
        return ids[ids != NOT_PREDICTED]
    if column != INPUT_IDS or row.get(MASK) is None:
        return ids
    mask = np.asarray(_on_cpu(row[MASK]))
    if mask.shape != ids.shape:
        raise DataError(f"{MASK} of shape {mask.shape} beside {INPUT_IDS} of shape {ids.shape}")
    return ids[mask.astype(bool)]


def is_token_file(name: str) -> bool:
    """Whether a name is that of bare tokens: FILE.npy, or FILE:DTYPE."""
    path, dtype = _parted(name)
    return dtype is not None or path.endswith((".npy", ".bin"))


def _parted(name: str) -> tuple[str, str | None]:
    path, _, dtype = name.rpartition(":")
    return (path, dtype) if path and dtype in DTYPES else (name, None)


def token_file(name: str, flag: str) -> Ids:
    """The tokens of a file, (N,) or (n, T), read as they are used. Raises DataError."""
    import numpy as np

    place, dtype = _parted(name)
    path = Path(place).expanduser()
    called = f"{flag} {shown(name)}"
    try:
        if path.suffix == ".npy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            start, dtype = _header(path, dtype)
            if dtype is None:
                raise DataError(f"{called}: of which type are its tokens? {place}:uint16, or {', '.join(DTYPES)}")
            ids = np.memmap(path, dtype, "r", start)
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{called} cannot be read as tokens: {one_line(error, 200)}") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise DataError(f"{called} holds {ids.dtype} of shape {ids.shape}: give token ids, (N,) or (n, T)")
    return ids


def _header(path: Path, dtype: str | None) -> tuple[int, str | None]:
    """Where the tokens of a file begin, and their dtype; llm.c's files tell both."""
    import numpy as np

    with path.open("rb") as file:
        head = np.frombuffer(file.read(12), "<i4")
    tells = len(head) == 3 and (head[0], head[1]) == (_LLM_C, 1) and dtype in (None, "uint16")
    if tells and path.stat().st_size == _LLM_C_HEADER + 2 * int(head[2]):
        return _LLM_C_HEADER, "uint16"
    return 0, dtype


def stream_pieces(ids: Ids, shuffled: bool) -> Iterator[tuple[int, Ids]]:
    """A stream (N,) as pieces of `STREAM_PIECE` tokens with their numbers; read one at a time.

    Args:
        shuffled: in an order of no meaning, always the same, over the whole of it.
    """
    numbers = list(range(-(-len(ids) // STREAM_PIECE)))
    if shuffled:
        random.Random(0).shuffle(numbers)
    for number in numbers:
        yield number, ids[number * STREAM_PIECE : (number + 1) * STREAM_PIECE]
