"""Which files a name means: a file, a folder, a pattern, or a data set that `datasets` saved to disk."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, one_line, shown
from .formats import ending, kind_of

_NOTES = (
    "readme license licence copying notice citation changelog authors dataset_info dataset_infos dataset_dict state"
)
"""names, without ending, of what tells about the data it lies beside"""


def located(data: str) -> Path:
    """The path that is meant: what exists under the name as it stands, else with its `~` replaced."""
    path = Path(data)
    if data.startswith("~") and not os.path.lexists(path):
        with contextlib.suppress(RuntimeError):  # there is no such user
            return path.expanduser()
    return path


def files_of(data: str, flag: str) -> list[Path]:
    """The files that are meant, all of one kind; none where `data` is no file, folder or pattern that fits any.

    What exists under a name is meant by it, whatever characters it has; only what does not exist is a pattern. A file
    that is found under several names, by links, counts once.

    Raises:
        DataError: the files are of several kinds, the folder is empty, or what is named is no regular file.
    """
    if not data.strip():
        raise DataError(f"{flag} is empty: give a file, a folder, a pattern, or ID[:CONFIG] of a data set on the hub")
    path = located(data)
    try:
        paths = _found(path)
    except OSError as error:  # a folder that may not be looked into, a name too long for one
        raise DataError(f"{flag} {shown(data)} cannot be read: {one_line(error, 200)}") from error
    if paths is None:
        raise DataError(f"{flag} {shown(data)} is a folder without files (hidden ones do not count)")
    if not paths and os.path.lexists(path):
        what = "no regular file, and can be read only once: write the text to one" if path.exists() else "a broken link"
        raise DataError(f"{flag} {shown(data)} is {what}")
    if len(paths) > 1:
        paths = [p for p in paths if not _is_note(p)] or paths
    kinds = Counter(kind_of(p) or ending(p) for p in paths)
    if len(kinds) > 1:
        raise DataError(_several(data, paths, kinds, flag))
    return paths


def _found(path: Path) -> list[Path] | None:
    """Nothing under the name: no files; a folder without files: None."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _saved_table(path) or _inside(path) or None
    if not glob.has_magic(str(path)):
        return []
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - which does not leave out hidden files
    return _each_once(map(Path, names))


def saved_splits(data: str) -> dict[str, list[Path]]:
    """Of a folder that `DatasetDict.save_to_disk` wrote, the files of each split; of anything else nothing."""
    folder = located(data)
    names = _content(folder / "dataset_dict.json").get("splits") or ()
    return {name: _saved_table(folder / name) for name in names}


def _saved_table(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` wrote, in the order of its rows."""
    files = _content(folder / "state.json").get("_data_files") or ()
    return [folder / file["filename"] for file in files]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _inside(folder: Path) -> list[Path]:
    """All files in a folder and its folders, linked ones too, but for hidden ones and what is in hidden ones."""
    paths, seen, root = list[Path](), set[Path](), folder.resolve()
    for here, folders, files in os.walk(folder, followlinks=True):
        place = Path(here).resolve()
        if place in seen or (place != root and root.is_relative_to(place)):  # a link that leads back
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(here, name) for name in files if not name.startswith(".")]
    return _each_once(paths)


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """The regular files among them, in order, each by the first of its names."""
    known: dict[Path, Path] = {}
    for path in sorted(path for path in paths if path.is_file()):
        known.setdefault(path.resolve(), path)
    return list(known.values())


def _is_note(path: Path) -> bool:
    """Whether a file tells about data: README.md, and names such as _SUCCESS and _metadata that Hadoop writes."""
    name = path.name
    return name.partition(".")[0].lower() in _NOTES.split() or (name.startswith("_") and "." not in name)


def _several(data: str, paths: Sequence[Path], kinds: Counter[str], flag: str) -> str:
    endings = sorted({ending(p) or "none" for p in paths})
    kind = kinds.most_common(1)[0][0]
    suffix = next(p.suffix for p in paths if kind in (kind_of(p), ending(p)))
    folder = located(data)
    within = (glob.escape(str(folder)), "**") if folder.is_dir() else (str(folder.parent),)
    return (
        f"{flag} {shown(data)} names files of several kinds (endings: {', '.join(endings)}); "
        f"choose one kind with a pattern, such as {flag} '{shown(str(Path(*within, f'*{suffix}')))}'"
    )


def beginnings_of(path: str) -> list[str]:
    """The lines of a file that are not blank. Raises DataError where it cannot be read."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--calibration-prompts {shown(path)} cannot be read: {one_line(error)}") from error
    return [line for line in text.splitlines() if line.strip()]
