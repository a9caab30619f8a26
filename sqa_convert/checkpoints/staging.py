"""Writing a folder so that it appears whole or not at all, and never replaces what is not ours."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, OutputError, SQAError, one_line, shown
from .small_files import REPORT, is_ours, read_json, sync

NOWHERE = "the folder you are in is not there any more: change to one that is"

_STAGED, _REPLACED = ".sqa-partial", ".sqa-replaced"

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)

_HERE, _RENAME_EXCHANGE = -100, 2  # as in Linux's headers


def expanded(path: str | Path, flag: str = "--output") -> Path:
    """A path with `~` replaced by the home folder. Raises OutputError."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, TypeError) as error:  # no such user, no path
        raise OutputError(f"{flag} {shown(str(path))}: {one_line(error)}") from error


def here() -> bool:
    """Whether the working directory is still there."""
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def check_output(
    output: Path, overwrite: bool, flag: str = "--output", way_out: str = "give another, or --overwrite"
) -> None:
    """Raises OutputError unless a folder may be put at `output`; of one that exists the message ends with `way_out`."""
    try:
        path = output.resolve()
        if path == Path.cwd() or path in Path.cwd().parents or os.path.ismount(path):
            raise OutputError(f"{flag} {output} is the folder you are in, one above it, or a mount; give one inside")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{flag} {output} is a file")
        holds_something = path.exists() and any(path.iterdir())
        if holds_something and not overwrite:
            raise OutputError(f"{flag} {output} exists already: {way_out}")
        if holds_something and not _made_here(path):
            raise OutputError(f"{flag} {output} holds what sqa-convert did not write, so --overwrite is refused")
        parent = next(folder for folder in path.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{flag} {output}: {parent} cannot be written to")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, SQAError):
            raise
        if not here():
            raise OutputError(NOWHERE) from error
        raise OutputError(f"{flag} {shown(str(output), 200)} cannot be used: {one_line(error)}") from error


def _made_here(folder: Path) -> bool:
    try:
        return is_ours(read_json(folder / REPORT, ""))
    except CheckpointError:
        return False


def hold(folder: Path) -> int | None:
    """Makes a folder, or takes over one that is there, and keeps every other process from doing so.

    Returns:
        A descriptor to close when done with it: the lock goes with the process, however that ends. None where the file
        system knows no locks.

    Raises:
        BlockingIOError: another process holds the folder.
        OSError: it cannot be made.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if os.name != "posix":
            return None
        with contextlib.suppress(FileNotFoundError):  # another process was done with it, and took it away
            descriptor = os.open(folder, _FOLDER)
            try:
                locked = _lock(descriptor)
                if locked and _is(folder, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if not locked:
                return None


def empty(folder: Path, last: str = "") -> None:
    """Removes what is in a folder, the file named `last` after all else. The folder stays, with its lock.

    Raises OSError.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is(folder: Path, descriptor: int) -> bool:
    """Whether a folder is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Takes a lock; False where there are none. Raises BlockingIOError when another process has it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def staged_output(output: Path, overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it, complete, when the block ends; else nothing is left.

    A run that is killed leaves it behind; the next to the same output clears it away. Two at a time do not go on.

    Args:
        output: where the folder shall be.
        overwrite: whether an existing folder is replaced, if it was made here.
        size: bytes that will be written, to refuse a disk that is too full before starting.

    Raises:
        OutputError: `output` exists or cannot be written, another run writes it, or the disk is or gets full.
    """
    check_output(output, overwrite)
    path = output.resolve()
    with _writing(output), folder_above(path, output), _staging_folder(path, output) as staging:
        check_output(output, overwrite)  # another run may have ended meanwhile
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OutputError(f"--output {output}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        staging.chmod(0o777 & ~umask())
        yield staging
        _put_in_place(staging, path, overwrite)


@contextlib.contextmanager
def folder_above(path: Path, output: Path) -> Iterator[None]:
    """Makes the folder that `path` shall lie in. If the block fails, all that were made go again."""
    missing = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    try:
        with _making(output):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _staging_folder(path: Path, output: Path) -> Iterator[Path]:
    """An empty folder beside `path` that no other run writes to. What lies in its place after the block is removed."""
    staging, lock = path.with_name(f".{path.name}{_STAGED}"), None
    try:
        with _making(output):
            lock = hold(staging)
            if lock is None:  # no locks here: under a name of its own no other run finds it
                with contextlib.suppress(OSError):
                    staging.rmdir()
                staging = Path(tempfile.mkdtemp(prefix=f"{staging.name}-", dir=path.parent))
            empty(staging)
            _settle(path)
        yield staging
    finally:
        if lock is not None:
            os.close(lock)
        _clear(staging)


@contextlib.contextmanager
def _making(output: Path) -> Iterator[None]:
    """Raises OutputError where the file system does not let us begin."""
    try:
        yield
    except BlockingIOError as error:
        raise OutputError(f"--output {output}: another run is writing it") from error
    except OSError as error:
        raise OutputError(f"--output {output} cannot be made: {one_line(error)}") from error


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Raises OutputError where the file system does not let us go on."""
    try:
        yield
    except SQAError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"--output {output}: the disk is full; nothing half-written was kept") from error
        raise OutputError(f"--output {output} cannot be written: {one_line(error)}") from error


def umask() -> int:
    """The permissions that new files and folders do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _clear(folder: Path) -> None:
    """Removes a temporary folder, unless another run has taken it over."""
    if os.name != "posix":
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, _FOLDER)
        try:
            _lock(descriptor)
            if _is(folder, descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _settle(output: Path) -> None:
    """Finishes the replacing of `output` where a run was killed amid it."""
    aside = output.with_name(f".{output.name}{_REPLACED}")
    if not output.exists() and aside.exists():
        aside.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(staging: Path, output: Path, overwrite: bool) -> None:
    for path in (*staging.rglob("*"), staging):
        if path.is_file() or (path.is_dir() and os.name == "posix"):
            sync(path)
    check_output(output, overwrite)  # something may have come there since the start
    if not output.exists():
        staging.rename(output)
    elif not _exchange(staging, output):
        aside = output.with_name(f".{output.name}{_REPLACED}")
        try:
            output.rename(aside)
            staging.rename(output)
        except BaseException:
            if aside.exists() and not output.exists():
                aside.rename(output)  # else the next run does it
            raise
        shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is in place, if perhaps not after a power cut
        sync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change places at once; False where the system cannot. Raises OSError."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8. A byte of a file name that is not UTF-8 becomes a question mark."""
    path.write_text(text, encoding="utf-8", errors="replace")
