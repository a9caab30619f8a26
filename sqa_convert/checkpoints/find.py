"""Find a checkpoint: a hub id, a folder or a sample, its config and its weight files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RecipeError, SQAError, one_line, shown
from ..families import completed
from ..flags_as_arguments import names_arguments
from .adapters import ADAPTER, refuse_adapter
from .companions import (
    CONFIG,
    GENERATION_CONFIG,
    ON_THE_HUB,
    TOKENIZER_FILES,
    check_companions,
    companions,
    has_tokenizer,
)
from .diffusers_folders import PIPELINE, assembled, check_format, part_of, without_config, without_weights
from .pickle_check import check_pickle
from .small_files import is_folder, read_config, read_json
from .source import HeadersSource, PickleSource, SafetensorsSource, Source, Stamp, indexed, stamp
from .untrusted import LARGEST_CONFIG, LARGEST_INDEX, MOST_TENSORS, regular_file

SAMPLES = Path(__file__).parent.parent / "samples"

SAMPLE_PREFIX = "sample:"

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""where a folder's weights may stand, in the order in which transformers looks for them"""

_TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.jinja", *TOKENIZER_FILES)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Accept = Callable[[dict[str, Any]], object]
"""is given config.json before any weight is fetched; raises when there is no point in going on"""


def open_source(
    name: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    tokenizer: str | None = None,
    accept: Accept = lambda config: None,
    headers_only: bool = False,
) -> Source:
    """A hub id, a folder, or "sample:gpt2" / "sample:t5"; a folder inside one by ID/FOLDER, or by `subfolder`.

    Args:
        subfolder: of a pipeline of several models, the one meant.
        tokenizer: where it lies if not beside the weights: a folder beside the model's, any folder, or a hub id.
        accept: called with config.json before weights are looked for, or downloaded.
        headers_only: of a model on the hub that has safetensors, fetch only shapes and dtypes; then `read` fails.

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is damaged.
    """
    if subfolder is not None:
        name = part_of(name, subfolder)
    source: Source | None = None
    stamps: dict[Path, Stamp] = {}
    if (folder := local_folder(name, revision)) is not None:
        refuse_adapter(name, folder)
        commit, stamps = None, _stamps(folder)
        config = source_config(name, folder)
        accept(config)
    else:
        folder, commit = _download(name, revision, CONFIG, ADAPTER)
        refuse_adapter(name, folder)
        if not (folder / CONFIG).is_file():
            _download(name, revision, PIPELINE, "*/config.json")  # to say which parts there are
        config = source_config(name, folder)
        accept(config)
        revision = commit or revision  # all of one commit, also when the branch moves meanwhile
        source = _hub_headers(name, revision) if headers_only else None
        if source is None:
            patterns = (*ON_THE_HUB, "model*.safetensors", _WEIGHTS[1])
            folder, commit = _download(name, revision, *patterns)
            if not any(folder.glob("model*.safetensors")):
                folder, commit = _download(name, revision, "pytorch_model*.bin", _WEIGHTS[3])
    if source is None:
        check_companions(folder)
        stamps = stamps or _stamps(folder)
        files = _weight_files(name, folder)
        stamps |= {folder / file: stamp(folder / file) for file in files}
        source = (SafetensorsSource if files[0].endswith(".safetensors") else PickleSource)(folder, files)
        source.stamps = stamps
        source.notes = _passed_over(folder, files)
    source.name, source.revision, source.folder, source.config = name, commit, folder, config
    if tokenizer is not None:
        source.assembled = assembled(folder, tokenizer_folder(tokenizer, name, folder, revision))
        source.folder = Path(source.assembled.name)
    return source


def tokenizer_folder(tokenizer: str, name: str = "", folder: Path | None = None, revision: str | None = None) -> Path:
    """The folder that `tokenizer` means, for the model `name` in `folder` or one in memory. Raises CheckpointError."""
    beside = None if folder is None else folder.absolute().parent / tokenizer
    place = beside if beside is not None and is_folder(beside) else local_folder(tokenizer)
    if place is None and folder is not None and local_folder(name) is None and _hub_place(name)[1]:
        beside, _ = _download(f"{_hub_place(name)[0]}/{tokenizer}", revision, *_TOKENIZER_PATTERNS)
        place = beside if beside.is_dir() else None
    place = place or _download(tokenizer, None, *_TOKENIZER_PATTERNS)[0]
    if not has_tokenizer(place):
        raise CheckpointError(f"--tokenizer {tokenizer}: {place} holds no tokenizer")
    check_folder(place)
    return place


def _stamps(folder: Path) -> dict[Path, Stamp]:
    return {folder / file: stamp(folder / file) for file in (CONFIG, *_WEIGHTS, *companions(folder))}


@names_arguments
def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a whole model, downloaded where it has to be.

    Args:
        name: a hub id, a folder, "sample:gpt2" or "sample:t5".
        revision: of a hub id.

    Raises:
        CheckpointError: it is missing, out of reach, or holds files that are not fit to be opened.
    """
    folder = local_folder(name, revision)
    if folder is None:
        folder = open_source(str(name), revision).folder
        assert folder is not None
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises CheckpointError unless a model folder's files are fit for the libraries that read them."""
    regular_file(folder, CONFIG, LARGEST_CONFIG)
    check_companions(folder)
    if any((folder / candidate).is_file() for candidate in _WEIGHTS):
        for file in _weight_files(str(folder), folder):
            if file.endswith(".bin"):
                check_pickle(folder / file)


def local_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a sample or a path, None for what can only be a hub id."""
    name = str(name)
    if name.startswith(SAMPLE_PREFIX):
        folder = SAMPLES / name.removeprefix(SAMPLE_PREFIX)
        if not (folder / CONFIG).is_file():
            known = ", ".join(SAMPLE_PREFIX + p.parent.name for p in sorted(SAMPLES.glob("*/config.json")))
            raise CheckpointError(f"{name}: no such sample; there are {known}")
        return folder
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            if revision is not None:
                raise RecipeError(
                    f"--revision {revision}: {name} is a folder here; only models on the hub have revisions"
                )
            return path
        if path.exists():
            raise CheckpointError(f"{name} is a file; give the folder that holds it")
    except (OSError, RuntimeError) as error:  # too long a name, a parent that may not be read, no such user
        if isinstance(error, SQAError):
            raise
        raise CheckpointError(f"{name[:200]} cannot be looked at: {one_line(error)}") from error
    if name.startswith((".", "/", "~")) or ".." in name.split("/"):
        raise CheckpointError(f"{name}: no such folder")
    return None


def source_config(name: str, folder: Path) -> dict[str, Any]:
    """config.json of a source, as transformers reads it. Raises CheckpointError, UnsupportedModelError."""
    if regular_file(folder, CONFIG, LARGEST_CONFIG) is None:
        raise CheckpointError(without_config(name, folder) + _hides_the_hub(name))
    return dict(completed(read_config(name, folder)))


def _hides_the_hub(name: str) -> str:
    """What to add about a folder without a model that is called like a model on the hub; else ""."""
    if not _HUB_ID.fullmatch(name) or not Path(name).is_dir():
        return ""
    return f"; the folder {name} here was taken: for {name} on the hub work in another folder, or rename this one"


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty where it cannot be read, since transformers goes on without it, too."""
    try:
        return read_json(folder / GENERATION_CONFIG, "")
    except CheckpointError:
        return {}


def _hub_place(name: str) -> tuple[str, str]:
    """The id in ID/FOLDER, and the folder."""
    owner, _, rest = name.partition("/")
    model, _, folder = rest.partition("/")
    return f"{owner}/{model}" if model else owner, folder.strip("/")


def _download(name: str, revision: str | None, *patterns: str) -> tuple[Path, str | None]:
    """Fetches what matches into the hub cache; returns the folder in the snapshot and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model, inside = _hub_place(name)
    wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
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
            f"{name} is no folder here, and not in the cache while the hub is offline (HF_HUB_OFFLINE) or out of "
            "reach; sample:gpt2 and sample:t5 need neither"
        ) from error
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        raise CheckpointError(f"{name} could not be downloaded: {one_line(error)}") from error
    return folder / inside, folder.name if folder.parent.name == "snapshots" else None


def _hub_headers(name: str, revision: str | None) -> Source | None:
    """Names, shapes and dtypes by the hub's range requests; None where the model has no safetensors or is offline."""
    from huggingface_hub import get_safetensors_metadata

    if _hub_place(name)[1]:
        return None  # it looks at no folders inside
    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except Exception:  # whatever it is, downloading the files says it better
        return None
    source = HeadersSource()
    tensors = ((file, content.tensors) for file, content in metadata.files_metadata.items())
    source.index = indexed(
        ((key, info.shape, info.dtype, file) for file, infos in tensors for key, info in infos.items()), name
    )
    return source


def _passed_over(folder: Path, files: list[str]) -> tuple[str, ...]:
    """A sentence where the folder holds other weights of the same format, which may differ."""
    suffix = Path(files[0]).suffix
    others = [name for name in _WEIGHTS if suffix in Path(name).suffixes and (folder / name).is_file()]
    if len(others) < 2:
        return ()
    return (f"weights read from {files[0]}, as transformers does; {others[1]} beside it was not looked at",)


def _weight_files(name: str, folder: Path) -> list[str]:
    """The files that hold a folder's weights. An index names them; what else it says is not used."""
    for candidate in _WEIGHTS:
        if regular_file(folder, candidate) is None:
            continue
        files = [candidate]
        if candidate.endswith(".json"):
            index = read_json(folder / candidate, "", LARGEST_INDEX)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MOST_TENSORS:
                raise CheckpointError(f"{folder / candidate}: no weight_map of 1 to {MOST_TENSORS:,} tensors")
            if "metadata" not in index:
                raise CheckpointError(
                    f'{folder / candidate}: transformers reads no index like it; add "metadata": {{}}'
                )
            files = sorted(set(map(str, weight_map.values())))
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{folder / candidate}: {shown(file)} lies outside the folder")
            if regular_file(folder, file) is None:
                raise CheckpointError(f"{name}: {shown(file)} is missing from {folder}")
            check_format(folder / file)
        if len({Path(file).suffix for file in files}) > 1 or Path(files[0]).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{folder / candidate} names other files than .safetensors or .bin")
        return files
    hint = without_weights(folder) or _hides_the_hub(name)
    raise CheckpointError(f"{name}: no weights ({', '.join(_WEIGHTS)}) in {folder}{hint}")
