"""Rows of files, of data sets on the hub and of objects, one part of them to train on and one held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import DataError, one_line, shown
from . import python_data
from .find_files import files_of, saved_splits
from .formats import TEXT_COLUMN, missing_column, rows
from .pretokenized import INPUT_IDS, STREAM_PIECE, is_token_file, row_tokens, stream_pieces, token_file

if TYPE_CHECKING:
    from .pretokenized import Ids

Split = Literal["train", "heldout"]

Document: TypeAlias = "str | Ids"
"""a text, or the tokens (T,) of one"""

Row: TypeAlias = "tuple[Document, ...]"

SHUFFLED = 1024  # rows among which the next is chosen, at most

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


@dataclass(frozen=True)
class Table:
    """Some columns of data, and what is said of them."""

    data: Any
    columns: tuple[str, ...]
    flag: str
    skipped: Skipped

    @property
    def name(self) -> str:
        return f"{self.flag} {python_data.called(self.data)}"

    def part(self, split: Split, shuffled: bool) -> Iterator[Row]:
        """The rows of one part. Raises DataError."""
        data = self.data
        if isinstance(data, str) and is_token_file(data):
            data = token_file(data, self.flag)
        if (stream := None if isinstance(data, str) else python_data.stream(data)) is not None:
            return self._of_stream(stream, split, shuffled)
        if not isinstance(data, str):
            found = self._of_objects(data, split)
        elif splits := saved_splits(data):
            found = self._of_parts(
                {part: partial(self._files, paths) for part, paths in splits.items() if paths}, split
            )
        elif paths := files_of(data, self.flag):
            found = self._divided(partial(self._files, paths), split)
        else:
            found = self._of_hub(data, split)
        return _shuffle(found) if shuffled else found

    def _files(self, paths: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
        return chain.from_iterable(rows(path, self.columns, self.flag) for path in paths)

    def _of_objects(self, data: Any, split: Split) -> Iterator[Row]:
        if (parts := python_data.parts(data)) is not None:
            return self._of_parts(
                {part: partial(python_data.table, of, self.flag) for part, of in parts.items()}, split
            )
        return self._divided(partial(python_data.table, data, self.flag), split)

    def _of_stream(self, ids: Ids, split: Split, shuffled: bool) -> Iterator[Row]:
        if self.columns not in ((TEXT_COLUMN,), (INPUT_IDS,)):
            raise missing_column(self.columns, [INPUT_IDS], self.name) or DataError(f"{self.name} is one row of tokens")
        few = len(ids) < HELD_OUT_EVERY * STREAM_PIECE
        pieces = stream_pieces(ids, shuffled)
        return chain.from_iterable(_split([(piece,)], split, few=few, first=number) for number, piece in pieces)

    def _divided(self, table: Callable[[], Iterator[Mapping[str, Any]]], split: Split) -> Iterator[Row]:
        """Of a table without parts of its own."""
        total = sum(1 for _ in islice(self._values(table(), Skipped()), HELD_OUT_EVERY))
        yield from _split(self._values(table(), self.skipped), split, few=total < HELD_OUT_EVERY)

    def _of_parts(self, parts: Mapping[str, Callable[[], Iterator[Mapping[str, Any]]]], split: Split) -> Iterator[Row]:
        """What is held out is the validation or test part, where there is one."""
        if "train" not in parts:
            named = ", ".join(parts)
            raise DataError(f"{self.name} has no part named train (its parts: {named}); give the folder of one")
        held_out = next((part for part in _HELD_OUT_SPLITS if part in parts), None)
        if held_out is None:
            return self._divided(parts["train"], split)
        return self._values(parts[held_out if split == "heldout" else "train"](), self.skipped)

    def _of_hub(self, data: str, split: Split) -> Iterator[Row]:
        from datasets import get_dataset_split_names, load_dataset

        name, _, config = data.partition(":")
        try:
            splits = get_dataset_split_names(name, config or None)
            held_out = next((part for part in _HELD_OUT_SPLITS if part in splits), None)
            source = held_out if split == "heldout" and held_out else "train"
            table: Any = load_dataset(name, config or None, split=source, streaming=True)
            texts = self._values(table, self.skipped)
            yield from texts if held_out else _split(texts, split, few=False)
        except DataError:
            raise
        except Exception as error:  # the hub client raises many kinds; each means: not readable
            raise DataError(
                f"{self.flag} {shown(data)} is no file, folder or glob here, and not readable as a data set on the "
                f"hub: {one_line(error, 200)}"
            ) from error

    def _values(self, table: Iterable[Mapping[str, Any]], skipped: Skipped) -> Iterator[Row]:
        """The columns' texts or tokens, of rows where none is blank; rows where one is neither are counted.

        Raises:
            DataError: there is no such column, or none of its rows holds text.
        """
        columns = self.columns
        usable, left_out = False, 0
        known: dict[str, None] = {}  # in the order they come
        for row in table:
            values = [value for column in columns if (value := _value(row, column)) is not None]
            if len(values) == len(columns):
                usable = True
                if all(map(_is_full, values)):
                    yield tuple(values)
                continue
            left_out += 1
            skipped.rows = max(skipped.rows, left_out)
            if not usable:
                known |= dict.fromkeys(row)
                if left_out == _LOOKED_AT and (error := missing_column(columns, [*known], self.name)):
                    raise error
        if not usable and left_out:
            raise missing_column(columns, [*known], self.name) or DataError(
                f'{self.name}: none of its {left_out:,} rows holds text in "{", ".join(columns)}"'
            )


def _value(row: Mapping[str, Any], column: str) -> Document | None:
    """A row's text or tokens; of a row without a text, the tokens that it has."""
    value = row.get(column)
    if isinstance(value, str):
        return _sound(value)
    if value is None and column == TEXT_COLUMN:
        column = INPUT_IDS
    return row_tokens(row, column)


def _is_full(value: Document) -> bool:
    return bool(value.strip()) if isinstance(value, str) else len(value) > 0


def _sound(text: str) -> str:
    """Without halves of characters, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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


def _split(table: Iterable[Row], split: Split, *, few: bool, first: int = 0) -> Iterator[Row]:
    """One row in HELD_OUT_EVERY is held out; of a few whole documents, the last tenth of each."""
    for i, row in enumerate(table, first):
        if few and len(row) == 1:
            document = row[0]
            cut = len(document) * 9 // 10
            if isinstance(document, str):
                cut = document.rfind("\n", 0, cut) + 1 or cut
            part = document[cut:] if split == "heldout" else document[:cut]
            if _is_full(part):
                yield (part,)
        elif (i % HELD_OUT_EVERY == 0) == (split == "heldout"):
            yield row
