"""Writing safetensors files tensor by tensor, and reading again what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, one_line
from .dtypes import DTYPES, PIECE
from .small_files import sync
from .staging import umask

if TYPE_CHECKING:
    from torch import Tensor

    from ..conversion.plan import OutputTensor

_WRITTEN = PIECE // 2  # bytes at a time: Linux copies larger ones into larger pages, at a third of the speed


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file. Raises OSError with the system's error number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # safetensors writes files only their owner can read
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, one_line(error)) from error


class ShardWriter:
    """A safetensors file written tensor by tensor, in any order, while none of it is held.

    The library writes whole files from tensors in memory; a shard of 2 GB would need as much. What is written can be
    checked against what lies on the disk, by a checksum of each tensor.
    """

    def __init__(self, path: Path, tensors: Iterable[OutputTensor], checked: bool) -> None:
        """Makes the file in its full size, with its header; `checked` is what `verify` needs. Raises OSError."""
        self.path, self.checked = path, checked
        self._writing = threading.Lock()  # the kernel lets one write at a time, and the others wait at full speed
        self._fresh = False
        self.sums: dict[str, int] = {}
        """CRC-32 of each tensor written"""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][1]):  # so that each starts aligned
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._begin = len(self._head)
        self._size = self._begin + end
        self._places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        with path.open("xb") as file:
            file.write(self._head)
            file.truncate(self._size)

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Writes a tensor's bytes, piece after piece; threads may write different ones. Raises OSError."""
        start, end = self._places[name]
        at, checksum = start, 0
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._begin + start)
            for data in pieces:
                if self.checked:
                    checksum = zlib.crc32(data, checksum)
                at += len(data)
                while data:
                    with self._writing:
                        written = file.write(data[:_WRITTEN])
                    self._fresh = True
                    data = data[written:]
        if at != end:
            raise OSError(errno.EIO, f"{name}: {end - at} bytes are missing")
        self.sums[name] = checksum

    def flush(self) -> None:
        """Puts on the disk what was written since the last time. Raises OSError."""
        if self._fresh:
            self._fresh = False
            sync(self.path)

    def verify(self) -> str:
        """Reads the whole file again; returns its SHA-256. Raises CheckpointError where it is not what was written."""
        digest, checksums = hashlib.sha256(), dict.fromkeys(self._places, 0)
        ends = iter(sorted((end, name) for name, (start, end) in self._places.items() if start < end))
        with self.path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise CheckpointError(f"{self.path.name} has not the size that was written; is the disk sound?")
            head = file.read(self._begin)
            if head != self._head:
                raise CheckpointError(f"{self.path.name}: its header is not what was written; is the disk sound?")
            digest.update(head)
            at, end, name = 0, 0, ""
            while data := file.read(PIECE):
                digest.update(data)
                left = memoryview(data)
                while left:
                    if at == end:
                        end, name = next(ends)
                    part = left[: end - at]
                    checksums[name] = zlib.crc32(part, checksums[name])
                    at, left = at + len(part), left[len(part) :]
        for name, checksum in checksums.items():
            if self.sums.get(name) != checksum:
                raise CheckpointError(f"{self.path.name}: {name} was not written as computed; is the disk sound?")
        return digest.hexdigest()


@contextlib.contextmanager
def flushing(writers: Iterable[ShardWriter], every: float = 0.2) -> Iterator[None]:
    """Every so many seconds puts on the disk what they write in the block, so that less is left for the end.

    Raises:
        OSError: that failed. The system tells of it once only.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(every):
            for writer in writers:
                if not done.is_set():
                    writer.flush()

    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
        flushed.result()
