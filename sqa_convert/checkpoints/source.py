"""The tensors of a checkpoint: names and shapes first, then one at a time or piece by piece."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, one_line, shown
from .dtypes import DTYPES, PIECE, check_finite, decode, decoded_dtype, dtype_name, tensor_bytes
from .pickle_check import check_pickle
from .untrusted import MOST_TENSORS, is_zip, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from .dtypes import Array

_LONGEST_NAME = 500

IN_MEMORY = "memory"

_MOST_DIMENSIONS = 64  # numpy's limit


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a source tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as "F32" """
    file: str


Stamp = tuple[int, int, int, int] | None
"""of a file: changes when the file does; None where there is none"""


def stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Source(ABC):
    """A model to convert: its config and its tensors, read one at a time."""

    name: str
    """as the user gave it"""
    revision: str | None = None
    """commit on the hub, where it came from there"""
    folder: Path | None = None
    """where tokenizer and generation config lie"""
    assembled: TemporaryDirectory[str] | None = None
    """that folder, where it was made of several"""
    kept: object = None
    """another temporary folder that is needed as long as this is"""
    config: dict[str, Any]
    index: dict[str, TensorInfo]
    twins: Mapping[str, str] = MappingProxyType({})
    """names left out of the index, because the tensor is one with another in memory, and that one's name"""
    notes: tuple[str, ...] = ()
    """on how it was found, in sentences"""
    stamps: Mapping[Path, Stamp] = MappingProxyType({})
    """of its files, from before they were first read"""

    concurrent = True
    """whether several threads may read at a time"""

    @property
    def files(self) -> list[str]:
        """The files that hold the tensors; none of a model in memory."""
        return sorted({info.file for info in self.index.values()} - {IN_MEMORY})

    @abstractmethod
    def pieces(self, name: str) -> Iterator[memoryview]:
        """One tensor's bytes, in order; each piece is good until the next is asked for. Raises CheckpointError."""

    def read(self, name: str) -> Array:
        """One tensor's numbers, in memory of their own: float32, or float64 where they are stored so.

        Raises:
            CheckpointError: they cannot be read, or are not finite.
        """
        import numpy as np

        info = self.index[name]
        numbers, at = np.empty(math.prod(info.shape), decoded_dtype(info.dtype)), 0
        for piece in self.pieces(name):
            check_finite(piece, info.dtype, name, self.name)
            count = len(piece) // DTYPES[info.dtype][1]
            decode(piece, info.dtype, numbers[at : at + count])
            at += count
        return numbers.reshape(info.shape)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers. Raises CheckpointError."""
        import numpy as np

        if self.index[name].dtype != self.index[other].dtype:
            return np.array_equal(self.read(name), self.read(other))
        pairs = zip(self.pieces(name), self.pieces(other), strict=True)
        return all(np.array_equal(np.frombuffer(one, "u1"), np.frombuffer(two, "u1")) for one, two in pairs)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """The files stay as they are while the block reads them.

        Raises:
            CheckpointError: a file has changed since the source was opened; even if the block fails in another way.
        """
        try:
            yield
        except Exception as error:
            self._check_unchanged(error)
            raise
        self._check_unchanged()

    def _check_unchanged(self, consequence: Exception | None = None) -> None:
        for path, known in self.stamps.items():
            if (now := stamp(path)) != known:
                what = "was removed" if now is None else "was changed"
                raise CheckpointError(f"{path} {what} while it was read") from consequence


def indexed(entries: Iterable[tuple[Any, Any, Any, str]], where: str) -> dict[str, TensorInfo]:
    """The index of a source's tensors, from their names, shapes, dtypes and files.

    Raises:
        CheckpointError: a name is no tensor's or stands there twice, a shape is none, or there are too many tensors.
    """
    index: dict[str, TensorInfo] = {}
    for name, shape, dtype, file in entries:
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
            raise CheckpointError(
                f"{where}: {shown(name)} is no tensor's name; they are printable, of at most {_LONGEST_NAME} characters"
            )
        if name == "__metadata__" or not isinstance(dtype, str):
            raise CheckpointError(f"{where}: {name} is no tensor")
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) > _MOST_DIMENSIONS
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(n or 1 for n in shape) >= 2**60  # of 8 bytes each
        ):
            raise CheckpointError(f"{where}: {name} has the shape {shown(shape)}, which no tensor can have")
        if name in index:
            raise CheckpointError(f"{where}: {name} stands in {index[name].file} and in {file}")
        if len(index) == MOST_TENSORS:
            raise CheckpointError(f"{where} holds more than {MOST_TENSORS:,} tensors")
        index[name] = TensorInfo(tuple(shape), dtype, file)
    return index


class HeadersSource(Source):
    def pieces(self, name: str) -> Iterator[memoryview]:
        raise CheckpointError(f"{name} was not downloaded")


class SafetensorsSource(Source):
    def __init__(self, folder: Path, files: list[str]) -> None:
        self._files = {file: folder / file for file in files}
        self._places: dict[str, tuple[int, int]] = {}
        """where each tensor's bytes begin and end in its file"""
        self.index = indexed(self._entries(), str(folder))

    def _entries(self) -> Iterator[tuple[str, Any, Any, str]]:
        """Entries of the headers, in the order of the files' tensors."""
        from safetensors import SafetensorError, safe_open

        for file, path in self._files.items():
            begin, header = read_header(path)
            try:
                with safe_open(path, framework="numpy", backend="pread") as handle:  # finds holes and overlaps
                    names = handle.offset_keys()
            except (SafetensorError, OSError, MemoryError) as error:  # it maps the file, whatever its size
                raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error
            for name in names:
                entry = header[name]
                start, end = entry["data_offsets"]
                yield name, entry["shape"], entry["dtype"], file
                self._places[name] = begin + start, begin + end

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Through one small buffer, which stays in the processor's cache.

        To allocate memory for a whole tensor takes longer than to read it.
        """
        file = self.index[name].file
        path = self._files[file]
        view = memoryview(bytearray(PIECE))
        try:
            with path.open("rb", buffering=0) as stream:
                start, end = self._places[name]
                stream.seek(start)
                while start < end:
                    count = min(PIECE, end - start)
                    filled = 0
                    while filled < count:
                        got = stream.readinto(view[filled:count])
                        if not got:
                            raise CheckpointError(f"{path} was cut off while it was read")
                        filled += got
                    start += count
                    yield view[:count]
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{name} cannot be read from {file}: {one_line(error)}") from error


class PickleSource(Source):
    """`.bin` files, through `torch.load(weights_only=True)`: pickled code never runs."""

    concurrent = False

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._files = {file: folder / file for file in files}
        self._loaded: tuple[str, Mapping[str, Tensor]] = ("", {})
        self.twins = self._twins = dict[str, str]()
        self.index = indexed(self._entries(), str(folder))

    def _entries(self) -> Iterator[tuple[str, Any, str, str]]:
        for file, path in self._files.items():
            check_pickle(path)
            left = path.stat().st_size
            for entry in described(self._load(file), file, str(path), self._twins):
                left -= math.prod(entry[1]) * DTYPES[entry[2]][1]
                if left < 0:  # one number can stand for a tensor of any size
                    raise CheckpointError(
                        f"{path}: its tensors are larger than the file; save the model as safetensors"
                    )
                yield entry

    def _load(self, file: str) -> Mapping[str, Tensor]:
        import pickle
        import warnings

        import torch

        path = self._files[file]
        if self._loaded[0] != file:
            try:
                # Only the zip format can be mapped; the oldest hub files are plain pickles.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about what it is going to refuse
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{path} is refused: it is damaged or holds more than weights (pickled code is never run); "
                    "save the model as safetensors"
                ) from error
            except Exception as error:  # a damaged pickle fails in any way it likes
                raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error
            if not isinstance(content, Mapping):
                raise CheckpointError(f"{path} holds a {type(content).__name__}, not a table of tensors")
            self._loaded = (file, content)
        return self._loaded[1]

    def pieces(self, name: str) -> Iterator[memoryview]:
        content = self._load(self.index[name].file)
        self._check_unchanged()  # reading beyond the end of a mapped file would end the process
        yield from cut(tensor_bytes(content[name].detach().clone()))


def cut(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def described(
    tensors: Mapping[str, Tensor], file: str, where: str, twins: dict[str, str]
) -> Iterator[tuple[str, Any, str, str]]:
    """What `indexed` takes, of tensors in memory.

    Of names that share one tensor only the first: ties are stored once. The others go to `twins`.
    """
    import torch

    seen: dict[object, str] = {}
    for key, tensor in tensors.items():
        name = dtype_name(tensor.dtype) if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided else None
        if name is None or tensor.is_meta:
            raise CheckpointError(f"{where}: {shown(key)} is no dense tensor of a known dtype")
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), name)
        if identity in seen and tensor.numel():
            twins[key] = seen[identity]
        else:
            seen[identity] = key
            yield key, tuple(tensor.shape), name, file
