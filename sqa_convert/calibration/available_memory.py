"""What memory there is for this process: what is free of the machine's, within its container's limit"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""of control groups of version 2, and of version 1: the folder they are in, the files that tell the limit and what is
used, and what of that is given up when asked: files that were read"""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take, beside what it has."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_groups(root)]))


def memory_of_process() -> int:
    """Bytes that this process has."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group leaves that this process is in; none outside of Linux."""
    for folder, limit, used, given_up in _groups(root):
        try:
            most = (folder / limit).read_text().strip()
            if most.isdigit():  # else "max"
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(most) - int((folder / used).read_text()) + int(counts.get(given_up, 0))
        except (OSError, ValueError):
            continue


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The folder of each group, the names of its files, and of what is given up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind in _FILES:
            inside, *files = _FILES[kind]
            parts = Path(path.lstrip("/")).parts  # in a container perhaps the host's, of which only the top is there
            for count in range(len(parts), -1, -1):
                limit, used, given_up = files
                yield root.joinpath("sys/fs/cgroup", inside, *parts[:count]), limit, used, given_up
