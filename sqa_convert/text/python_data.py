"""Data given from Python: texts, token ids, rows and batches, in lists, arrays, data sets and loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from .formats import TEXT_COLUMN
from .pretokenized import INPUT_IDS, token_ids

if TYPE_CHECKING:
    from .pretokenized import Ids

KINDS = "texts, token ids, rows of a table, or batches with input_ids"

TRAIN = "train"


def is_named(data: Any) -> bool:
    """Whether data are given by a name: of a file, a data set, the built-in corpus."""
    return data is None or isinstance(data, str | Path)


def repeatable(data: Any) -> Any:
    """Data that can be gone through again and give the same: of an iterator, and of a loader that shuffles, all of it.

    Of a table of pandas its rows, of a dict of parts each part so.
    """
    if isinstance(data, Path):
        return str(data)
    if parts(data) is not None:
        return {name: repeatable(part) for name, part in data.items()}
    if hasattr(data, "to_dict") and hasattr(data, "columns") and hasattr(data, "iloc"):
        return data.to_dict("records")
    return list(data) if isinstance(data, Iterator) or _is_shuffled(data) else data


def _is_shuffled(data: Any) -> bool:
    """Whether a DataLoader gives its rows in another order each time."""
    shuffling = ("RandomSampler", "WeightedRandomSampler", "SubsetRandomSampler")
    return type(getattr(data, "sampler", None)).__name__ in shuffling


def called(data: Any) -> str:
    """What data are called in reports and messages."""
    if is_named(data):
        return shown(str("stdlib" if data is None else data))
    if hasattr(data, "ndim"):
        return f"tokens {tuple(data.shape)}"
    kind = type(data).__name__
    try:
        count = f"{len(data):,}"
    except TypeError:
        return f"a given {kind}"
    return f"a given {kind} of {count}"


def parts(data: Any) -> Mapping[str, Any] | None:
    """The parts of data that have some, "train" among them, as a DatasetDict; else None.

    Raises DataError where they are names.
    """
    if not (isinstance(data, Mapping) and TRAIN in data):
        return None
    if any(isinstance(part, str | Path) for part in data.values()):
        raise DataError("the parts of data are given as objects, not by names: name a folder or a data set instead")
    return data


def stream(data: Any) -> Ids | None:
    """Token ids (N,) of one list, array or tensor; None where data are something else."""
    one = getattr(data, "ndim", 0) == 1 or (isinstance(data, list | tuple) and len(data) > 0 and _is_number(data[0]))
    return token_ids(data) if one else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0)


def table(data: Any, flag: str) -> Iterator[Mapping[str, Any]]:
    """Rows with a "text", with "input_ids", or with columns of their own. Raises DataError where there are none."""
    if isinstance(data, Mapping):
        yield from _rows(data, flag)
        return
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise DataError(f"{flag} is a {type(data).__name__}: give a name, or {KINDS}")
    for item in data:
        yield from _rows(item, flag)


def _rows(item: Any, flag: str) -> Iterator[Mapping[str, Any]]:
    """The rows of what data hold: a text, a row, or a batch of them."""
    if isinstance(item, str):
        yield {TEXT_COLUMN: item}
    elif hasattr(item, "keys"):
        yield from _of_batch(item) if _is_batch(item) else [item]
    elif token_ids(item) is not None:
        yield {INPUT_IDS: item}
    elif getattr(item, "ndim", 0) == 2:
        yield from ({INPUT_IDS: row} for row in item)
    elif isinstance(item, list | tuple) and len(item) == 1 and getattr(item[0], "ndim", 0) == 2:  # of a TensorDataset
        yield from ({INPUT_IDS: row} for row in item[0])
    else:
        raise DataError(f"{flag} holds a {type(item).__name__}: give {KINDS}")


def _is_batch(item: Any) -> bool:
    """Whether a column holds several rows."""
    column = _main_column(item)
    if hasattr(column, "ndim"):
        return bool(column.ndim == 2)
    return isinstance(column, list | tuple) and len(column) > 0 and token_ids(column) is None


def _main_column(item: Any) -> Any:
    """The tokens of a row or batch; where it has none, its first column of text."""
    if INPUT_IDS in item:
        return item[INPUT_IDS]
    values = [item[key] for key in item.keys()]  # noqa: SIM118 - no dict
    return next((v for v in values if isinstance(v, str) or (isinstance(v, list | tuple) and _holds_text(v))), None)


def _holds_text(values: list[Any] | tuple[Any, ...]) -> bool:
    return len(values) > 0 and isinstance(values[0], str)


def _of_batch(item: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a batch, of those columns that have a value for each."""
    count = len(_main_column(item))
    columns = {key: item[key] for key in item.keys() if _has(item[key], count)}  # noqa: SIM118 - no dict
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _has(column: Any, count: int) -> bool:
    if isinstance(column, str) or getattr(column, "ndim", 1) == 0:
        return False
    return hasattr(column, "__len__") and len(column) == count
