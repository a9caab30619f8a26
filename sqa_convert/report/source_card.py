"""What the result's card takes over from the source's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoints.companions import CARD
from ..checkpoints.untrusted import LARGEST_CONFIG, regular_file

TAKEN_OVER = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""entries of the card's metadata"""

_METADATA = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.{,100000}?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)

_MOST_WORDS = 100  # of one entry

_NOTHING = ("", "~", "null")


def source_card(folder: Path) -> dict[str, Any]:
    """What the result's card takes over from the one in `folder`; empty where that has none that can be read."""
    try:
        path = regular_file(folder, CARD, LARGEST_CONFIG)
        metadata = None if path is None else _METADATA.match(path.read_text(encoding="utf-8"))
        if metadata is None:
            return {}
        import yaml

        # Every word stays one: to YAML `no`, which is Norwegian, is a boolean, and some data sets are numbers.
        data = yaml.load(metadata[1], Loader=yaml.BaseLoader)
        return {key: words for key in TAKEN_OVER if (words := _plain(data.get(key)))}
    except Exception:  # whatever it is, a card is no reason to stop
        return {}


def _plain(value: Any) -> str | list[str] | None:
    """A word, or those of a list that are words: an entry that is none does not cost the others."""
    if not isinstance(value, list):
        return value if _is_word(value) else None
    return [word for word in value if _is_word(word)] if len(value) <= _MOST_WORDS else None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value not in _NOTHING and value.isprintable() and len(value) <= 300
