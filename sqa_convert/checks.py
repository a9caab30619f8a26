"""What a checkpoint's files must be before a library opens them. Loads no library itself.

A checkpoint may come from anywhere. What is refused here would hang or fill the memory of what reads it (devices,
headers of gigabytes, pickles that unfold), or make it read or call what is not the checkpoint's own.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, one_line, shown

LARGEST_CONFIG = 10**6
"""bytes of config.json, which is copied again and again"""
LARGEST_INDEX = 16 * 10**6
LARGEST_HEADER = 16 * 10**6
"""bytes of a safetensors header, or of the pickle that lists a .bin file's tensors"""
LARGEST_CARRIED = 18 * 10**6
"""bytes of a tokenizer's file, and of all else that is carried over; mT5's has 16 million"""
MOST_NESTED = 10**6
"""lists and tables in one of these"""
MOST_TENSORS = 50_000
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


def regular_file(folder: Path, name: str, largest: int | None = None) -> Path | None:
    """A file of a checkpoint, None where it has none of that name.

    Raises:
        CheckpointError: it is a device or the like, a link to nothing or to what is not the checkpoint's own, or larger
            than `largest` bytes.
    """
    path = folder / name
    try:
        found, home = path.resolve(strict=True), folder.resolve()
        status = found.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {shown(str(path.readlink()), 300)}, where no file is; download the model again, "
                "or put the file itself there"
            ) from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # may not be looked at, a loop of links, a zero byte
        raise CheckpointError(f"{shown(str(path), 300)} cannot be read: {one_line(error)}") from error
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    linked = path.parent.resolve().is_relative_to(home)  # the file, not the folder that it is in
    if not found.is_relative_to(home) and not (linked and _may_lie_elsewhere(name, found)):
        raise CheckpointError(
            f"{path} is a link to {shown(str(found), 300)}, which is not the model's own; put the file itself there "
            f"(cp -rL copies a folder with what its links lead to)"
        )
    if largest is not None and status.st_size > largest:
        raise CheckpointError(f"{path} has {status.st_size:,} bytes, at most {largest:,} are read")
    return path


def _may_lie_elsewhere(name: str, target: Path) -> bool:
    """Whether a link out of the folder can be left to lead there.

    Weights can: of what is no table of tensors nothing gets into the result. Text that is copied, and perhaps
    published, must be the model's own: a blob of the hub's cache, or a file of the same name.
    """
    return name.endswith((".safetensors", ".bin")) or "blobs" in target.parent.parts or target.name == Path(name).name


def parse_json(text: str, *, unique: bool = False, names: bool = False) -> Any:
    """JSON as the standard has it: no NaN, no number beyond a float, no half of a character.

    Args:
        unique: an object's keys must all differ.
        names: it may hold names of files that are not UTF-8, as Python reads them.

    Raises:
        ValueError, RecursionError: it is none.
    """
    content = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_without_duplicates if unique else None,
    )
    if "\\ud" in text or "\\uD" in text:
        json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape" if names else "strict")
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"{shown(next(k for k, _ in pairs if k in seen or seen.add(k)))} stands there twice")  # type: ignore[func-returns-value]
    return content


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header, which is an object with keys that differ.

    Raises:
        CheckpointError: it is damaged, or too large.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is damaged or truncated: a header of {length:,} bytes in a file of {size:,}"
                )
            if length > LARGEST_HEADER:
                raise CheckpointError(f"{path}: its header has {length:,} bytes, at most {LARGEST_HEADER:,} are read")
            header = parse_json(file.read(length).decode(), unique=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged or truncated: its header is no JSON object")
    if len(header) > MOST_TENSORS + 1:  # with its metadata
        raise CheckpointError(f"{path} holds more than {MOST_TENSORS:,} tensors")
    return length + 8, header


def is_zip(path: Path) -> bool:
    """Whether torch will take a file for a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
