"""Run a plan: read one attention site at a time, convert it, write it, and publish the folder when all is there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import ModelSource, Source, carry_files, open_source, staged_output, write_json, write_shard
from .errors import CheckpointError, OutputError, RecipeError
from .families import Site
from .heads import AttentionHeads, get_method
from .plan import DEFAULT_SHARD, Plan, make_plan
from .report import conversion_report, write_report

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is)"""

MODELS = Path(__file__).parent / "models"


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@dataclass
class Conversion:
    """What `convert` returns."""

    report: dict[str, Any]
    """as written to report.json"""
    output: Path | None
    """the folder, where one was asked for"""
    _model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The converted model; loaded from `output` when first asked for."""
        if self._model is None:
            from . import models

            assert self.output is not None
            model_class = getattr(models, self.report["architecture"])
            self._model = model_class.from_pretrained(self.output, dtype="auto").eval()
        return self._model


def convert(
    source: str | Path | PreTrainedModel,
    q_groups: int | None = None,
    kv_groups: int | None = None,
    method: str = "mean",
    output: str | Path | None = None,
    *,
    variant: str | None = None,
    sites: Sequence[str] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    max_shard_size: str = DEFAULT_SHARD,
    overwrite: bool = False,
    verify: bool = True,
    evaluate: bool = False,
    data: str | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Converts a GPT-2 or T5 model with multi-head attention to Sparse Query Attention.

    Args:
        source: a hub id, a folder, "sample:gpt2", "sample:t5", or a model in memory.
        q_groups: query heads to keep, Hq <= H.
        kv_groups: key/value heads to keep, a divisor of `q_groups`.
        method: a name of `sqa_convert.METHODS`.
        output: a folder to stream the result to, one attention site at a time; None keeps it in memory.
        variant: instead of the two numbers, a name of `sqa_convert.VARIANTS`.
        sites: kinds of attention to convert ("encoder", "decoder", "cross"); by default all.
        dtype: "auto" keeps each tensor's; or "float32", "bfloat16", "float16".
        revision: of a hub id.
        max_shard_size: such as "300MB"; about what the conversion needs in memory.
        overwrite: replace an existing `output`.
        verify: read every written tensor again, and check names and shapes against the model class.
        evaluate: measure source and result on held-out text, one after the other, where the model has a language model
            head. Needs `output`.
        data: that text; by default the built-in corpus. See `sqa_convert.data.documents`.
        device: to evaluate on: "auto", "cpu", "cuda", "mps".
        seed: of everything random.
        trust_remote_code: let code that the source brings along run when it is evaluated.
        progress: called as the work goes on.

    Returns:
        The model and the report.

    Raises:
        RecipeError, UnsupportedModelError, CheckpointError, OutputError, DataError: see `sqa_convert.errors`.
    """
    get_method(method)
    if evaluate and output is None:
        raise RecipeError("evaluate=True needs an output folder")
    opened = _open(source, revision)
    plan = make_plan(
        opened,
        q_groups,
        kv_groups,
        variant=variant,
        method=method,
        sites=sites,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    start = time.perf_counter()
    if output is None:
        tensors = {k: v for _, batch in run(plan, opened, progress) for k, v in batch.items()}
        report = conversion_report(plan, opened, None, time.perf_counter() - start, seed)
        return Conversion(report, None, _in_memory(plan, tensors))

    output = Path(output)
    _refuse_overlap(opened, output)
    with staged_output(output, overwrite, plan.nbytes) as folder:
        write_model(plan, opened, folder, verify, progress)
        report = conversion_report(plan, opened, output, time.perf_counter() - start, seed)
        if evaluate and plan.family.has_language_model_head(opened.config):
            from .evaluation import compare

            assert opened.folder is not None
            start = time.perf_counter()
            report["quality"] = compare(
                {"source": opened.folder, "converted": folder},
                data=data,
                device=device,
                seed=seed,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        write_report(folder, report)
    return Conversion(report, output)


def _open(source: str | Path | PreTrainedModel, revision: str | None) -> Source:
    return open_source(str(source), revision) if isinstance(source, str | Path) else ModelSource(source)


def _refuse_overlap(source: Source, output: Path) -> None:
    if source.folder is not None:
        inside, outside = output.resolve(), source.folder.resolve()
        if inside == outside or inside in outside.parents:
            raise OutputError(f"--output {output} is where the source lies; give another folder")


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
            result = result.to(_dtype(tensor.dtype)).contiguous()
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


def _dtype(name: str) -> Any:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }[name]  # fmt: skip


def _check_finite(tensor: Tensor, name: str, source: str) -> None:
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # allocates nothing, and NaN shows in both
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values (in {tensor.dtype})")


def write_model(plan: Plan, source: Source, folder: Path, verify: bool, progress: Progress) -> None:
    """Weights, config, modeling files and what is carried over, into an existing folder."""
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
    if source.folder is not None:
        carry_files(source.folder, folder, plan.family.tokenizer_class)
    if verify:
        _verify_config(plan, folder)


def _verify_shard(path: Path, batch: dict[str, Tensor]) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt", backend="pread") as file:
        for name, tensor in batch.items():
            written = file.get_tensor(name)
            if written.dtype != tensor.dtype or not torch.equal(written, tensor):
                raise CheckpointError(f"{path.name}: {name} was not written as computed; is the disk sound?")


def _verify_config(plan: Plan, folder: Path) -> None:
    """The config loads, and its model has the shapes that were written."""
    import torch

    from . import models

    config = getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2]).from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(models, plan.config["architectures"][0])(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "" if model.base_model_prefix in dict(model.named_children()) else f"{model.base_model_prefix}."
    for tensors in plan.shards.values():
        for tensor in tensors:
            shape = expected.get(tensor.name, expected.get(tensor.name.removeprefix(prefix)))
            if isinstance(tensor.origin, Site) and shape != tensor.shape:
                raise CheckpointError(f"{tensor.name} has shape {tensor.shape}, the model class calls for {shape}")


def _in_memory(plan: Plan, tensors: dict[str, Tensor]) -> PreTrainedModel:
    from . import models

    config_class = getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2])
    model_class = getattr(models, plan.config["architectures"][0])
    config = config_class.from_dict(plan.config)
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype="auto").eval()
