"""Run a plan: one attention site is read, converted and written at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import ModelSource, Source, torch_dtype
from .errors import CheckpointError, one_line
from .families import Site
from .heads import AttentionHeads, get_method
from .output import carry_files, write_json, write_shard
from .plan import Plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is)"""

MODELS = Path(__file__).parent / "models"


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def run(plan: Plan, source: Source, progress: Progress = silent) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of one shard after the other; holds one shard and one attention site.

    Raises:
        CheckpointError: a weight cannot be read, or is not finite.
    """
    done, total = 0, plan.nbytes
    waiting: dict[str, Tensor] = {}  # computed with their site, belonging to a later shard
    for file, tensors in plan.shards.items():
        batch: dict[str, Tensor] = {}
        for tensor in tensors:
            if isinstance(tensor.origin, Site):
                if tensor.name not in waiting:
                    waiting |= _convert_site(plan, source, tensor.origin)
                result = waiting.pop(tensor.name)
            else:
                result = _read(plan, source, tensor.origin)
            result = result.to(torch_dtype(tensor.dtype)).contiguous()
            _check_finite(result, tensor.name, source.name)
            batch[tensor.name] = result
            done += tensor.nbytes
            progress("convert", done, total)
        yield file, batch


def _convert_site(plan: Plan, source: Source, site: Site) -> dict[str, Tensor]:
    import torch

    def get(name: str) -> Tensor:
        tensor = _read(plan, source, name)
        _check_finite(tensor, name, source.name)
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    heads: AttentionHeads = plan.family.read(site, get, plan.dimensions)
    converted = get_method(plan.method).convert(heads, plan.partitions[site.kind], None)
    return plan.family.write(site, converted)


def _read(plan: Plan, source: Source, name: str) -> Tensor:
    return source.read(plan.source_names[name])


def _check_finite(tensor: Tensor, name: str, source: str) -> None:
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # allocates nothing, and NaN shows in both
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values (in {tensor.dtype})")


def write_model(plan: Plan, source: Source, folder: Path, verify: bool, progress: Progress) -> None:
    """Weights, config, modeling files and what is carried over, into an existing folder."""
    if verify:
        check_loads(plan)
    weight_map: dict[str, str] = {}
    for file, batch in run(plan, source, progress):
        write_shard(folder / file, batch)
        weight_map |= dict.fromkeys(batch, file)
        if verify:
            _verify_shard(folder / file, batch)
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", plan.config)
    for file in plan.family.model_files:
        shutil.copyfile(MODELS / file, folder / file)
    if isinstance(source, ModelSource) and source.generation_config is not None:
        source.generation_config.save_pretrained(folder)
    if source.folder is not None:
        tokenizer_class = source.config.get("tokenizer_class") or plan.family.tokenizer_class
        carry_files(source.folder, folder, tokenizer_class)


def _verify_shard(path: Path, batch: dict[str, Tensor]) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt", backend="pread") as file:
        for name, tensor in batch.items():
            written = file.get_tensor(name)
            if written.dtype != tensor.dtype or not torch.equal(written, tensor):
                raise CheckpointError(f"{path.name}: {name} was not written as computed; is the disk sound?")


def check_loads(plan: Plan) -> None:
    """The result's config is accepted, and its model calls for the shapes that are planned. Builds no weights.

    Raises:
        CheckpointError: they do not fit, because config.json holds what transformers does not accept.
    """
    import torch

    try:
        with torch.device("meta"):
            model = model_class(plan)(config_class(plan).from_dict(plan.config))
    except Exception as error:  # validation, look-ups of activations and dtypes: each fails in its own way
        raise CheckpointError(f"config.json is not accepted by the model class: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "" if model.base_model_prefix in dict(model.named_children()) else f"{model.base_model_prefix}."
    for tensors in plan.shards.values():
        for tensor in tensors:
            shape = expected.get(tensor.name, expected.get(tensor.name.removeprefix(prefix)))
            if isinstance(tensor.origin, Site) and shape != tensor.shape:
                raise CheckpointError(f"{tensor.name} has shape {tensor.shape}, the model class calls for {shape}")


def config_class(plan: Plan) -> type[PreTrainedConfig]:
    from . import models

    return getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2])


def model_class(plan: Plan) -> type[PreTrainedModel]:
    from . import models

    return getattr(models, plan.config["architectures"][0])
