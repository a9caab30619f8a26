"""Text from the built-in corpus, from files, and from data sets on the hub."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, RecipeError, one_line, shown
from .files import files_of, saved_splits
from .formats import TEXT_COLUMN, missing_column, rows

Split = Literal["train", "heldout"]

Row = tuple[str, ...]

BUILT_IN = "stdlib"

SELF = "self"
"""what a model writes itself, in the place of data"""

AUTO_TEXT = "auto"
"""in a recipe: the built-in corpus, or if the model was not made for that, what it writes itself"""

SHUFFLED = 1024  # rows of files and hub data sets among which the next is chosen, at most

_SHUFFLED_CHARACTERS = 2**22  # of them together

_LOOKED_AT = 1024  # rows without a column, after which there is none

HELD_OUT_EVERY = 20  # one document in 20 is held out; of fewer than 20 documents, the last tenth of each

_HELD_OUT_SPLITS = ("validation", "test")


@dataclass
class Skipped:
    """How many rows were left out because they hold no text."""

    rows: int = 0
    """of one pass over the data"""

    def __str__(self) -> str:
        """What there is to say, after the name of the data."""
        return f", {self.rows:,} rows without text skipped" if self.rows else ""


def documents(
    data: str | None,
    split: Split,
    *,
    column: str = TEXT_COLUMN,
    tests: bool = False,
    shuffled: bool = False,
    skipped: Skipped | None = None,
    flag: str = "--data",
) -> Iterator[str]:
    """The documents of one split of `data`; the two splits of the same data never share a document.

    Args:
        data: None or "stdlib" for the built-in corpus (the running interpreter's standard library, split by a hash of
            each file's name); a file, folder or glob of text, JSON, CSV, Parquet or Arrow, compressed or not; a folder
            of `save_to_disk`; or "ID[:CONFIG]" of a data set on the hub, streamed. A large file of text is several
            documents.
        split: "train" or "heldout".
        column: of a table, the one that holds the text. Rows where it holds none are left out.
        tests: of the built-in corpus, also the library's own tests (not every interpreter ships them).
        shuffled: in an order of no meaning, always the same, so that a part of them stands for the whole; of files and
            hub data sets as far as a buffer reaches.
        skipped: counts the rows that are left out.
        flag: that `data` came from, for messages.

    Raises:
        DataError: nothing is found under `data`, it cannot be read, or no row holds text in the column.
    """
    if data in (None, BUILT_IN):
        if column != TEXT_COLUMN:
            raise DataError(f"{BUILT_IN} has no column {shown(column)}: --text-column is for tables, named by {flag}")
        return _stdlib(split, tests, shuffled)
    return (text for (text,) in _table(str(data), (column,), split, flag, shuffled, skipped))


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


def pairs(
    data: str, columns: Columns, split: Split, *, skipped: Skipped | None = None, flag: str = "--data"
) -> Iterator[tuple[str, str]]:
    """What is read, its prefix before it, and what is answered, of one split of `data`.

    That is as for `documents` but not the built-in corpus.

    Raises:
        DataError: nothing is found under `data`, or it lacks a column.
    """
    if data == BUILT_IN:
        raise DataError(f"{flag} {data} holds no pairs: give JSON lines, CSV, Parquet or a data set on the hub")
    table = _table(data, (columns.source, columns.target), split, flag, split == "train", skipped)
    return ((columns.prefix + source, target) for source, target in table)


def check_data(
    data: str | None, flag: str = "--data", column: str = TEXT_COLUMN, columns: Columns | None = None
) -> None:
    """Raises DataError when `documents`, or of two columns `pairs`, would find nothing, before work is done for it."""
    if data in (SELF, AUTO_TEXT):
        return
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        if columns is None:
            first: object = next(documents(data, split, column=column, flag=flag), None)
        else:
            first = next(pairs(data or BUILT_IN, columns, split, flag=flag), None)
        if first is None:
            raise DataError(f"{flag} {shown(data)}: no {'text' if columns is None else 'pairs'} in its {split} part")


def _table(
    data: str, columns: tuple[str, ...], split: Split, flag: str, shuffled: bool, skipped: Skipped | None
) -> Iterator[Row]:
    skipped = skipped or Skipped()
    if splits := saved_splits(data):
        table = _from_splits(splits, f"{flag} {shown(data)}", columns, split, flag, skipped)
    elif paths := files_of(data, flag):
        table = _from_files(paths, columns, split, flag, skipped)
    else:
        table = _from_hub(data, columns, split, flag, skipped)
    return _shuffle(table) if shuffled else table


def _shuffle(table: Iterator[Row]) -> Iterator[Row]:
    """Each time a random one of the next rows."""
    chance, waiting, characters = random.Random(0), list[Row](), 0
    for row in table:
        waiting.append(row)
        characters += sum(map(len, row))
        while len(waiting) == SHUFFLED or characters > _SHUFFLED_CHARACTERS:
            at = chance.randrange(len(waiting))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
            chosen = waiting.pop()
            characters -= sum(map(len, chosen))
            yield chosen
    chance.shuffle(waiting)
    yield from waiting


def _stdlib(split: Split, tests: bool, shuffled: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    left_out = {"site-packages", "dist-packages", "__pycache__"} | (set() if tests else {"test", "tests", "idle_test"})
    for name in sorted(_python_files(root, frozenset(left_out)), key=_digest if shuffled else None):
        held_out = _digest(name)[0] % HELD_OUT_EVERY == 0
        if held_out != (split == "heldout"):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"this Python ships no standard library source under {root}: give text with --data")


def _digest(name: str) -> bytes:
    """What splits and orders files depends on nothing but their names."""
    return hashlib.sha256(name.encode()).digest()


@cache
def _python_files(root: Path, left_out: frozenset[str]) -> tuple[str, ...]:
    names = []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        names += [(Path(here) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return tuple(names)


def _from_files(
    paths: Sequence[Path], columns: tuple[str, ...], split: Split, flag: str, skipped: Skipped
) -> Iterator[Row]:
    name = f"{flag} {shown(str(paths[0]))}"

    def table(skipped: Skipped) -> Iterator[Row]:
        return _texts(chain.from_iterable(rows(path, columns, flag) for path in paths), columns, name, skipped)

    total = sum(1 for _ in islice(table(Skipped()), HELD_OUT_EVERY))
    yield from _split(table(skipped), split, few=total < HELD_OUT_EVERY)


def _from_splits(
    splits: Mapping[str, Sequence[Path]], name: str, columns: tuple[str, ...], split: Split, flag: str, skipped: Skipped
) -> Iterator[Row]:
    """A data set with parts of its own: what is held out is its validation or test part, where it has one."""
    if not splits.get("train"):
        raise DataError(f"{name} has no part named train (its parts: {', '.join(splits)}); give the folder of one")
    held_out = next((part for part in _HELD_OUT_SPLITS if splits.get(part)), None)
    if held_out is None:
        yield from _from_files(splits["train"], columns, split, flag, skipped)
        return
    paths = splits[held_out if split == "heldout" else "train"]
    yield from _texts(chain.from_iterable(rows(path, columns, flag) for path in paths), columns, name, skipped)


def _from_hub(data: str, columns: tuple[str, ...], split: Split, flag: str, skipped: Skipped) -> Iterator[Row]:
    from datasets import get_dataset_split_names, load_dataset

    name, _, config = data.partition(":")
    try:
        splits = get_dataset_split_names(name, config or None)
        held_out = next((part for part in _HELD_OUT_SPLITS if part in splits), None)
        source = held_out if split == "heldout" and held_out else "train"
        table: Any = load_dataset(name, config or None, split=source, streaming=True)
        texts = _texts(table, columns, f"{flag} {shown(data)}", skipped)
        yield from texts if held_out else _split(texts, split, few=False)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means: not readable
        raise DataError(
            f"{flag} {shown(data)} is no file, folder or glob here, and not readable as a data set on the hub: "
            f"{one_line(error, 200)}"
        ) from error


def _texts(table: Iterable[Mapping[str, Any]], columns: tuple[str, ...], name: str, skipped: Skipped) -> Iterator[Row]:
    """The columns of a table, of the rows where none is blank; rows where one is no text are counted.

    Raises:
        DataError: there is no such column, or none of its rows holds text.
    """
    usable, left_out = False, 0
    known: dict[str, None] = {}  # in the order they come
    for row in table:
        values = [value for column in columns if isinstance(value := row.get(column), str)]
        if len(values) == len(columns):
            usable = True
            if all(value.strip() for value in values):
                yield tuple(map(_sound, values))
            continue
        left_out += 1
        skipped.rows = max(skipped.rows, left_out)
        if not usable:
            known |= dict.fromkeys(row)
            if left_out == _LOOKED_AT and (error := missing_column(columns, [*known], name)):
                raise error
    if not usable and left_out:
        raise missing_column(columns, [*known], name) or DataError(
            f'{name}: none of its {left_out:,} rows holds text in "{", ".join(columns)}"'
        )


def _sound(text: str) -> str:
    """Without halves of characters, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _split(table: Iterable[Row], split: Split, *, few: bool) -> Iterator[Row]:
    """One row in HELD_OUT_EVERY is held out; of a few whole documents, the last tenth of each."""
    for i, row in enumerate(table):
        if few and len(row) == 1:
            text = row[0]
            cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
            part = text[cut:] if split == "heldout" else text[:cut]
            if part.strip():
                yield (part,)
        elif (i % HELD_OUT_EVERY == 0) == (split == "heldout"):
            yield row
