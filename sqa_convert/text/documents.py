"""Text, or its tokens, from the built-in corpus, files, data sets on the hub and objects: to train on, or held out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..errors import DataError, RecipeError, shown
from .formats import TEXT_COLUMN
from .pretokenized import INPUT_IDS, LABELS
from .python_data import called
from .splits import Document, Skipped, Split, Table
from .stdlib import stdlib

BUILT_IN = "stdlib"

SELF = "self"
"""what a model writes itself, in the place of data"""

AUTO_TEXT = "auto"
"""in a recipe: the built-in corpus, or if the model was not made for that, what it writes itself"""

GIVEN = "given"
"""in a recipe: data that were given from Python, not by a name"""


def is_own(data: Any) -> bool:
    """Whether data are what a model writes itself, or may turn out to be."""
    return isinstance(data, str) and data in (SELF, AUTO_TEXT)


def is_built_in(data: Any) -> bool:
    return data is None or (isinstance(data, str) and data == BUILT_IN)


def documents(
    data: Any,
    split: Split,
    *,
    column: str = TEXT_COLUMN,
    tests: bool = False,
    shuffled: bool = False,
    skipped: Skipped | None = None,
    flag: str = "--data",
) -> Iterator[Document]:
    """The documents of one split of `data`, texts or arrays of tokens; two splits of it never share a document.

    Args:
        data: None or "stdlib" for the built-in corpus (the running interpreter's standard library, split by a hash of
            each file's name); a file, folder or glob of text, JSON, CSV, Parquet or Arrow, compressed or not; a folder
            of `save_to_disk`; or "ID[:CONFIG]" of a data set on the hub, streamed. A large file of text is several
            documents. Of rows without that column the tokens in "input_ids" are taken, without padding. Bare tokens:
            FILE.npy, or FILE:DTYPE such as train.bin:uint16, (N,) or (n, T). From Python also texts, token ids, rows
            or batches in a list, an array, a tensor, a `datasets.Dataset` or a DataLoader; parts of them by name
            ("train", "validation") in a dict.
        split: "train" or "heldout".
        column: of a table, the one that holds the text. Rows where it holds none are left out. "line" of plain text:
            each line is a document.
        tests: of the built-in corpus, also the library's own tests (not every interpreter ships them).
        shuffled: in an order of no meaning, always the same, so that a part of them stands for the whole; of files and
            hub data sets as far as a buffer reaches.
        skipped: counts the rows that are left out.
        flag: that `data` came from, for messages.

    Raises:
        DataError: nothing is found under `data`, it cannot be read, or no row holds text in the column.
    """
    if is_built_in(data):
        if column != TEXT_COLUMN:
            raise DataError(f"{BUILT_IN} has no column {shown(column)}: --text-column is for tables, named by {flag}")
        return stdlib(split, tests, shuffled)
    return (text for (text,) in Table(data, (column,), flag, skipped or Skipped()).part(split, shuffled))


@dataclass(frozen=True)
class Columns:
    """Of a table of what an encoder-decoder reads and answers."""

    source: str
    target: str
    prefix: str = ""
    """put before each source"""

    @classmethod
    def named(cls, source: str, target: str, prefix: str) -> Columns | None:
        """None where none is. Raises RecipeError where only one of two is."""
        if bool(source) != bool(target):
            one, other = ("--source-column", "--target-column") if source else ("--target-column", "--source-column")
            raise RecipeError(f"{one} needs {other}: name the columns of both, what is read and what is answered")
        if prefix and not source:
            raise RecipeError(
                "--prefix is put before what --source-column names: give --source-column, --target-column"
            )
        return cls(source, target, prefix) if source else None


def peeked(texts: Iterator[Document]) -> tuple[Iterator[Document], bool | None]:
    """The same documents, and whether they are tokens already, as the first one is; None where there is none."""
    first = next(texts, None)
    if first is None:
        return texts, None
    return chain([first], texts), not isinstance(first, str)


TOKEN_PAIRS = Columns(INPUT_IDS, LABELS)


def pair_columns(data: Any, columns: Columns | None, column: str, flag: str = "--data") -> Columns | None:
    """The columns of pairs: those that are named; of rows of tokens and labels these. Raises DataError."""
    if columns is not None or is_own(data) or is_built_in(data):
        return columns
    if peeked(documents(data, "train", column=column, flag=flag))[1]:
        with contextlib.suppress(DataError):
            next(pairs(data, TOKEN_PAIRS, "train", flag=flag), None)
            return TOKEN_PAIRS
    return None


def pairs(
    data: Any, columns: Columns, split: Split, *, skipped: Skipped | None = None, flag: str = "--data"
) -> Iterator[tuple[Document, Document]]:
    """What is read, its prefix before it, and what is answered, of one split of `data`; texts, or tokens (T,) of them.

    That is as for `documents` but not the built-in corpus.

    Raises:
        DataError: nothing is found under `data`, or it lacks a column.
    """
    if is_built_in(data):
        raise DataError(f"{flag} {data} holds no pairs: give JSON lines, CSV, Parquet or a data set on the hub")
    table = Table(data, (columns.source, columns.target), flag, skipped or Skipped()).part(split, split == "train")
    prefix = columns.prefix
    return ((prefix + source if isinstance(source, str) else source, target) for source, target in table)


def check_data(data: Any, flag: str = "--data", column: str = TEXT_COLUMN, columns: Columns | None = None) -> None:
    """Raises DataError when `documents`, or of two columns `pairs`, would find nothing, before work is done for it."""
    if is_own(data):
        return
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        if columns is None:
            first: object = next(documents(data, split, column=column, flag=flag), None)
        else:
            first = next(pairs(data, columns, split, flag=flag), None)
        if first is None:
            raise DataError(f"{flag} {called(data)}: no {'text' if columns is None else 'pairs'} in its {split} part")
