"""Whether an output folder is what was written: its files, its weights, and the model a stranger loads from it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .. import models
from ..calibration.available_memory import available_memory
from ..caller_settings import undisturbed
from ..checkpoints.companions import has_tokenizer
from ..checkpoints.dtypes import check_finite
from ..checkpoints.small_files import read_config, sha256_of
from ..checkpoints.source import SafetensorsSource
from ..checkpoints.staging import expanded
from ..checkpoints.untrusted import LARGEST_CONFIG, regular_file
from ..conversion.write import MODELS
from ..errors import CheckpointError, one_line, shown
from ..progress import no_bars_of_others
from ..report.report_json import auto_class, read_report
from ..text.tokenizers import load_tokenizer

POSITIONS = 16
"""tokens of the input that a model is compared on"""

_TOLERANCE = 1e-4  # of the largest logit: the same weights in the same code on the same machine, in float32

_NO_MEMORY = "there was not memory enough"

_PATIENCE = 3600  # seconds

_COPIES = 4
"""of the weights that must fit into memory for a stranger to load them beside what is measured"""

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, 1,234.5 times!\n",
    "def f(x):\n\treturn {'a': [x**2]}  # <extra_id_0> <|endoftext|> </s>",
    "Größe, çà, Đường phố Việt Nam; Ёлка, Ωμέγα, שלום, हिन्दी, ไทย",
    "東京都で日本語を話す。中文, 한국어 🙂",
)
"""what tokenizers are compared on"""

_STRANGER = """
import sys, torch, transformers
auto, folder, inputs, result = sys.argv[1:]
plain = transformers.GenerationConfig()
model = getattr(transformers, auto).from_pretrained(
    folder, trust_remote_code=True, dtype="float32", generation_config=plain
).eval()
own = "sqa_convert" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
assert own, "it is not the folder's own code that was loaded"
with torch.no_grad():
    torch.save(model(**torch.load(inputs))[0], result)
"""


class UnansweredError(CheckpointError):
    """The process that loads a folder was killed or took too long: nothing is known of the folder."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(f"{folder}: loading it where sqa_convert is not was ended; {why}")
        self.why = why


@undisturbed
def verify(folder: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks an output folder.

    Every file of weights is held against its checksum in report.json, every tensor must be finite and have the shape
    that the model class calls for, and the folder is loaded twice: here, and by a process that has only transformers
    and the folder's own modeling files. Both must compute the same. The modeling files must be those of this version,
    since they are run.

    Args:
        folder: made by `convert`.
        trust_remote_code: let modeling files run that are not those of this version. They may be another version's, or
            anybody's.

    Returns:
        {"files": with a checksum, "tensors": read, "difference": largest between the logits of the two}.

    Raises:
        CheckpointError: what is not as it was written.
    """
    folder = expanded(folder, "FOLDER")
    report = read_report(folder)
    files = {path.name for path in folder.glob("*.safetensors")}
    recorded = report.get("sha256", {})
    if recorded and files != recorded.keys():
        raise CheckpointError(f"{folder} holds {_names(files)}; written were {_names(recorded)}")
    for name, checksum in recorded.items():
        if sha256_of(folder / name) != checksum:
            raise CheckpointError(f"{folder / name} is not the file that was written: its checksum differs")
    tensors = _check_tensors(folder, report, sorted(files))
    if not trust_remote_code:
        _check_code(folder)
    with stranger(folder, report) as logits:
        return {"files": len(recorded), "tensors": tensors, "difference": compare_logits(logits(), folder, report)}


def _check_code(folder: Path) -> None:
    """Raises CheckpointError where the folder makes a process run other code than this version ships."""
    named = read_config(str(folder), folder).get("auto_map")
    places = named.values() if isinstance(named, dict) else [named]
    files = [f"{str(place).partition('.')[0]}.py" for place in places]
    for file in (*files, *(path.name for path in folder.glob("*.py"))):
        shipped, path = MODELS / file, regular_file(folder, file, LARGEST_CONFIG)
        if "sqa" not in file or not shipped.is_file() or path is None or path.read_bytes() != shipped.read_bytes():
            raise CheckpointError(
                f"{folder}: {shown(file)} is not the file this version of sqa-convert ships, so it is not run; "
                "--trust-remote-code runs it"
            )


def _names(names: Any) -> str:
    return ", ".join(sorted(names)) or "no weights"


def _check_tensors(folder: Path, report: dict[str, Any], files: list[str]) -> int:
    if not files:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors)")
    source = SafetensorsSource(folder, files)
    model_class = getattr(models, report["architecture"])
    try:
        config = model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # validation, JSON and look-ups share no base class
        raise CheckpointError(f"{folder}: its config does not load: {one_line(error)}") from error
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        stored = source.index.get(name) or source.index.get(f"{model.base_model_prefix}.{name}")
        if stored is None and name not in tied:
            raise CheckpointError(f"{folder}: {name} is missing from the weights")
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(stored.shape)}, the model calls for {list(tensor.shape)}"
            )
    for name in source.index:
        for piece in source.pieces(name):
            check_finite(piece, source.index[name].dtype, name, str(folder))
    return len(source.index)


def check_tokenizer(source: Path, folder: Path) -> None:
    """Compares the result's tokenizer with the source's, unless that does not load, or only with code of its own.

    Raises:
        CheckpointError: the result's does not load, or gives other tokens.
    """
    if not has_tokenizer(source):
        return
    try:
        expected = _tokens(load_tokenizer(source))
    except Exception:  # what is wrong with it is not the result's fault
        return
    result = _tokens(load_tokenizer(folder, without="--no-verify leaves it as it is"))
    for text, theirs, ours in zip(_TEXTS, expected, result, strict=True):
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: its tokenizer makes other tokens than {source}'s of {text[:20]!r} ({ours[:8]}, not "
                f"{theirs[:8]}): a file of it lies where transformers does not look; save the source's with "
                "save_pretrained first, or --no-verify leaves it as it is"
            )


def _tokens(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in _TEXTS]


@contextlib.contextmanager
def reloaded(folder: Path, report: dict[str, Any], memory: int | None = None) -> Iterator[None]:
    """While the block runs a stranger loads the folder; then the report says how far its logits are from ours.

    Or it says why that is not known: memory was too small, or it took too long.

    Args:
        memory: bytes that all of it may hold; None: what is free.

    Raises:
        CheckpointError: the folder does not load, or computes something else.
    """
    if (memory or available_memory()) < _COPIES * sum(p.stat().st_size for p in folder.glob("*.safetensors")):
        yield
        report["reloaded"] = {"skipped": _NO_MEMORY}
        return
    with stranger(folder, report) as logits:
        yield
        try:
            report["reloaded"] = {"difference": compare_logits(logits(), folder, report)}
        except UnansweredError as error:
            report["reloaded"] = {"skipped": error.why}


@contextlib.contextmanager
def stranger(folder: Path, report: dict[str, Any]) -> Iterator[Callable[[], Tensor]]:
    """While the block runs, another process, without this package, loads the folder and computes logits.

    The block is given a function that waits for them. It raises UnansweredError where the process is killed or takes
    too long, and CheckpointError where the folder does not load.
    """
    with tempfile.TemporaryDirectory() as work:
        inputs, result = Path(work) / "inputs.pt", Path(work) / "logits.pt"
        torch.save(_probe(folder), inputs)
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name} | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_MODULES_CACHE": str(Path(work) / "modules"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", _STRANGER, auto_class(report), folder.resolve(), inputs, result],
            env=environment,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def logits() -> Tensor:
            try:
                _, messages = process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise UnansweredError(folder, f"it took more than {_PATIENCE / 60:g} minutes") from error
            if process.returncode < 0:
                raise UnansweredError(folder, _NO_MEMORY)
            if process.returncode:
                last = (messages.strip().splitlines() or ["it says nothing"])[-1]
                raise CheckpointError(f"{folder} does not load where sqa_convert is not: {one_line(Exception(last))}")
            theirs: Tensor = torch.load(result, weights_only=True)
            return theirs

        try:
            yield logits
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _probe(folder: Path) -> dict[str, Tensor]:
    """Inputs that the model in `folder` is compared on."""
    config = read_config(str(folder), folder)
    ids = torch.arange(1, min(POSITIONS, config.get("n_positions", POSITIONS)) + 1)[None] % config["vocab_size"]
    both = config["architectures"][0].endswith(("ForConditionalGeneration", "SQAT5Model"))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if both else {})


@torch.no_grad()
def compare_logits(theirs: Tensor, folder: Path, report: dict[str, Any]) -> float:
    """The largest difference to what the folder's model computes here. Raises CheckpointError where it is large."""
    model_class, plain = getattr(models, report["architecture"]), GenerationConfig()
    with no_bars_of_others():
        model = model_class.from_pretrained(folder, dtype="float32", generation_config=plain).eval()
    ours = model(**_probe(folder))[0]
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    if not difference <= _TOLERANCE * max(1.0, ours.abs().max().item()):
        raise CheckpointError(f"{folder}: where sqa_convert is not, its model computes something else ({difference:g})")
    return difference
