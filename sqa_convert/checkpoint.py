"""Checkpoints on disk: find a source, list its tensors, read one at a time, write shards, publish a folder at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, OutputError, RecipeError, SQAError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SAMPLES = Path(__file__).parent / "samples"
SAMPLE_PREFIX = "sample:"
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""safetensors' names of the dtypes a checkpoint may hold, and their bytes"""
FLOATING = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
"""a folder without any of these has no tokenizer"""
TOKENIZER_CONFIG = "tokenizer_config.json"
CARRIED_FILES = (
    *TOKENIZER_FILES,
    TOKENIZER_CONFIG,
    *(["generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"]),
    *("LICENSE", "LICENSE.txt"),
)
"""files of the source that the result needs as they are"""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a source tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as "F32" """
    file: str


class Source(ABC):
    """A model to convert: its config and its tensors, read one at a time."""

    name: str
    """as the user gave it"""
    revision: str | None = None
    """commit on the hub, where it came from there"""
    folder: Path | None = None
    """where tokenizer and generation config lie"""
    config: dict[str, Any]
    index: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and not shared with anything.

        Raises:
            CheckpointError: it cannot be read.
        """


def open_source(name: str, revision: str | None = None) -> Source:
    """A hub id, a folder, or "sample:gpt2" / "sample:t5".

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is damaged.
    """
    folder, commit = resolve(name, revision)
    config = _read_json(folder / "config.json", f"{name} holds no config.json, so it is no model folder")
    index_file = next((folder / f for f in _INDEXES if (folder / f).is_file()), None)
    if index_file is not None:
        weight_map = _read_json(index_file, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_file}: no weight_map")
        files = sorted(set(map(str, weight_map.values())))
    else:
        weight_map = None
        files = [f for f in _SINGLES if (folder / f).is_file()][:1]
        if not files:
            raise CheckpointError(f"{name}: no weights ({', '.join(_SINGLES)} or their sharded forms) in {folder}")
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index_file}: {file!r} lies outside the folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{name}: {file} is missing from {folder}")
    source: Source
    source = _SafetensorsSource(folder, files) if files[0].endswith(".safetensors") else _PickleSource(folder, files)
    missing = sorted(set(weight_map or ()) - set(source.index))
    if missing:
        raise CheckpointError(f"{name}: {missing[0]} stands in the index but in none of the files")
    source.name, source.revision, source.folder, source.config = name, commit, folder, config
    return source


def resolve(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a model and, from the hub, its commit; what is not cached yet is downloaded."""
    if name.startswith(SAMPLE_PREFIX):
        folder = SAMPLES / name.removeprefix(SAMPLE_PREFIX)
        if not (folder / "config.json").is_file():
            known = ", ".join(SAMPLE_PREFIX + p.parent.name for p in sorted(SAMPLES.glob("*/config.json")))
            raise CheckpointError(f"{name}: no such sample; there are {known}")
        return folder, None
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise RecipeError(
                f"--revision {revision}: {name} is a folder here, and only models on the hub have revisions"
            )
        return path, None
    if path.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such folder")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(*weights: str) -> Path:
        patterns = ["config.json", *CARRIED_FILES, *weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch("model*.safetensors", _INDEXES[0])
        if not any(folder.glob("model*.safetensors")):
            folder = fetch("pytorch_model*.bin", _INDEXES[1])
    except HFValidationError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a hub id like gpt2 or google-t5/t5-small"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(f"{name} is gated: ask for access on the hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} (--revision)") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a folder here nor a model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is no folder here, and not in the local cache while the hub is offline or out of reach"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} could not be downloaded: {_one_line(error)}") from error
    return folder, folder.name if folder.parent.name == "snapshots" else None


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _SafetensorsSource(Source):
    def __init__(self, folder: Path, files: list[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder, self.index = folder, {}
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                with safe_open(folder / file, framework="numpy", backend="pread") as handle:
                    for key in handle.offset_keys():
                        entry = handle.get_slice(key)
                        if key in self.index:
                            raise CheckpointError(f"{folder}: {key} stands in {self.index[key].file} and in {file}")
                        self.index[key] = TensorInfo(tuple(entry.get_shape()), str(entry.get_dtype()), file)
            except (SafetensorError, OSError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{folder / file} is damaged or truncated: {_one_line(error)}") from error

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self.index[name].file
        try:
            if file not in self._handles:
                assert self.folder is not None
                # pread, not mmap: mapped pages would count as this process's memory until the file is closed
                self._handles = {file: safe_open(self.folder / file, framework="pt", backend="pread")}
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} cannot be read from {file}: {_one_line(error)}") from error


class _PickleSource(Source):
    """`.bin` files, through `torch.load(weights_only=True)`: pickled code never runs."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        import torch

        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        names |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8"}
        self.folder, self.index = folder, {}
        self._loaded: tuple[str, Mapping[str, Tensor]] = ("", {})
        for file in files:
            tensors = self._load(file)
            for key, tensor in tensors.items():
                if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or tensor.dtype not in names:
                    raise CheckpointError(f"{folder / file}: {key!r} is no tensor of a known dtype")
            for key, tensor in without_ties(tensors).items():
                self.index[key] = TensorInfo(tuple(tensor.shape), names[tensor.dtype], file)

    def _load(self, file: str) -> Mapping[str, Tensor]:
        import pickle
        import zipfile

        import torch

        assert self.folder is not None
        path = self.folder / file
        if self._loaded[0] != file:
            try:
                # Only the zip format can be mapped; the oldest hub files are plain pickles.
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{path} is refused: it holds more than weights (pickled code is never run); "
                    "save the model as safetensors"
                ) from error
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged or truncated: {_one_line(error)}") from error
            if not isinstance(content, Mapping):
                raise CheckpointError(f"{path} holds a {type(content).__name__}, not a table of tensors")
            self._loaded = (file, content)
        return self._loaded[1]

    def read(self, name: str) -> Tensor:
        return self._load(self.index[name].file)[name].clone()


class ModelSource(Source):
    """A model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        import torch

        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self.name = model.config.name_or_path or type(model).__name__
        self.config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        self._tensors = without_ties(model.state_dict())
        self.index = {
            n: TensorInfo(tuple(t.shape), names.get(t.dtype, "U8"), "memory") for n, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu().clone()


def without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that are one and the same in memory only the first: tied weights are stored once."""
    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        kept.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return {name: tensors[name] for name in kept.values()}


def check_output(output: Path, overwrite: bool) -> None:
    """Raises OutputError unless a folder can be put at `output`."""
    if output.exists():
        if not output.is_dir():
            raise OutputError(f"--output {output} is a file")
        if any(output.iterdir()) and not overwrite:
            raise OutputError(f"--output {output} exists already: give another, or --overwrite")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--output {output}: {parent} cannot be written to")


@contextlib.contextmanager
def staged_output(output: Path, overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it, complete, when the block ends; else nothing is left.

    Args:
        output: where the folder shall be.
        overwrite: whether an existing folder is replaced.
        size: bytes that will be written, to refuse a disk that is too full before starting.

    Raises:
        OutputError: `output` exists or cannot be written, or the disk is or gets full.
    """
    check_output(output, overwrite)
    made = [p for p in (output.absolute().parent, *output.absolute().parents) if not p.exists()]
    staging = None
    try:
        try:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.absolute().parent))
        except OSError as error:
            raise OutputError(f"--output {output} cannot be made: {_one_line(error)}") from error
        free = shutil.disk_usage(output.absolute().parent).free
        if free < size:
            raise OutputError(f"--output {output}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        staging.chmod(0o777 & ~_umask())
        yield staging
        _publish(staging, output.absolute())
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:  # deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"--output {output}: the disk is full; nothing was kept") from error
        if isinstance(error, OSError) and not isinstance(error, SQAError):
            raise OutputError(f"--output {output} cannot be written: {_one_line(error)}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _publish(staging: Path, output: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not output.exists():
        staging.rename(output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent)) / output.name
    output.rename(replaced)
    try:
        staging.rename(output)
    except BaseException:
        replaced.rename(output)
        raise
    finally:
        shutil.rmtree(replaced.parent, ignore_errors=True)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file. Raises OSError with ENOSPC when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors writes files only their owner can read
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, _one_line(error)) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carry_files(source: Path, output: Path, tokenizer_class: str) -> None:
    """Copies tokenizer, generation config and licence, as far as the source has them.

    Args:
        tokenizer_class: of the family. The oldest hub folders do not name it, for the model type told it all; the
            result has a model type that transformers does not know.
    """
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if any((output / name).is_file() for name in TOKENIZER_FILES):
        path = output / TOKENIZER_CONFIG
        settings = _read_json(path, "") if path.is_file() else {}
        if not settings.get("tokenizer_class"):
            write_json(path, settings | {"tokenizer_class": tokenizer_class})
