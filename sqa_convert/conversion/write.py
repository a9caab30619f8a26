"""The output folder of a conversion: weights, config, modeling files and what is carried over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checkpoints.companions import GENERATION_CONFIG, MODULES
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.safetensors_writer import ShardWriter, flushing
from ..checkpoints.small_files import carry_files, write_json
from ..checkpoints.source import Source
from ..families import Site
from ..progress import Progress
from .convert_site import Calibrated, SiteRecord
from .execute import convert_all
from .plan import OutputTensor, Plan

_READERS = 2  # files verified at a time

MODELS = Path(__file__).parent.parent / "models"


def write_model(
    plan: Plan, source: Source, folder: Path, calibrated: Calibrated, verify: bool, progress: Progress
) -> tuple[dict[Site, SiteRecord], dict[str, str]]:
    """Weights, config, modeling files and what is carried over, into an existing folder.

    Returns:
        A record of each site, and the SHA-256 of each file of weights where they are verified.
    """
    sums: dict[str, str] = {}
    writers = {file: ShardWriter(folder / file, tensors, verify) for file, tensors in plan.shards.items()}
    writer_of = {tensor.name: writers[file] for file, tensors in plan.shards.items() for tensor in tensors}

    def store(tensor: OutputTensor, pieces: Iterable[memoryview]) -> None:
        writer_of[tensor.name].write(tensor.name, pieces)

    with flushing(writers.values()):
        records = convert_all(plan, source, calibrated.sites, store, progress, calibrated.trained)
    if verify:
        with ThreadPoolExecutor(_READERS) as pool:
            sums = dict(zip(writers, pool.map(ShardWriter.verify, writers.values()), strict=True))
    if len(plan.shards) > 1:
        weight_map = {tensor.name: file for file, tensors in plan.shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", plan.config)
    for file in plan.family.model_files:
        shutil.copyfile(MODELS / file, folder / file)
    if source.folder is not None:
        tokenizer_class = source.config.get("tokenizer_class") or plan.family.tokenizer_class
        carry_files(source.folder, folder, tokenizer_class)
        if plan.family.sentence_layer and (folder / MODULES).is_file():
            _put_sentence_layer(folder, plan.family.sentence_layer)
    if isinstance(source, ModelSource) and source.generation_config is not None:
        # Its own `save_pretrained` refuses what it takes for a mistake, such as a temperature that is not used.
        source.generation_config.to_json_file(folder / GENERATION_CONFIG)
    return records, sums


def _put_sentence_layer(folder: Path, name: str) -> None:
    """Gives a folder of sentence-transformers the class that loads the model, and names it in modules.json.

    Args:
        name: "file.Class".
    """
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    for module in modules:
        if not module.get("path") and str(module.get("type")).endswith(".Transformer"):
            module["type"] = name
            shutil.copyfile(MODELS / f"{name.partition('.')[0]}.py", folder / f"{name.partition('.')[0]}.py")
    write_json(folder / MODULES, modules)
