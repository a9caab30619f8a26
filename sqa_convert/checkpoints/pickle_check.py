"""What a .bin file must be before torch opens it: a table of tensors and nothing else."""

from __future__ import annotations

import os
import pickletools
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import CheckpointError, one_line, shown
from .untrusted import LARGEST_HEADER, MOST_TENSORS, is_zip

_MOST_OPERATIONS = 1_000_000  # of a pickle; a tensor takes about 60

_DEEPEST = 16  # tuples in tuples

_MOST_ENTRIES = 2 * MOST_TENSORS  # of a zip file

_NUMBERS = re.compile(r"[^/]+/data/\d+")  # of a zip file's names, those of what is not read whole

_CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
}  # fmt: skip
"""operations of a pickle that put one value on the stack and need none"""

_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (\w+Storage|b?float\d+|u?int\d+|bool)"
)

_ONCE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT"}
"""what torch.save never writes a second reference to, and bombs are made of"""


def check_pickle(path: Path) -> None:
    """Raises CheckpointError unless a `.bin` file is a table of tensors as torch.save writes it, of either format.

    torch's own reader runs no code of a pickle, but a pickle can still make it fill the memory, never end, or crash.
    """
    try:
        if is_zip(path):
            _check_archive(path)
            return
        with path.open("rb") as file:
            start = file.read(LARGEST_HEADER)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails in any way it likes
        raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error
    if _is_tar(start):
        raise CheckpointError(f"{path} is a tar file, which is not supported; save the model as safetensors")
    rest = memoryview(start)
    for _ in range(5):  # a magic number, a version, the system's sizes, the table, the order of what follows
        rest = rest[_check_operations(bytes(rest), path) :]


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        if _directory_size(file) > LARGEST_HEADER:
            raise CheckpointError(f"{path}: the zip file's directory has more than {LARGEST_HEADER:,} bytes")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}  # torch looks names up in any case
        if len(entries) > _MOST_ENTRIES or len(names) < len(entries):
            raise CheckpointError(f"{path} is refused: the zip file has duplicate or more than {_MOST_ENTRIES:,} names")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise CheckpointError(f"{path} is refused: {shown(entry.filename)} is compressed")
            if not _NUMBERS.fullmatch(entry.filename) and entry.file_size > LARGEST_HEADER:
                raise CheckpointError(
                    f"{path}: {shown(entry.filename)} has {entry.file_size:,} bytes, allowed are {LARGEST_HEADER:,}"
                )
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(f"{path} is a TorchScript program, which is not supported; save the model's weights")
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):
                _check_operations(archive.read(entry), path)


def _directory_size(file: BinaryIO) -> int:
    """Bytes of a zip file's directory. Raises ValueError where readers could disagree on which one it is."""
    end = file.seek(0, os.SEEK_END) - 22
    file.seek(max(0, end - 20))
    tail = file.read()
    if end < 0 or tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise ValueError("no directory at its end")
    size, begin = struct.unpack("<II", tail[-10:-2])
    if tail[:4] == b"PK\x06\x07" and len(tail) == 42:
        end = int.from_bytes(tail[8:16], "little")
        file.seek(end)
        record = file.read(56)
        if record[:4] != b"PK\x06\x06":
            raise ValueError("no directory at its end")
        size, begin = struct.unpack("<QQ", record[40:])
    if begin + size != end:
        raise ValueError("its directory is not where it should be")
    return size


def _check_operations(data: bytes, path: Path) -> int:
    """Follows one pickle without building anything; returns its length. Raises CheckpointError."""
    machine = _Machine()
    try:
        for count, (operation, argument, position) in enumerate(pickletools.genops(data)):
            if count == _MOST_OPERATIONS:
                raise _NotWeightsError(f"it takes more than {count:,} steps to read")
            if operation.name == "STOP":
                return (position or 0) + 1
            machine.step(operation.name, argument)
    except _NotWeightsError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise _refusal(path, f"it is damaged ({one_line(error, 100)})") from error
    raise _refusal(path, "it has no end")


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is refused: {why} (pickled code is never run); save the model as safetensors")


class _NotWeightsError(Exception):
    """A pickle does what no table of tensors needs."""


class _Value(NamedTuple):
    """What is known of a value on the stack."""

    origin: str
    """the operation that put it there; of a GLOBAL its module and name, with a blank between"""
    depth: int = 0
    """of tuples nested in it"""


class _Machine:
    """The unpickler's stack and memo, with values that are never built."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.below: list[list[_Value]] = []  # the stacks under the marks
        self.memo: dict[Any, _Value] = {}

    def step(self, name: str, argument: Any) -> None:
        """Raises _NotWeightsError for what torch.save never writes, ValueError or LookupError for damage."""
        match name:
            case "PROTO":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._refer(self.memo[argument])
            case "GLOBAL":
                self._look_up(argument)
            case "TUPLE":
                self._nest(name, self._above_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._nest(name, self._take(name, int(name[-1])))
            case "BINPERSID":
                self._take(name, 1)
                self.stack.append(_Value(name))
            case "REDUCE":
                function, _ = self._take(name, 2)
                self._call(function)
            case "APPEND" | "BUILD":  # into the value below, which stays
                self.stack.append(self._take(name, 2)[0])
            case "SETITEM":
                self.stack.append(self._take(name, 3)[0])
            case "APPENDS" | "SETITEMS":
                self._above_mark()
                self.stack.append(*self._take(name, 1))
            case _ if name in _CONSTANTS:
                self.stack.append(_Value(name))
            case _:
                raise _NotWeightsError(f"it holds more than weights: {name}")

    def _take(self, name: str, count: int) -> list[_Value]:
        """The operands of an operation, off the stack. Raises ValueError where there are fewer."""
        if count > len(self.stack):
            raise ValueError(f"{name} without its arguments")
        operands = self.stack[-count:]
        del self.stack[-count:]
        return operands

    def _above_mark(self) -> list[_Value]:
        """All that was put on the stack since the last mark, off it. Raises IndexError without a mark."""
        operands, self.stack = self.stack, self.below.pop()
        return operands

    def _refer(self, value: _Value) -> None:
        if value.origin in _ONCE:
            raise _NotWeightsError("it refers to one list, table or tuple twice")
        self.stack.append(value)

    def _look_up(self, module_and_name: str) -> None:
        if not _GLOBALS.fullmatch(module_and_name):
            raise _NotWeightsError(f"{shown(module_and_name.replace(' ', '.', 1))} makes no dense tensor")
        self.stack.append(_Value(module_and_name))

    def _nest(self, name: str, members: list[_Value]) -> None:
        depth = 1 + max((member.depth for member in members), default=0)
        if depth > _DEEPEST:
            raise _NotWeightsError("its tuples are nested too deeply")
        self.stack.append(_Value(name, depth))

    def _call(self, function: _Value) -> None:
        if " " not in function.origin:
            raise _NotWeightsError("it calls what is no function")
        self.stack.append(_Value("REDUCE"))
