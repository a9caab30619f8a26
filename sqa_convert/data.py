"""Text from the built-in corpus, from files, and from data sets on the hub."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from .errors import DataError, one_line

Split = Literal["train", "heldout"]
Row = tuple[str, ...]

BUILT_IN = "stdlib"
SHUFFLED = 1024  # rows of files and hub data sets among which the next is chosen
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # every other ending is read as plain text
HELD_OUT_EVERY = 20  # one document in 20 is held out; of fewer than 20 documents, the last tenth of each


def documents(
    data: str | None, split: Split, *, tests: bool = False, shuffled: bool = False, flag: str = "--data"
) -> Iterator[str]:
    """The documents of one split of `data`; the two splits of the same data never share a document.

    Args:
        data: None or "stdlib" for the built-in corpus (the running interpreter's standard library, split by a hash of
            each file's name); a file, folder or glob of text, JSON lines or Parquet (column "text"); or
            "ID[:CONFIG]" of a data set on the hub, streamed.
        split: "train" or "heldout".
        tests: of the built-in corpus, also the library's own tests (not every interpreter ships them).
        shuffled: in an order of no meaning, always the same, so that a part of them stands for the whole; of files and
            hub data sets as far as a buffer reaches.
        flag: that `data` came from, for messages.

    Raises:
        DataError: nothing is found under `data`.
    """
    if data in (None, BUILT_IN):
        return _stdlib(split, tests, shuffled)
    return (text for (text,) in _table(str(data), ("text",), split, flag, shuffled))


def pairs(data: str, source: str, target: str, split: Split, flag: str = "--data") -> Iterator[tuple[str, str]]:
    """Two columns of one split of `data`, which is as for `documents` but not the built-in corpus.

    Raises:
        DataError: nothing is found under `data`, or it lacks a column.
    """
    if data == BUILT_IN:
        raise DataError(f"{flag} {data} holds no pairs: give JSON lines, Parquet or a data set on the hub")
    return ((a, b) for a, b in _table(data, (source, target), split, flag, shuffled=split == "train"))


def check_data(data: str | None, flag: str = "--data") -> None:
    """Raises DataError when `documents` would find nothing, before any work is done for it."""
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        if next(documents(data, split, flag=flag), None) is None:
            raise DataError(f"{flag} {data}: no text in its {split} part")


def _table(data: str, columns: tuple[str, ...], split: Split, flag: str, shuffled: bool) -> Iterator[Row]:
    paths = _files(data)
    rows = _from_files(paths, columns, split, flag) if paths else _from_hub(data, columns, split, flag)
    return _shuffle(rows) if shuffled else rows


def _shuffle(rows: Iterator[Row]) -> Iterator[Row]:
    """Each time a random one of the next rows."""
    chance, held = random.Random(0), []
    for row in rows:
        held.append(row)
        if len(held) == SHUFFLED:
            at = chance.randrange(SHUFFLED)
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    chance.shuffle(held)
    yield from held


def _stdlib(split: Split, tests: bool, shuffled: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    left_out = {"site-packages", "dist-packages", "__pycache__"} | (set() if tests else {"test", "tests", "idle_test"})
    names = list(_python_files(root))
    if shuffled:
        random.Random(0).shuffle(names)
    for name in names:
        if not left_out.isdisjoint(name.split("/")[:-1]):
            continue
        held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0
        if held_out != (split == "heldout"):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"this Python ships no standard library source under {root}: give text with --data")


@cache  # it takes a while where many packages are installed beside it
def _python_files(root: Path) -> tuple[str, ...]:
    return tuple(path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py")))


def _files(data: str) -> list[str]:
    path = Path(data)
    if path.is_file():
        return [data]
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if any(c in data for c in "*?["):
        root = Path(path.anchor or ".")
        return sorted(str(p) for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
    return []


def _from_files(paths: list[str], columns: tuple[str, ...], split: Split, flag: str) -> Iterator[Row]:
    from datasets import load_dataset

    suffixes = {Path(p).suffix for p in paths}
    loaders = {LOADERS.get(s, "text") for s in suffixes}
    if len(loaders) > 1:
        raise DataError(f"{flag} names files of several kinds ({', '.join(sorted(suffixes))}); give one kind")
    loader = loaders.pop()
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        table: Any = load_dataset(loader, data_files=paths, split="train", streaming=True, **options)
        name = f"{flag} {paths[0]}"
        total = sum(1 for _ in islice(_rows(table, columns, name), HELD_OUT_EVERY))
        yield from _split(_rows(table, columns, name), split, few=total < HELD_OUT_EVERY)
    except DataError:
        raise
    except Exception as error:  # pyarrow, JSON and decoding errors share no base class
        raise DataError(f"{flag} {paths[0]} cannot be read: {one_line(error, 200)}") from error


def _from_hub(data: str, columns: tuple[str, ...], split: Split, flag: str) -> Iterator[Row]:
    from datasets import get_dataset_split_names, load_dataset

    name, _, config = data.partition(":")
    try:
        splits = get_dataset_split_names(name, config or None)
        held_out = next((s for s in ("validation", "test") if s in splits), None)
        source = held_out if split == "heldout" and held_out else "train"
        table: Any = load_dataset(name, config or None, split=source, streaming=True)
        rows = _rows(table, columns, f"{flag} {data}")
        yield from rows if held_out else _split(rows, split, few=False)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means: not readable
        raise DataError(
            f"{flag} {data} is no file, folder or glob here, and not readable as a data set on the hub: "
            f"{one_line(error, 200)}"
        ) from error


def _rows(table: Iterable[dict], columns: tuple[str, ...], name: str) -> Iterator[Row]:
    """The columns of a table, of the rows where none is blank."""
    for row in table:
        missing = next((column for column in columns if not isinstance(row.get(column), str)), None)
        if missing is not None:
            raise DataError(f'{name} has no column "{missing}" of text (columns: {", ".join(row)})')
        if all(row[column].strip() for column in columns):
            yield tuple(row[column] for column in columns)


def _split(rows: Iterable[Row], split: Split, *, few: bool) -> Iterator[Row]:
    """One row in HELD_OUT_EVERY is held out; of a few whole documents, the last tenth of each."""
    for i, row in enumerate(rows):
        if few and len(row) == 1:
            text = row[0]
            cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
            yield (text[cut:] if split == "heldout" else text[:cut],)
        elif (i % HELD_OUT_EVERY == 0) == (split == "heldout"):
            yield row
