"""Sources of tensors: a list of them without reading any, then one at a time or piece by piece."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .checks import MOST_TENSORS, check_pickle, is_zip, read_header
from .errors import CheckpointError, one_line, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

PIECE = 2**20
"""bytes handed on at a time"""
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
"""safetensors' names of the dtypes a checkpoint may hold: torch's names and bytes"""
FLOATING = ("F64", "F32", "F16", "BF16")
_EXPONENTS = {
    "F64": ("u8", 0x7FF0_0000_0000_0000), "F32": ("u4", 0x7F80_0000), "F16": ("u2", 0x7C00), "BF16": ("u2", 0x7F80),
}  # fmt: skip
"""unsigned integers of the same size, and the bits that are all set in what is no number"""
_LONGEST_NAME = 500
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
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Source(ABC):
    """A model to convert: its config and its tensors, read one at a time."""

    name: str
    """as the user gave it"""
    revision: str | None = None
    """commit on the hub, where it came from there"""
    folder: Path | None = None
    """where tokenizer and generation config lie"""
    config: dict[str, Any]
    index: dict[str, TensorInfo]
    stamps: Mapping[Path, Stamp] = MappingProxyType({})
    """of its files, from before they were first read"""

    concurrent = True
    """whether several threads may read at a time"""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and not shared with anything.

        Raises:
            CheckpointError: it cannot be read.
        """

    def pieces(self, name: str) -> Iterator[memoryview]:
        """One tensor's bytes, in order; each piece is good until the next is asked for. Raises CheckpointError."""
        yield as_bytes(self.read(name))

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is read in the block is all of one state of the files.

        Raises:
            CheckpointError: a file has changed since the source was opened, whatever else that led to.
        """
        try:
            yield
        except Exception as error:
            self._check_unchanged(error)
            raise
        self._check_unchanged()

    def _check_unchanged(self, consequence: Exception | None = None) -> None:
        for path, known in self.stamps.items():
            if (found := stamp(path)) != known:
                what = "was removed" if found is None else "was changed"
                raise CheckpointError(f"{path} {what} while it was read") from consequence


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of safetensors' name."""
    import torch

    return getattr(torch, DTYPES[name][0])


def dtype_name(dtype: torch.dtype) -> str | None:
    """safetensors' name of torch's dtype; None for one that no checkpoint may hold."""
    return next((name for name, (torch_name, _) in DTYPES.items() if str(dtype) == f"torch.{torch_name}"), None)


def as_bytes(tensor: Tensor) -> memoryview:
    """What a safetensors file holds of a tensor on the CPU; shares its memory where that is contiguous."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def as_tensor(data: memoryview, dtype: str) -> Tensor:
    """The flat tensor of safetensors' `dtype` that these bytes hold; shares their memory."""
    import torch

    return torch.frombuffer(data, dtype=torch_dtype(dtype)) if len(data) else torch.empty(0, dtype=torch_dtype(dtype))


def check_finite(data: memoryview, dtype: str, name: str, where: str) -> None:
    """Raises CheckpointError where the bytes of tensor `name` of `where` hold what is no number. Needs no torch."""
    import numpy as np

    if dtype in _EXPONENTS:
        unsigned, exponent = _EXPONENTS[dtype]
        for start in range(0, len(data), PIECE):  # small enough to stay in the processor's cache
            if (np.frombuffer(data[start : start + PIECE], unsigned) & exponent).max() == exponent:
                raise CheckpointError(f"{where}: {name} holds NaN or infinite values (in {DTYPES[dtype][0]})")


def indexed(entries: Iterable[tuple[Any, Any, Any, str]], where: str) -> dict[str, TensorInfo]:
    """The index of tensors whose names, shapes, dtypes and files a source tells.

    Raises:
        CheckpointError: a name stands there twice or cannot be shown, a shape is none, or there are too many.
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
    def read(self, name: str) -> Tensor:
        raise CheckpointError(f"{name} was not downloaded")


class SafetensorsSource(Source):
    def __init__(self, folder: Path, files: list[str]) -> None:
        self._files = {file: folder / file for file in files}
        self._open: tuple[str, Any] = ("", None)
        self._places: dict[str, tuple[int, int]] = {}
        """where each tensor's bytes begin and end in its file"""
        self.index = indexed(self._entries(), str(folder))

    def _entries(self) -> Iterator[tuple[str, Any, Any, str]]:
        """What the headers tell, in the order in which the files hold it."""
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

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self.index[name].file
        known, handle = self._open
        try:
            if known != file:
                # pread, not mmap: mapped pages would count as this process's memory until the file is closed
                handle = safe_open(self._files[file], framework="pt", backend="pread")
                self._open = (file, handle)
            return handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read from {file}: {one_line(error)}") from error

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Through one small buffer, which stays in the processor's cache: a tensor's own memory would have to be made
        first, which takes longer than reading. Needs no torch."""
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
        self.index = indexed(self._entries(), str(folder))

    def _entries(self) -> Iterator[tuple[str, Any, str, str]]:
        for file, path in self._files.items():
            check_pickle(path)
            left = path.stat().st_size
            for entry in _described(self._load(file), file, str(path)):
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

    def read(self, name: str) -> Tensor:
        content = self._load(self.index[name].file)
        self._check_unchanged()  # reading beyond the end of a mapped file would end the process
        return content[name].detach().clone()


class ModelSource(Source):
    """A model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = model.config.name_or_path or type(model).__name__
        self.config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        self.generation_config = getattr(model, "generation_config", None)
        self._tensors = model.state_dict()
        self.index = indexed(_described(self._tensors, "memory", self.name), self.name)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu().clone()

    def pieces(self, name: str) -> Iterator[memoryview]:
        yield as_bytes(self._tensors[name].detach().cpu())


def _described(tensors: Mapping[str, Tensor], file: str, where: str) -> Iterator[tuple[str, Any, str, str]]:
    """What `indexed` takes, of tensors in memory. Of several that are one and the same only the first: ties are
    stored once."""
    import torch

    seen: set[tuple[int, tuple[int, ...]]] = set()
    for key, tensor in tensors.items():
        name = dtype_name(tensor.dtype) if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided else None
        if name is None or tensor.is_meta:
            raise CheckpointError(f"{where}: {shown(key)} is no dense tensor of a known dtype")
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if identity not in seen or tensor.numel() == 0:
            seen.add(identity)
            yield key, tuple(tensor.shape), name, file
