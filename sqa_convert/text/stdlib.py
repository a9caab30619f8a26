"""The built-in corpus: the running interpreter's standard library, each file a document."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..errors import DataError
from .splits import HELD_OUT_EVERY, Split


def stdlib(split: Split, tests: bool, shuffled: bool) -> Iterator[str]:
    """Files of one split, which a hash of each name decides; arguments as of `documents`. Raises DataError."""
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    left_out = {"site-packages", "dist-packages", "__pycache__"} | (set() if tests else {"test", "tests", "idle_test"})
    for name in sorted(_python_files(root, frozenset(left_out)), key=_digest if shuffled else None):
        held_out = _digest(name)[0] % HELD_OUT_EVERY == 0
        if held_out != (split == "heldout"):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"this Python ships no standard library source under {root}: give text with --data")


def _digest(name: str) -> bytes:
    """What splits and orders files depends on nothing but their names."""
    return hashlib.sha256(name.encode()).digest()


@cache
def _python_files(root: Path, left_out: frozenset[str]) -> tuple[str, ...]:
    names = []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        names += [(Path(here) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return tuple(names)
