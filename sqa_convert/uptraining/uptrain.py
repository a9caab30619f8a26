"""A short training run that takes a converted model the rest of the way, and a control beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..caller_settings import undisturbed
from ..checkpoints.find import local_folder
from ..checkpoints.staging import check_output, empty, expanded
from ..devices import choose_device, own_device
from ..errors import CheckpointError
from ..evaluation.load import Converted
from ..progress import Progress, Stages, in_notebooks, no_bars_of_others, told_within
from ..report.provenance import asked_from_python
from ..report.report_from_config import with_report
from ..report.report_json import read_report
from ..text.collate import PairCollator
from ..text.documents import GIVEN, SELF, is_own
from ..text.python_data import is_named, repeatable
from . import processes
from .data import TrainingData, training_data, with_text_named
from .find_source import find_source
from .models_in_memory import in_folder
from .put_in_place import note_training, put_in_place
from .recipe import Recipe
from .run_folder import Run, alone, begin, conversion_id, goes_on, recoverable, run_folder, run_recipe, target_folder
from .self_generated_rows import read_own_text, write_own_text
from .train_and_control import train_all
from .train_one_model import Job
from .trainer_arguments import check_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@undisturbed
@asked_from_python
def uptrain(
    model: str | Path | PreTrainedModel | Converted,
    recipe: str | Path | Recipe | None = None,
    *,
    source: str | Path | PreTrainedModel | Converted | None = None,
    data: Any = None,
    text_column: str | None = None,
    device: str = "auto",
    seed: int | None = None,
    evaluate: bool = True,
    control: bool | None = None,
    resume: bool = False,
    restart: bool = False,
    output: str | Path | None = None,
    keep_anyway: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = in_notebooks,
) -> dict[str, Any]:
    """Uptrains a converted model, in place: it stays as it was until the new weights are complete.

    Of the measurements of a run the best is kept: by KL to the source, with loss "ce" by the held-out loss. Where none
    is as good as the start the folder stays as it was, and what was trained stays in FOLDER.uptraining.

    While it runs, checkpoints are kept in FOLDER.uptraining beside it. Under `torchrun` or `accelerate launch` all
    processes train and the first one writes.

    Args:
        model: what `convert` returned, the folder it made, or a converted model in memory, which has no checkpoints
            that outlast the call.
        recipe: a packaged recipe's name, a YAML file, or a Recipe; by default "quick".
        source: the unconverted model, by default the one named in the report.
        data: to train on instead of the recipe's, as `sqa_convert.text.documents.documents` takes it; its held-out
            part is measured on. A run that goes on is given again what was no name.
        text_column: of that, where it is a table, instead of the recipe's.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: instead of the recipe's.
        evaluate: measure source, converted and uptrained on held-out text, and the model as it learns.
        control: also train the source on the same tokens; instead of the recipe's.
        resume: go on with a run that was stopped, by its own recipe.
        restart: throw such a run away.
        output: a new folder for the result, instead of the place of `model`.
        keep_anyway: take what was trained even if it is worse than the start; alone, that of the run that ended so.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        The report, with "uptraining" and the rows "uptrained" and, of a control, "control" in "quality".

    Raises:
        RecipeError: the recipe is not possible, or the work does not fit into the device's memory.
        CheckpointError: the folder was not made by `convert`, or the source is missing or another model.
        DataError: the text is missing, too short, or does not fit the model.
        InterruptedByUserError: by Ctrl-C, after a checkpoint.
        QualityError: the model got worse, or the loss went far up or was no number.
        OutputError: `output` exists already, or the disk is full.

    After any of them the folder is as it was.

    Source: distillation on the source's logits alone as in Minitron, arXiv 2407.14679.
    """
    output = None if output is None else expanded(output)
    chosen = own_device(choose_device(device))
    processes.join(chosen)
    data = repeatable(data)
    given, named = (None, data) if is_named(data) else (data, None if resume else GIVEN)
    changes = {"data": named, "text_column": text_column, "seed": seed, "control": control}
    with in_folder(model, source, output, resume) as (folder, source):
        decision = _decided(folder, source, recipe, resume, restart, output, keep_anyway, **changes)
        report = read_report(folder)
        run, job = _prepared(folder, report, source, decision, given, chosen, evaluate, keep_anyway, trust_remote_code)
        report = _carry_out(run, job, report, decision.resume, progress)
    if isinstance(model, Converted):
        model.report, model.output = report, output or model.output
    return report


def _prepared(
    folder: Path, report: dict[str, Any], source: Any, decision: _Decision, given: Any, device: torch.device,
    evaluate: bool, keep_anyway: bool, trust_remote_code: bool,
) -> tuple[Run, Job]:  # fmt: skip
    """Recipe, text and source of a run; raises what can be known before a weight is trained."""
    with processes.together():
        found = find_source(report, source, decision.recipe)
        run = Run(folder, found, decision.target, decision.recipe, "uptraining" in report)
        check_recipe(run.recipe, evaluate, device)
        named = with_text_named(run.recipe, run.source, trust_remote_code) if processes.is_first() else run.recipe
    run = dataclasses.replace(run, recipe=processes.from_first(named))
    with processes.together():
        text = training_data(folder, run.recipe, data=given, trust_remote_code=trust_remote_code, source=run.source)
        held_out = text.held_out(device) if evaluate else None
    return run, Job(text, held_out, None, device, trust_remote_code, keep_anyway)


def _carry_out(run: Run, job: Job, report: dict[str, Any], resume: bool, told: Progress) -> dict[str, Any]:
    """Trains, and puts the result in its place; returns its report."""
    progress = Stages(told, run.recipe.stages(job.held_out is not None))
    owned, kept = alone(run.checkpoints, run.folder), recoverable(run.checkpoints, run.folder)
    with no_bars_of_others(), told_within(progress), owned, kept:
        with processes.together():
            if not resume and processes.is_writer():
                empty(run.checkpoints)
            begin(run)
        if run.recipe.data == SELF:
            text = _with_own_text(run, job.text, job.device, job.trust_remote_code, progress)
            job = dataclasses.replace(job, text=text)
        results, own_loss = train_all(run, job, progress)
        with processes.together():  # none says that it is done before it is
            if processes.is_first():
                note_training(report, run.recipe, results, job.text, job.device)
                if run.target != run.folder:
                    report["output"] = str(run.target)
                put_in_place(run, report, job, own_loss, progress)
        if processes.apart():
            report["uptrained_on"] = f"{run.target} on {processes.first_host()}"
    return report


def _decided(folder: Path, source: Any, *asked: Any, **changes: Any) -> _Decision:
    """What the first process decides, in all of them; arguments as of `_decide`."""
    with processes.together():
        if processes.is_writer():
            with_report(folder, source)
    with processes.together():
        conversion = conversion_id(folder)
        check_output(folder, overwrite=True, flag="FOLDER")
        decision = _decide(folder, *asked, **changes) if processes.is_first() else None
    decision = processes.from_first(decision)
    assert decision is not None
    with processes.together():
        if conversion != decision.conversion:
            raise CheckpointError(f"{folder} is another conversion than the one the first process sees under that name")
    return decision


def check_uptrain(
    folder: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    source: str | Path | None = None,
    device: str = "auto",
    evaluate: bool = True,
    resume: bool = False,
    restart: bool = False,
    output: str | Path | None = None,
    keep_anyway: bool = False,
    trust_remote_code: bool = False,
) -> Recipe:
    """Raises what `uptrain` would raise before it reads a weight; arguments and errors are its own.

    The source is looked at if it lies here; nothing is downloaded.

    Returns:
        The recipe as it would run.
    """
    folder = expanded(folder, "FOLDER")
    with_report(folder, source)
    report = read_report(folder)
    check_output(folder, overwrite=True, flag="FOLDER")
    output = None if output is None else expanded(output)
    settled = _decide(folder, recipe, resume, restart, output, keep_anyway).recipe
    chosen = own_device(choose_device(device))
    check_recipe(settled, evaluate, chosen)
    if local_folder(source or report["source"]["name"], None if source else report["source"]["revision"]) is not None:
        find_source(report, source, settled)
    text = training_data(folder, settled, tokens=settled.sequence_length, trust_remote_code=trust_remote_code)
    if evaluate and not is_own(settled.data):  # else weights are needed for it
        text.held_out(chosen)
    return settled


def _with_own_text(
    run: Run, text: TrainingData, device: torch.device, trust_remote_code: bool, progress: Progress
) -> TrainingData:
    """With the rows that the source writes; one process writes them, for all that see its disk."""
    with processes.together():
        if processes.is_writer():
            write_own_text(run, text.measured.tokenizer, device, progress, trust_remote_code)
    with processes.together():
        return dataclasses.replace(text, content=read_own_text(run, pairs=isinstance(text.collate, PairCollator)))


class _Decision(NamedTuple):
    """What the first process decides for all."""

    conversion: str
    """the id of the model to train, which must be the same everywhere"""
    recipe: Recipe
    target: Path
    """where the result goes"""
    resume: bool
    """whether the run goes on with one that was stopped"""


def _decide(
    folder: Path,
    recipe: str | Path | Recipe | None,
    resume: bool,
    restart: bool,
    output: Path | None,
    keep_anyway: bool,
    **changes: Any,
) -> _Decision:
    """Raises RecipeError, or OutputError when `output` exists."""
    resume = goes_on(folder, resume, keep_anyway, recipe, restart or None, *changes.values())
    target = target_folder(folder, output, resume)
    settled = run_recipe(folder, run_folder(folder), recipe, resume, restart, **changes)
    if target != folder:
        check_output(target, overwrite=False, way_out="give another")
    return _Decision(conversion_id(folder), settled, target, resume)
