"""Rows of a file of text, JSON, CSV, Parquet or Arrow, compressed or not, a part of it in memory at a time."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from ..errors import DataError, one_line, shown
from .pretokenized import INPUT_IDS, MASK

TEXT_COLUMN = "text"

LINE_COLUMN = "line"
"""of plain text: each line that is not blank is a row"""

PIECE = 2**20
"""characters of text that are one row, about; of a longer text each piece ends with a line"""

_TEXT = (
    ".txt .text .md .markdown .rst .html .htm .xml .tex .log .srt .vtt .org .adoc .wiki .tokens .raw "
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .bash .r .jl .scala .kt "
    ".swift .cs .lua .sql .hs .ml .lisp .clj .el .f90 .asm .css .yaml .yml .toml .ini .cfg .conf .dart"
)

_BATCH = 1000  # rows turned into Python's objects at a time

_COLUMNS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}

_KINDS = {ending: kind for kind, endings in _COLUMNS.items() for ending in endings}

_BYTE_ORDER_MARKS = (  # the longest first, of which another is the beginning
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _arrow_stream(codec: str) -> Callable[[Any], Any]:
    def open_stream(file: IO[bytes]) -> io.BufferedReader:
        from pyarrow import CompressedInputStream

        return io.BufferedReader(CompressedInputStream(file, codec))

    return open_stream


_COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _arrow_stream("zstd"),
    ".lz4": _arrow_stream("lz4"),
}

ALLOWED = (
    f"{', '.join(sorted(_KINDS))}, text such as .txt, .md, .html or source code, each also with "
    f"{', '.join(_COMPRESSIONS)} after it, or no ending"
)


def ending(path: Path) -> str:
    """Of a file's name, in lower case, without its compression's."""
    if path.suffix.lower() in _COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower().strip()


def kind_of(path: Path) -> str | None:
    """ "text", "json", "csv", "parquet" or "arrow", by the file's name alone; None where the name says neither."""
    found = ending(path)
    return "text" if found in _TEXT.split() or found in ("", ".") else _KINDS.get(found)


def rows(path: Path, columns: Sequence[str], flag: str) -> Iterator[Mapping[str, Any]]:
    """The rows of one file, with the columns asked for at least; plain text has the column "text", or "line".

    Raises:
        DataError: the file cannot be read, or its format tells that it has no such column.
    """
    name = f"{flag} {shown(str(path))}"
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{name}: files that end with {shown(ending(path))} are not read (these are: {ALLOWED})")
    try:
        with path.open("rb") as file:
            decompress = _COMPRESSIONS.get(path.suffix.lower())
            with file if decompress is None else decompress(file) as content:
                yield from _READERS[kind](content, path, columns, name)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} cannot be read: it is no UTF-8 text ({one_line(error, 100)}); iconv or an editor can make it that"
        ) from error
    except Exception as error:  # compression, pyarrow, pandas and JSON errors share no base class
        raise DataError(f"{name} cannot be read: {one_line(error, 200)}") from error


def missing_column(columns: Sequence[str], known: Sequence[str], name: str) -> DataError | None:
    """The error that there is no such column, where there is none."""
    missing = next((column for column in columns if column not in known), None)
    if missing is None:
        return None
    if not known:
        return DataError(f'{name}: its rows have no columns; of JSON each has to be {{"{missing}": "…"}}')
    way_out = "; --text-column names another" if len(columns) == 1 else ""
    return DataError(f'{name} has no column "{missing}" of text (columns: {", ".join(map(str, known))}){way_out}')


def _columns_read(columns: Sequence[str], known: Sequence[str], name: str) -> list[str]:
    """The columns asked for; of a table without text its tokens. With tokens, what says which are padding.

    Raises DataError where there are none.
    """
    if tuple(columns) == (TEXT_COLUMN,) and TEXT_COLUMN not in known and INPUT_IDS in known:
        columns = (INPUT_IDS,)
    if error := missing_column(columns, known, name):
        raise error
    return [*columns, MASK] if INPUT_IDS in columns and MASK in known else list(columns)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """All of a text, cut at ends of lines where there are any; a piece has at most twice `size` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size, start + 2 * size) + 1 or min(start + 2 * size, len(text))
        yield text[start:end]
        start = end


def _decoded(content: Any, newline: str | None = None) -> TextIO:
    """Text as its byte order mark says, else UTF-8; the mark is no part of it."""
    begin = content.peek(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if begin.startswith(mark)), "utf-8")
    return io.TextIOWrapper(content, encoding=encoding, newline=newline)


def _text(content: Any, path: Path, columns: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    _columns_read(columns, [TEXT_COLUMN, LINE_COLUMN], name)
    text = _decoded(content)
    while tuple(columns) == (LINE_COLUMN,) and (line := text.readline(PIECE)):
        yield {LINE_COLUMN: line.rstrip("\r\n")}
    while piece := text.read(PIECE):
        yield {TEXT_COLUMN: piece + text.readline(PIECE)}


def _json(content: Any, path: Path, columns: Sequence[str], name: str) -> Iterator[Mapping[str, Any]]:
    """A row a line; of a ".json" that is not so, a list of rows or a table of columns."""
    lines = _decoded(content)
    number, first = next(((i, line) for i, line in enumerate(lines, 1) if line.strip()), (0, ""))
    if not first:
        return
    if ending(path) == ".json" and not _is_row(first):
        yield from _whole(json.loads(first + lines.read()))
        return
    yield _row(first, number)
    yield from (_row(line, at) for at, line in enumerate(lines, number + 1) if line.strip())


def _is_row(line: str) -> bool:
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and not _is_table(content)


def _is_table(content: dict[str, Any]) -> bool:
    return bool(content) and all(isinstance(column, list) for column in content.values())


def _row(line: str, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    return row if isinstance(row, dict) else {}


def _whole(content: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, dict) and _is_table(content):
        content = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    for row in content if isinstance(content, list) else [content]:
        yield row if isinstance(row, dict) else {}


def _csv(content: Any, path: Path, columns: Sequence[str], name: str) -> Iterator[Mapping[str, Any]]:
    import pandas

    options: dict[str, Any] = {
        "sep": "\t" if ending(path) == ".tsv" else ",",
        "dtype": str,
        "keep_default_na": False,
        "na_values": [""],
    }
    try:
        table = pandas.read_csv(_decoded(content, newline=""), chunksize=_BATCH, index_col=False, **options)
    except pandas.errors.EmptyDataError:
        return
    with table:
        for part in table:
            yield from part[_columns_read(columns, list(part.columns), name)].to_dict("records")


def _parquet(content: Any, path: Path, columns: Sequence[str], name: str) -> Iterator[Mapping[str, Any]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(_seekable(content))
    wanted = _columns_read(columns, table.schema_arrow.names, name)
    for batch in table.iter_batches(batch_size=_BATCH, columns=wanted):
        yield from batch.to_pylist()


def _arrow(content: Any, path: Path, columns: Sequence[str], name: str) -> Iterator[Mapping[str, Any]]:
    """As a stream, which is what `datasets` writes, or a file."""
    from pyarrow import ArrowInvalid, ipc

    content = _seekable(content)
    try:
        reader: Any = ipc.open_stream(content)
        batches: Any = reader
    except ArrowInvalid:
        content.seek(0)
        reader = ipc.open_file(content)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    wanted = _columns_read(columns, reader.schema.names, name)
    for batch in batches:
        batch = batch.select(wanted)
        for start in range(0, batch.num_rows, _BATCH):
            yield from batch.slice(start, _BATCH).to_pylist()


def _seekable(content: Any) -> Any:
    """A compressed file is read as a whole where a reader goes back and forth in it."""
    return content if isinstance(getattr(content, "raw", None), io.FileIO) else io.BytesIO(content.read())


_READERS: dict[str, Callable[..., Iterator[Mapping[str, Any]]]] = {
    "text": _text,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
