"""The order of the work: look first, calibrate, write, verify, measure, report, and train where that is wanted."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.find import GENERATION_CONFIG
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import Source
from ..checkpoints.staging import staged_output
from ..conversion.build_model import build_model
from ..conversion.convert_site import Calibrated
from ..conversion.execute import check_copies
from ..conversion.plan import Plan
from ..conversion.result_model_class import check_loads
from ..conversion.write import write_model
from ..errors import CheckpointError, DataError, one_line
from ..families import only_hidden_states
from ..progress import Progress, Stages, silent, told_within
from ..report.report_json import conversion_report
from ..report.write import write_report
from ..text.documents import GIVEN
from ..text.suitability import fitted_elsewhere
from .go_on_with_calibration import kept_beside
from .planned_stages import DRAW, LOAD, VERIFY, WRITE_SAMPLES, planned_stages
from .preflight import check_run
from .run_options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.kept_for_resume import KeptParts
    from ..calibration.memory_budget import MemoryBudget
    from ..evaluation.held_out_batches import HeldOut
    from ..uptraining.recipe import Recipe


def run(
    plan: Plan,
    source: Source,
    output: Path,
    options: RunOptions,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carries out a plan: a folder that appears whole, trained by a recipe where there is one; returns its report."""
    check_run(plan, source, output, options, recipe)
    # The text to measure on is prepared first, so that without it nothing is written.
    held_out = held_out_text(plan, source, options) if options.evaluate else ""
    stages = Stages(progress, planned_stages(plan, options, not isinstance(held_out, str), recipe))
    with told_within(stages):
        report = _to_folder(plan, source, output, options, held_out, stages)
    if recipe is None:
        return report
    from ..uptraining.uptrain import uptrain

    return uptrain(
        output,
        recipe,
        source=str(source.folder),
        data=options.data if recipe.data == GIVEN else None,
        device=options.device,
        evaluate=options.measure_training,
        restart=True,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )


def run_in_memory(
    plan: Plan, source: Source, options: RunOptions, progress: Progress = silent
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Carries out a plan without a folder; returns the model and the report."""
    check_run(plan, source, None, options)
    start = time.perf_counter()
    check_loads(plan)
    check_copies(plan, source)
    stages = Stages(progress, planned_stages(plan, options, measured=False))
    with told_within(stages):
        calibrated = _calibrated(plan, source, options, _budget(plan, source, options), stages)
        plan = calibrated.plan
        model, records = build_model(plan, source, calibrated.sites, stages, calibrated.trained)
    _carry_generation(source, model)
    report = conversion_report(plan, source, None, records, calibrated.report, options.seed, _device(plan, options))
    report["source_weights"] = fingerprint(source, plan.source_names)
    report["seconds"]["convert"] = round(time.perf_counter() - start, 2)
    report["stages"] = stages.seconds()
    return model, report


def _device(plan: Plan, options: RunOptions) -> str:
    """What is computed on; a conversion from the weights alone is a CPU's work, whatever there is."""
    if plan.calibration is None and not options.evaluate:
        return "cpu"
    from ..devices import choose_device, device_name

    return device_name(choose_device(options.device))


def _carry_generation(source: Source, model: PreTrainedModel) -> None:
    """Gives the model the source's generation config, as far as transformers accepts it."""
    from transformers import GenerationConfig

    from ..text.plain_generation import refusal

    if not model.can_generate():
        return
    if isinstance(source, ModelSource):
        model.generation_config = copy.deepcopy(source.generation_config)
    elif source.folder is not None and (source.folder / GENERATION_CONFIG).is_file() and not refusal(source.folder):
        model.generation_config = GenerationConfig.from_pretrained(source.folder)


def _to_folder(
    plan: Plan, source: Source, output: Path, options: RunOptions, held_out: HeldOut | str, progress: Stages
) -> dict[str, Any]:
    """Converts into a folder, measured on text; or on none, for a reason."""
    budget = _budget(plan, source, options)
    with (
        kept_beside(plan, source, output, options, budget is not None and budget.lean) as kept,
        staged_output(output, options.overwrite, plan.nbytes) as folder,
        source.unchanged(),
    ):
        start = time.perf_counter()
        if options.verify:
            check_loads(plan)
        check_copies(plan, source)
        calibrated = _calibrated(plan, source, options, budget, progress, kept)
        if kept is not None:
            kept.whole = True
        plan = calibrated.plan
        calibrating, start = time.perf_counter() - start, time.perf_counter()
        records, sums = write_model(plan, source, folder, calibrated, options.verify, progress)
        device = _device(plan, options)
        report = conversion_report(plan, source, output, records, calibrated.report, options.seed, device)
        report["source_weights"] = fingerprint(source, plan.source_names)
        if sums:
            report["sha256"] = sums
        if options.verify and source.folder is not None:
            from .verify import check_tokenizer

            check_tokenizer(source.folder, folder)
        if plan.calibration is not None:
            report["seconds"]["calibrate"] = round(calibrating, 2)
        report["seconds"]["convert"] = round(time.perf_counter() - start, 2)
        if held_out and isinstance(held_out, str):
            report["not_measured"] = held_out
        with _reloaded(plan, folder, report, options):
            if not isinstance(held_out, str):
                start = time.perf_counter()
                calibration = report.get("calibration", {})
                report |= _measured(plan, source, folder, held_out, options, progress, calibration)
                report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
                if options.verify:
                    progress(VERIFY, 0, 1)
        if not isinstance(held_out, str):
            progress(DRAW, 0, 1)
        report["stages"] = progress.seconds()
        write_report(folder, report)
    return report


def held_out_text(plan: Plan, source: Source, options: RunOptions) -> HeldOut | str:
    """The text to measure on; where none was named and the default does not do, why. "" of what predicts no text."""
    from ..evaluation.held_out_text import prepare

    assert source.folder is not None
    if not plan.has_language_model_head:
        return _held_out_of_hidden_states(plan, source, options)
    names = ("text_column", "columns", "device", "seed", "trust_remote_code")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    without = "leave out --data" if options.data is not None else ""
    given, tokenizer = (source.model, source.folder) if isinstance(source, ModelSource) else (source.folder, None)
    try:
        return prepare(given, options.data, **how, tokenizer=tokenizer, without=without)
    except (CheckpointError, DataError) as error:
        if options.data is not None:
            raise
        return one_line(error).replace(str(source.folder), source.name)


def _held_out_of_hidden_states(plan: Plan, source: Source, options: RunOptions) -> HeldOut | str:
    """The text that a model without a language model head reads; "" of one that puts out something else."""
    from ..devices import choose_device
    from ..evaluation.held_out_text import DEFAULT_TOKENS
    from ..evaluation.hidden_states import held_out_rows
    from ..evaluation.load import Measured

    assert source.folder is not None
    if not only_hidden_states(plan.family.source_architecture(plan.source_config)):
        return ""
    given, tokenizer = (source.model, source.folder) if isinstance(source, ModelSource) else (source.folder, None)
    measured = Measured(given, tokenizer, options.trust_remote_code)
    fitted = plan.calibration.text_named if plan.calibration is not None else None
    data, flag = (options.data, "--data") if options.data is not None else (fitted, "--calibration")
    column = plan.calibration.text_column if plan.calibration and options.data is None else options.text_column
    device = choose_device(options.device)
    try:
        return held_out_rows(measured, data, column, DEFAULT_TOKENS, device, flag)
    except (CheckpointError, DataError) as error:
        if options.data is not None:
            raise
        return one_line(error).replace(str(source.folder), source.name)


def _reloaded(plan: Plan, folder: Path, report: dict[str, Any], options: RunOptions) -> AbstractContextManager[None]:
    """While the block measures, another process loads the folder as strangers do; not without `verify`."""
    if not (options.verify and options.evaluate):
        return nullcontext()
    from .verify import reloaded

    return reloaded(folder, report, None if plan.calibration is None else plan.calibration.memory)


def _measured(
    plan: Plan,
    source: Source,
    folder: Path,
    held_out: HeldOut,
    options: RunOptions,
    progress: Progress,
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """The "quality" and "samples" of a report, with what averaging the heads would have cost."""
    from ..evaluation.evaluate import compare
    from ..evaluation.generation import continuations
    from ..evaluation.hidden_states import compare_hidden_states
    from ..evaluation.load import unmoved

    def averaged() -> PreTrainedModel:
        plain = replace(
            plan, method="mean", own_method=None, searched=False, partition_given=False, given={}, calibration=None
        )
        return build_model(plain, source, {})[0]

    assert source.folder is not None
    given = source.model if isinstance(source, ModelSource) else source.folder
    models: dict[str, Any] = {"source": given, "converted": folder}
    compared: dict[str, Any] = models if plan.method == "mean" else models | {"mean": averaged}
    trust = options.trust_remote_code
    with unmoved(given) if isinstance(source, ModelSource) else nullcontext():
        if not plan.has_language_model_head:
            return {
                "quality": compare_hidden_states(
                    compared, held_out, trust_remote_code=trust, progress=progress, optional={"mean"}
                )
            }
        quality = compare(
            compared,
            held_out,
            trust_remote_code=trust,
            progress=progress,
            optional={"mean"},
            untrained=compared.keys() - {"source"},
            own=calibration.get("own_loss"),
            spelled_by={"converted": folder},
        )
        if calibration.get("kl") is not None:
            quality["warnings"] += fitted_elsewhere(quality["converted"]["kl"], calibration["kl"])
        progress(WRITE_SAMPLES, 0, 1)
        return {"quality": quality, "samples": continuations(models, held_out, trust_remote_code=trust)}


def _budget(plan: Plan, source: Source, options: RunOptions) -> MemoryBudget | None:
    """What calibration may hold; None where there is none. Raises RecipeError where it is too little."""
    if plan.calibration is None:
        return None
    from ..calibration.memory_budget import memory_budget
    from ..devices import choose_device

    return memory_budget(plan, source, choose_device(options.device))


def _calibrated(
    plan: Plan,
    source: Source,
    options: RunOptions,
    budget: MemoryBudget | None,
    progress: Progress,
    kept: KeptParts | None = None,
) -> Calibrated:
    if budget is None:
        return Calibrated({}, None, plan)
    from ..calibration.calibrate import calibrate
    from ..calibration.load_source import load_source
    from ..devices import choose_device, within_memory

    device = choose_device(options.device)
    with within_memory("calibration", device, "--device cpu, fewer --calibration-tokens, or --no-calibration"):
        progress(LOAD, 0, 1)
        model = load_source(plan, source, options.trust_remote_code, budget.lean)
        return calibrate(model, plan, source, device, budget, options.seed, options.trust_remote_code, progress, kept)
