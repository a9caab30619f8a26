"""The order of the work: plan, calibrate, write, verify, measure, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callers import undisturbed
from ..checkpoints.find import GENERATION_CONFIG, open_source
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.memory import ModelSource
from ..checkpoints.source import Source
from ..checkpoints.staging import check_output, expanded, staged_output
from ..conversion.build import build_model
from ..conversion.execute import check_copies
from ..conversion.plan import Plan, make_plan
from ..conversion.request import AUTO, CALIBRATED, DEFAULT_SHARD, Calibration, Request
from ..conversion.result import check_loads
from ..conversion.site import Calibrated
from ..conversion.write import write_model
from ..errors import CheckpointError, DataError, RecipeError, one_line
from ..progress import Progress, silent
from ..report.content import conversion_report
from ..report.write import write_report
from ..text.formats import TEXT_COLUMN
from .preflight import check_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation.held_out import HeldOut


@dataclass
class Conversion:
    """What `convert` returns."""

    report: dict[str, Any]
    """As written to report.json: sites and their partitions, costs, quality, seconds, versions."""
    output: Path | None
    """The folder, where one was asked for."""
    _model: PreTrainedModel | None = None

    @property
    @undisturbed
    def model(self) -> PreTrainedModel:
        """The converted model in eval mode, in the source's dtype; loaded from `output` when first asked for."""
        if self._model is None:
            from transformers import GenerationConfig

            from .. import models
            from ..text.decoding import refusal

            assert self.output is not None
            model_class = getattr(models, self.report["architecture"])
            options = {} if refusal(self.output) is None else {"generation_config": GenerationConfig()}
            self._model = model_class.from_pretrained(self.output, dtype="auto", **options).eval()
        return self._model


@dataclass(frozen=True)
class Settings:
    """How a conversion is carried out, beside what is asked of it (`Request`)."""

    overwrite: bool = False
    verify: bool = True
    evaluate: bool = False
    data: str | None = None
    text_column: str = TEXT_COLUMN
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    measure_training: bool = True
    """of an uptraining that follows"""


@undisturbed
def convert(
    source: str | Path | PreTrainedModel,
    q_groups: int | None = None,
    kv_groups: int | None = None,
    method: str = AUTO,
    output: str | Path | None = None,
    *,
    variant: str | None = None,
    sites: Sequence[str] | None = None,
    partition: str | None = None,
    calibration: Calibration | str | None = CALIBRATED,
    dtype: str = "auto",
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | Path | None = None,
    max_shard_size: str = DEFAULT_SHARD,
    overwrite: bool = False,
    verify: bool = True,
    evaluate: bool = False,
    data: str | None = None,
    text_column: str | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Converts a GPT-2 or T5 model with multi-head attention to Sparse Query Attention.

    Args:
        source: a hub id, a folder, "sample:gpt2", "sample:t5", or a model in memory, compiled or in parallel too.
        q_groups: query heads to keep, Hq <= H.
        kv_groups: key/value heads to keep, a divisor of `q_groups`.
        method: by default "auto", which tries several on text and takes the best; or a name of `sqa_convert.METHODS`.
        output: a folder to stream the result to, a few attention sites at a time; None keeps it in memory.
        variant: instead of the two numbers, a name of `sqa_convert.VARIANTS`.
        sites: kinds of attention to convert ("encoder", "decoder", "cross"); by default all.
        partition: which heads go together: "searched" or "contiguous"; by default as suits the method.
        calibration: how heads are fitted to what they do on text: a `Calibration`, the text alone, or None to convert
            from the weights alone. The published methods (mean, first, select) fit only when told to.
        dtype: "auto" keeps each tensor's; or "float32", "bfloat16", "float16".
        revision: of a hub id.
        subfolder: of a pipeline of several models, the one meant.
        tokenizer: where it lies if not beside the weights: a folder beside the model's, any folder, or a hub id.
        max_shard_size: of the largest weight file, such as "300MB"; by default "2GB".
        overwrite: replace an existing `output`.
        verify: of an `output`, read every written tensor again, and check names and shapes against the model class;
            with `evaluate` also load it in a process of its own, without this package, and compare logits.
        evaluate: measure source and result on held-out text, one after the other, where the model has a language model
            head and its tokenizer loads; else the report says why not. Needs `output`.
        data: that text, as `sqa_convert.text.corpus.documents` takes it; by default the built-in corpus.
        text_column: of `data`, and of `calibration` where that is the text alone: the column that holds the text, where
            they are tables; by default "text".
        device: to calibrate and evaluate on: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of everything random.
        trust_remote_code: let code that the source brings along run when it is calibrated or evaluated.
        progress: called as the work goes on, with the stage, how much of it is done, and how much there is.

    Returns:
        The model and the report.

    Raises:
        RecipeError: an argument is not possible, or the work does not fit into the device's memory.
        CheckpointError: the source is missing, damaged, out of reach or changes while it is read; or what was written
            is not what was computed.
        UnsupportedModelError: the source is of an architecture that cannot be converted.
        DataError: the text is missing, too short, or does not fit the model.
        OutputError: `output` exists already or cannot be written.
        QualityError: a measured loss is not finite.

    Source: Filipek, Sparse Query Attention, arXiv 2510.01817, for the architecture; of a method `METHODS[name].source`.
    """
    if text_column is not None and data is None and not isinstance(calibration, str):
        raise RecipeError(f"text_column={text_column!r} is of data, or of the text given as calibration: give one")
    column = text_column or TEXT_COLUMN
    if isinstance(calibration, str):
        calibration = Calibration(calibration, text_column=column)
    if not isinstance(calibration, Calibration | None):
        raise RecipeError(f"calibration={calibration!r}: give a Calibration, its text, or None for none")
    request = Request(q_groups, kv_groups, variant, method, calibration, partition, sites, dtype, max_shard_size)
    place = None if output is None else expanded(output)

    def accept(config: dict[str, Any]) -> None:
        request.partitions(config)
        if place is not None:
            check_output(place, overwrite)

    opened: Source
    if isinstance(source, str | Path):
        opened = open_source(
            str(source),
            revision,
            subfolder=subfolder,
            tokenizer=None if tokenizer is None else str(tokenizer),
            accept=accept,
        )
    else:
        opened = ModelSource(source)
    plan = make_plan(opened, request)
    column = TEXT_COLUMN if data is None else column
    settings = Settings(overwrite, verify, evaluate, data, column, device, seed, trust_remote_code)
    if place is None:
        check_run(plan, opened, None, settings)
        return _in_memory(plan, opened, settings, progress)
    return convert_to_folder(plan, opened, place, settings, progress)


def _in_memory(plan: Plan, source: Source, settings: Settings, progress: Progress) -> Conversion:
    start = time.perf_counter()
    check_loads(plan)
    check_copies(plan, source)
    calibrated = _calibrated(plan, source, settings, progress)
    model, records = build_model(plan, source, calibrated.sites, progress)
    _carry_generation(source, model)
    report = conversion_report(plan, source, None, records, calibrated.report, settings.seed)
    report["source_weights"] = fingerprint(source, plan.source_names)
    report["seconds"]["convert"] = round(time.perf_counter() - start, 2)
    return Conversion(report, None, model)


def _carry_generation(source: Source, model: PreTrainedModel) -> None:
    """The source's settings of generation, as far as transformers takes them."""
    from transformers import GenerationConfig

    from ..text.decoding import refusal

    if not model.can_generate():
        return
    if isinstance(source, ModelSource):
        model.generation_config = copy.deepcopy(source.generation_config)
    elif source.folder is not None and (source.folder / GENERATION_CONFIG).is_file() and not refusal(source.folder):
        model.generation_config = GenerationConfig.from_pretrained(source.folder)


def convert_to_folder(
    plan: Plan, source: Source, output: Path, settings: Settings = Settings(), progress: Progress = silent
) -> Conversion:
    """Carries out a plan. What calibration and evaluation need is made ready before anything is written."""
    check_run(plan, source, output, settings)
    held_out, not_measured = _held_out(plan, source, settings) if settings.evaluate else (None, "")
    with staged_output(output, settings.overwrite, plan.nbytes) as folder, source.unchanged():
        start = time.perf_counter()
        if settings.verify:
            check_loads(plan)
        check_copies(plan, source)
        calibrated = _calibrated(plan, source, settings, progress)
        calibrating, start = time.perf_counter() - start, time.perf_counter()
        records, sums = write_model(plan, source, folder, calibrated.sites, settings.verify, progress)
        report = conversion_report(plan, source, output, records, calibrated.report, settings.seed)
        report["source_weights"] = fingerprint(source, plan.source_names)
        if sums:
            report["sha256"] = sums
        if settings.verify and source.folder is not None:
            from .verify import check_tokenizer

            check_tokenizer(source.folder, folder)
        if plan.calibration is not None:
            report["seconds"]["calibrate"] = round(calibrating, 2)
        report["seconds"]["convert"] = round(time.perf_counter() - start, 2)
        if not_measured:
            report["not_measured"] = not_measured
        with _reloaded(folder, report, settings):
            if held_out is not None:
                start = time.perf_counter()
                own = report.get("calibration", {}).get("own_loss")
                report |= _measured(plan, source, folder, held_out, settings, progress, own)
                report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        write_report(folder, report)
    return Conversion(report, output)


def _held_out(plan: Plan, source: Source, settings: Settings) -> tuple[HeldOut | None, str]:
    """What to measure on; or nothing, and why the model cannot be measured on what is taken where nothing was named."""
    from ..evaluation.held_out import prepare

    assert source.folder is not None
    if not plan.has_language_model_head:
        return None, ""
    names = ("text_column", "device", "seed", "trust_remote_code")
    how: dict[str, Any] = {name: getattr(settings, name) for name in names}
    without = "leave out --data" if settings.data else ""
    try:
        return prepare(source.folder, settings.data, **how, without=without), ""
    except (CheckpointError, DataError) as error:
        if settings.data is not None:
            raise
        return None, one_line(error).replace(str(source.folder), source.name)


def _reloaded(folder: Path, report: dict[str, Any], settings: Settings) -> AbstractContextManager[None]:
    """Beside the measuring the folder is loaded as strangers load it, where it is measured and verified at all."""
    if not (settings.verify and settings.evaluate):
        return nullcontext()
    from .verify import reloaded

    return reloaded(folder, report)


def _measured(
    plan: Plan,
    source: Source,
    folder: Path,
    held_out: HeldOut,
    settings: Settings,
    progress: Progress,
    own: float | None,
) -> dict[str, Any]:
    """The "quality" and "samples" of a report, with what averaging the heads would have cost."""
    from ..evaluation.generation import continuations
    from ..evaluation.quality import compare

    def averaged() -> PreTrainedModel:
        plain = replace(plan, method="mean", searched=False, partition_given=False, calibration=None)
        return build_model(plain, source, {})[0]

    assert source.folder is not None
    models = {"source": source.folder, "converted": folder}
    compared: dict[str, Any] = models if plan.method == "mean" else models | {"mean": averaged}
    trust = settings.trust_remote_code
    return {
        "quality": compare(
            compared,
            held_out,
            trust_remote_code=trust,
            progress=progress,
            optional={"mean"},
            untrained=compared.keys() - {"source"},
            own=own,
        ),
        "samples": continuations(models, held_out, trust_remote_code=trust),
    }


def _calibrated(plan: Plan, source: Source, settings: Settings, progress: Progress) -> Calibrated:
    if plan.calibration is None:
        return Calibrated({}, None)
    import torch

    from ..calibration.calibrate import calibrate, load_source
    from ..devices import choose_device

    device = choose_device(settings.device)
    try:
        model = load_source(plan, source, settings.trust_remote_code)
        return calibrate(model, plan, source, device, settings.seed, settings.trust_remote_code, progress)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RecipeError(
            f"calibration does not fit on {device}: --device cpu, fewer --calibration-tokens, or --no-calibration"
        ) from error
