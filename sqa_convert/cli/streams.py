"""Printing that never fails: no terminal, pipe or encoding takes back the exit code of work that is done."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

NARROWEST = 40
"""columns; what claims to have fewer, as COLUMNS=0, does not know how many it has"""
_SIZES = {"COLUMNS": NARROWEST, "TERMINAL_WIDTH": NARROWEST, "LINES": 4}
_FRAMES = dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩┳╇╭╮╰╯", "+") | dict.fromkeys("─━", "-") | dict.fromkeys("│┃", "|")
_PLAIN = str.maketrans(_FRAMES | {"→": "->", "←": "<-", "…": "...", "×": "x", "·": "-", "−": "-", "²": "2"})
_GONE = (errno.EPIPE, errno.EBADF)  # nobody is there who would want to know


class ForgivingStream:
    """A text stream: what it cannot show is replaced, and what it cannot take is dropped.

    Args:
        stream: where text goes, None nowhere.
        complain_to: is told once why the rest is dropped, if somebody may want to know.
    """

    def __init__(self, stream: Any, complain_to: ForgivingStream | None = None) -> None:
        self._stream, self._complain_to = stream, complain_to
        self._broken = stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return not self._broken and bool(self._stream.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                self._write(text)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._break(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            known = text.translate(_PLAIN).encode(self.encoding, "replace")
            self._stream.write(known.decode(self.encoding))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._break(error)

    def _break(self, error: Exception) -> None:
        self._broken = True
        with contextlib.suppress(Exception):
            number = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)  # what is buffered still goes somewhere, or Python fails when it ends
            os.close(null)
        if self._complain_to is not None and getattr(error, "errno", None) not in _GONE:
            self._complain_to.write(f"the rest cannot be printed: {error}\n")


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Within the block printing never fails, and an impossible size of the terminal is ignored."""
    _occupy_closed_descriptors()
    streams, sizes = (sys.stdout, sys.stderr), dict(os.environ)
    stderr = ForgivingStream(sys.stderr)
    sys.stdout, sys.stderr = ForgivingStream(sys.stdout, stderr), stderr
    unlikely = [name for name, least in _SIZES.items() if name in sizes and not _is_at_least(sizes[name], least)]
    for name in unlikely:
        del os.environ[name]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        os.environ.update({name: sizes[name] for name in unlikely})


def _is_at_least(text: str, least: int) -> bool:
    return text.isdecimal() and least <= int(text) < 10**6


def _occupy_closed_descriptors() -> None:
    """Opens the null device in their place, which the next file, perhaps of weights, would take otherwise."""
    with contextlib.suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
