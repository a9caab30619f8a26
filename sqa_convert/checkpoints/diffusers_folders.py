"""Models that are part of something larger: pipelines of diffusers, whose parts and tokenizers lie in sub-folders."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from ..errors import CheckpointError, RecipeError, SQAError, shown
from ..families import completed, family_of
from .companions import CONFIG, read_quietly

PIPELINE = "model_index.json"
"""what a pipeline of diffusers has in the place of a config.json"""

_MOST_PARTS = 50

_MODELS_OWN = re.compile(
    r"(generation_)?config\.json|.*\.(safetensors|bin|index\.json|py)|README\.md"
    r"|(LICEN[CS]E|COPYING|NOTICE|USE_POLICY).*"
)
"""files that come from the model's folder where the tokenizer's is another"""

_OTHER_WEIGHTS = {
    "*-of-*.safetensors": "shards are read by their index, which is missing (model.safetensors.index.json)",
    "*-of-*.bin": "shards are read by their index, which is missing (pytorch_model.bin.index.json)",
    "model.*.safetensors": "load the model with from_pretrained(…, variant=…) once, and save it",
    "pytorch_model.*.bin": "load the model with from_pretrained(…, variant=…) once, and save it",
    "*.h5": "load the model with transformers 4 and from_tf=True once, and save it",
    "*.msgpack": "load the model with transformers 4 and from_flax=True once, and save it",
    "*.ckpt*": "load the weights into transformers' class once, and save the model",
    "*.gguf": "load the model with from_pretrained(…, gguf_file=…) once, and save it",
    "*.pth": "load the weights into transformers' class once, and save the model",
    "*.pt": "load the weights into transformers' class once, and save the model",
    "*.safetensors": "transformers reads weights by the name model.safetensors",
    "*.bin": "transformers reads weights by the name pytorch_model.bin",
}
"""what weights by other names are, by patterns of those, and the way out"""

_NO_MODEL = ("optimizer", "scheduler", "training_args", "rng_state", "random_states", "scaler", "adapter_")
"""how files begin that lie beside a model in training"""


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


def without_weights(folder: Path) -> str:
    """What to add about a folder with a config.json and no weights by the names that transformers reads."""
    for pattern, hint in _OTHER_WEIGHTS.items():
        for path in sorted(folder.glob(pattern)):
            if not path.name.startswith(_NO_MODEL):
                return f"; there is {shown(path.name)}: {hint}"
    return ""


def check_format(path: Path) -> None:
    """Raises CheckpointError where a file of weights is plainly of another format than its name says."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return  # who reads all of it says so
    if start.startswith(b"version https://git-lfs."):
        raise CheckpointError(f"{path} is what Git has in the place of the weights: fetch them with `git lfs pull`")
    safetensors = start[8:9] == b"{"
    if path.suffix == ".bin" and safetensors:
        raise CheckpointError(f"{path} is a safetensors file: give it that ending")
    if path.suffix == ".safetensors" and not safetensors and start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(f"{path} is a file of torch.save: give it the ending .bin")


def _converts(folder: Path) -> bool:
    try:
        config = read_quietly(folder, CONFIG)
        return isinstance(config, dict) and bool(family_of(completed(config)))
    except SQAError:  # whatever is wrong with it, it is not one to name
        return False


def part_of(name: str, subfolder: str) -> str:
    """The name of a part of a model, on the hub or here: NAME/SUBFOLDER. Raises RecipeError."""
    parts = Path(subfolder).parts
    if not parts or Path(subfolder).is_absolute() or ".." in parts:
        raise RecipeError(f"--subfolder {shown(subfolder)}: give the name of a folder inside {name}")
    return f"{name.rstrip('/')}/{'/'.join(parts)}"


def assembled(model: Path, tokenizer: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder of links to a model's files and to those of a tokenizer elsewhere, as libraries want it."""
    folder = tempfile.TemporaryDirectory(prefix="sqa-source-")
    for place, models_own in ((model, True), (tokenizer, False)):
        for path in place.resolve().iterdir():
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
