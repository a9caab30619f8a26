"""Files of plain text that hold one text a line, as captions and protein sequences mostly come, told from prose."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .documents import is_built_in, is_own
from .find_files import files_of
from .formats import LINE_COLUMN, TEXT_COLUMN, ending, kind_of, rows
from .python_data import called
from .splits import HELD_OUT_EVERY

_LOOKED_AT = 1000  # lines

_WIDTHS = (50, 120)  # characters, that prose is broken into lines of

_BROKEN = 0.25  # of the lines of prose, and more, end for want of room and not because a paragraph does


def column_read(data: Any, column: str, flag: str) -> str:
    """The column that an encoder reads: of files of text with a text a line LINE_COLUMN, where no other is named.

    Such a model reads captions, queries or sequences, each from its first token to its end.

    Raises DataError where nothing is found under `data`.
    """
    if column != TEXT_COLUMN or not isinstance(data, str) or is_own(data) or is_built_in(data):
        return column
    paths = files_of(data, flag)
    plain = bool(paths) and kind_of(paths[0]) == "text" and ending(paths[0]) in (".txt", "")
    if not plain:
        return column
    first = next(iter(rows(paths[0], (TEXT_COLUMN,), flag)), {TEXT_COLUMN: ""})
    return LINE_COLUMN if has_a_text_a_line(first[TEXT_COLUMN]) else column


def read_as(data: Any, column: str) -> str:
    """What data are called, with how they are read."""
    return f"{called(data)}, a text a line" if column == LINE_COLUMN else called(data)


def has_a_text_a_line(beginning: str) -> bool:
    """Whether the lines of a file are texts of their own: many, none blank, and not prose that is broken into lines."""
    lines = beginning.rstrip().splitlines()[:_LOOKED_AT]
    if len(lines) < HELD_OUT_EVERY or not all(line.strip() for line in lines):
        return False
    longest = sorted(map(len, lines))[-1 - len(lines) // 50]  # but for a few, such as addresses
    # A line of prose ends where the next word would not fit.
    full = sum(len(line) + 1 + len(word.split()[0]) > longest for line, word in pairwise(lines))
    spaced = sum(" " in line.strip() for line in lines)
    broken = _WIDTHS[0] <= longest <= _WIDTHS[1] and full > _BROKEN * len(lines) and 2 * spaced > len(lines)
    return not broken
