"""Models that are part of something larger: pipelines of diffusers, whose parts and tokenizers lie in sub-folders."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from .checks import LARGEST_CONFIG, parse_json, regular_file
from .errors import RecipeError, SQAError, shown
from .families import completed, family_of

PIPELINE = "model_index.json"
"""what a pipeline of diffusers has in the place of a config.json"""
_MOST_PARTS = 50
_MODELS_OWN = re.compile(r"(generation_)?config\.json|.*\.(safetensors|bin|index\.json|py)|README\.md|LICENSE.*")
"""files that come from the model's folder where the tokenizer's is another"""


def without_config(name: str, folder: Path) -> str:
    """Why a folder without a config.json is no source, and which of its sub-folders are."""
    said = f"{name} holds no config.json, so it is no model folder"
    parts, tokenizers = [], []
    inside = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    for path in inside[:_MOST_PARTS]:
        if _converts(path):
            parts.append(path.name)
        if "tokenizer" in path.name:
            tokenizers.append(path.name)
    if parts:
        said = f"{name} holds no config.json, but parts that convert: --subfolder {' or '.join(map(shown, parts))}"
        said += f" (and --tokenizer {' or '.join(map(shown, tokenizers))})" if tokenizers else ""
    elif (folder / PIPELINE).is_file():
        said = f"{name} is a pipeline of diffusers, and none of its parts is a model that converts"
    return said


def _converts(folder: Path) -> bool:
    try:
        path = regular_file(folder, "config.json", LARGEST_CONFIG)
        config = None if path is None else parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            return False
        family_of(completed(config))
    except (SQAError, OSError, ValueError, RecursionError):  # whatever is wrong with it, it is not one to name
        return False
    return True


def part_of(name: str, subfolder: str) -> str:
    """The name of a part of a model, on the hub or here: as of a folder in a folder. Raises RecipeError."""
    parts = Path(subfolder).parts
    if not parts or Path(subfolder).is_absolute() or ".." in parts:
        raise RecipeError(f"--subfolder {shown(subfolder)}: give the name of a folder inside {name}")
    return f"{name.rstrip('/')}/{'/'.join(parts)}"


def assembled(model: Path, tokenizer: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder as a library reads it, of links to a model's files and to those of a tokenizer elsewhere."""
    folder = tempfile.TemporaryDirectory(prefix="sqa-source-")
    for origin, models_own in ((model, True), (tokenizer, False)):
        for path in origin.resolve().iterdir():
            if bool(_MODELS_OWN.fullmatch(path.name)) != models_own:
                continue
            target = Path(folder.name) / path.name
            if path.is_dir():  # a link to a folder would lead out of this one
                target.mkdir()
                for file in path.iterdir():
                    (target / file.name).symlink_to(file)
            else:
                target.symlink_to(path)
    return folder
