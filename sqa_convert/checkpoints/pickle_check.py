"""What a .bin file must be before torch opens it: a table of tensors and nothing else."""

from __future__ import annotations

import os
import pickletools
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, one_line, shown
from .untrusted import LARGEST_HEADER, MOST_TENSORS, is_zip

_MOST_OPERATIONS = 1_000_000  # of a pickle; a tensor takes about 60

_DEEPEST = 16  # tuples in tuples

_MOST_ENTRIES = 2 * MOST_TENSORS  # of a zip file

_NUMBERS = re.compile(r"[^/]+/data/\d+")  # of a zip file's names, those of what is not read whole

_OPERATIONS = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINGET", "LONG_BINGET",
    "BINPUT", "LONG_BINPUT",
}  # fmt: skip
"""of a pickle: what torch.save writes for a table of tensors"""

_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (\w+Storage|b?float\d+|u?int\d+|bool)"
)

_ONCE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT"}
"""what torch.save never writes a second reference to, and bombs are made of"""

_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
"""operations that leave on the stack what they change"""


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
    try:
        tarfile.TarInfo.frombuf(start[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:
        pass
    else:
        raise CheckpointError(f"{path} is a tar file, which is not supported; save the model as safetensors")
    rest = memoryview(start)
    for _ in range(5):  # a magic number, a version, the system's sizes, the table, the order of what follows
        rest = rest[_check_operations(bytes(rest), path) :]


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
    stack: list[tuple[str, int]] = []  # what made it, and how deeply tuples are nested in it
    below: list[list[tuple[str, int]]] = []  # stacks under the marks
    memo: dict[Any, tuple[str, int]] = {}

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is refused: {why} (pickled code is never run); save the model as safetensors")

    try:
        for count, (operation, argument, position) in enumerate(pickletools.genops(data)):
            name = operation.name
            if count == _MOST_OPERATIONS:
                raise refuse(f"it takes more than {count:,} steps to read")
            if name not in _OPERATIONS:
                raise refuse(f"it holds more than weights: {name}")
            if name == "MARK":
                below.append(stack)
                stack = []
                continue
            if name == "STOP":
                return (position or 0) + 1
            if name.endswith("PUT"):
                memo[argument] = stack[-1]
                continue
            if name.endswith("GET"):
                if memo[argument][0] in _ONCE:
                    raise refuse("it refers to one list, table or tuple twice")
                stack.append(memo[argument])
                continue
            if pickletools.markobject in operation.stack_before:
                taken, stack = stack, below.pop()  # all above the mark
                kept = operation.stack_before.index(pickletools.markobject)
            else:
                taken, kept = [], len(operation.stack_before)
            if kept > len(stack):
                raise ValueError(f"{name} without its arguments")
            if kept:
                taken = stack[-kept:] + taken
                del stack[-kept:]
            if name == "REDUCE" and " " not in taken[0][0]:
                raise refuse("it calls what is no function")
            if name == "GLOBAL":
                name = str(argument)
                if not _GLOBALS.fullmatch(name):
                    raise refuse(f"{shown(name.replace(' ', '.', 1))} makes no dense tensor")
            if name.startswith("TUPLE"):
                depth = 1 + max((depth for _, depth in taken), default=0)
                if depth > _DEEPEST:
                    raise refuse("its tuples are nested too deeply")
                stack.append((name, depth))
            elif name in _FILLS:
                stack.append(taken[0])
            elif operation.stack_after:
                stack.append((name, 0))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise refuse(f"it is damaged ({one_line(error, 100)})") from error
    raise refuse("it has no end")
