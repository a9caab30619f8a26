"""A short training run that takes a converted model the rest of the way, and a control beside it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoints.files import sha256_of
from ..checkpoints.find import local_folder, open_source, resolve, source_config
from ..checkpoints.fingerprint import unlike
from ..checkpoints.safetensors_writer import write_shard
from ..checkpoints.staging import check_output, empty, expanded, staged_output
from ..devices import choose_device, device_name, own_device
from ..errors import CheckpointError, OutputError, RecipeError, one_line
from ..evaluation.generation import answer_scores, continuations
from ..evaluation.load import load_model
from ..evaluation.quality import compare, measure, predict
from ..families import family_of
from ..isolation import undisturbed
from ..progress import Progress, silent
from ..report.content import read_report
from ..report.formatting import nats
from ..report.write import write_report
from ..text.suitability import misfits
from . import processes
from .arguments import check_settings, uses_bfloat16
from .data import TrainingData, training_data
from .recipe import Recipe, dump_recipe
from .run_folder import (
    BECAME,
    OF,
    RECIPE,
    NotBetterError,
    alone,
    begin,
    conversion_id,
    goes_on,
    recoverable,
    run_folder,
    run_settings,
    target_folder,
)
from .train import FINAL, Job, train


@undisturbed
def uptrain(
    folder: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    source: str | Path | None = None,
    data: str | Path | None = None,
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
    progress: Progress = silent,
) -> dict[str, Any]:
    """Uptrains a folder made by `convert`, in place: it stays as it was until the new weights are complete.

    Of the measurements of a run the best is kept: by KL to the source, with loss "ce" by the held-out loss. Where none
    is as good as the start the folder stays as it was, and what was trained stays in FOLDER.uptraining.

    While it runs, checkpoints are kept in FOLDER.uptraining beside it. Under `torchrun` or `accelerate launch` all
    processes train and the first one writes.

    Args:
        folder: the converted model.
        recipe: a packaged recipe's name, a YAML file, or a Recipe; by default "quick".
        source: the unconverted model, by default the one named in the report.
        data: text to train on instead of the recipe's; its held-out part is measured on.
        text_column: of that, where it is a table, instead of the recipe's.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: instead of the recipe's.
        evaluate: measure source, converted and uptrained on held-out text, and the model as it learns.
        control: also train the source on the same tokens; instead of the recipe's.
        resume: go on with a run that was stopped, by its own recipe.
        restart: throw such a run away.
        output: a new folder for the result, instead of the place of `folder`.
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
    folder = expanded(folder, "FOLDER")
    chosen = own_device(choose_device(device))
    processes.join(chosen)
    run = run_folder(folder)
    settings: Any = None
    target = folder if output is None else expanded(output)
    with processes.together():
        report, conversion = read_report(folder), conversion_id(folder)
        check_output(folder, overwrite=True, flag="FOLDER")
        if processes.is_first():
            overrides = {"data": data, "text_column": text_column, "seed": seed, "control": control}
            resume = goes_on(folder, resume, keep_anyway, recipe, restart or None, *overrides.values())
            target = target_folder(folder, None if output is None else target, resume)
            settings = run_settings(folder, run, recipe, resume, restart, **overrides)
            if target != folder:
                check_output(target, overwrite=False, way_out="give another")
    settings, first, target, resume = processes.from_first((settings, conversion, target, resume))
    with processes.together():
        if conversion != first:
            raise CheckpointError(f"{folder} is another conversion than the one the first process sees under that name")
        origin = _origin(report, source)
        check_settings(settings, evaluate, chosen)
        text = training_data(folder, settings, trust_remote_code=trust_remote_code)
        held_out = text.held_out(chosen) if evaluate else None
    untrained = set() if "uptraining" in report else {"converted"}
    with alone(run, folder), recoverable(run, folder):
        with processes.together():
            if not resume and processes.is_writer():
                empty(run)
            begin(run, folder, settings, target)
        job = Job(text, held_out, None, chosen, trust_remote_code, keep_anyway)
        results, how_measured = _trained(folder, origin, run, settings, job, progress)
        how_measured["untrained"] = untrained
        with processes.together():  # none says that it is done before it is
            if processes.is_first():
                _note(report, settings, results, text, chosen)
                if target != folder:
                    report["output"] = str(target)
                _publish(folder, run, report, settings, job, origin, progress, how_measured, target)
        if processes.apart():
            report["uptrained_on"] = f"{target} on {processes.first_host()}"
    return report


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

    Whether the unconverted model fits is looked at where it lies here, and nothing is downloaded for it.

    Returns:
        The recipe as it would run.
    """
    folder = expanded(folder, "FOLDER")
    report = read_report(folder)
    check_output(folder, overwrite=True, flag="FOLDER")
    resume = goes_on(folder, resume, keep_anyway, recipe, restart or None)
    target = target_folder(folder, None if output is None else expanded(output), resume)
    settings = run_settings(folder, run_folder(folder), recipe, resume, restart)
    if target != folder:
        check_output(target, overwrite=False, way_out="give another")
    chosen = own_device(choose_device(device))
    check_settings(settings, evaluate, chosen)
    if local_folder(source or report["source"]["name"], None if source else report["source"]["revision"]) is not None:
        _origin(report, source)
    text = training_data(folder, settings, tokens=settings.sequence_length, trust_remote_code=trust_remote_code)
    if evaluate:
        text.held_out(chosen)
    return settings


def _trained(
    folder: Path, origin: Path, run: Path, settings: Recipe, job: Job, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The trainings of a run: of the model, and of the control for as many tokens as were kept.

    Returns what came of each, and how `compare` is to measure.

    Raises NotBetterError when no measurement of the model was as good as the start.
    """
    teacher, held_out = None, job.held_out
    how_measured: dict[str, Any] = {}
    if held_out is not None or settings.ce < 1:
        teacher = load_model(origin, dtype="float32", trust_remote_code=job.trust_remote_code)
    if held_out is not None:
        # The same arithmetic for both: else a model that is the source would be a little away from it.
        bfloat16 = uses_bfloat16(settings, job.device)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bfloat16):
            expected = predict(teacher, held_out)
        job = dataclasses.replace(job, expected=expected)
        fit = held_out.fit(teacher, measure(expected).loss)
        for doubt in misfits(fit, "--data"):
            progress("uptrain", 0, settings.steps, f"warning: {doubt['text']}")
        how_measured["own"] = fit.own_loss
    if settings.ce == 1:
        teacher = None
    results = {"uptrain": train(folder, teacher, settings, job, run / "uptrain", partial(progress, "uptrain"))}
    done = results["uptrain"]
    if job.held_out is None:
        done["kept"] = "the end: nothing was measured to choose by"
    if not (done.get("better", True) or job.keep_anyway):
        start, best = (
            next(point for point in done["curve"] if point["tokens"] == steps * settings.tokens_per_step)
            for steps in (0, done["kept_steps"])
        )
        raise _not_better(folder, run, settings, start, best)
    if settings.control:
        del teacher
        how = dataclasses.replace(settings, loss="ce", patience=0)
        job = dataclasses.replace(job, until=done.get("kept_steps", settings.steps))
        results["control"] = train(origin, None, how, job, run / "control", partial(progress, "control"))
    return results, how_measured


def _note(
    report: dict[str, Any],
    settings: Recipe,
    results: dict[str, dict[str, Any]],
    text: TrainingData,
    device: torch.device,
) -> None:
    """Puts into a report what was trained, and how long it took."""
    spent = {stage: result["seconds"] for stage, result in results.items()}
    kept = {key: value for key, value in report["seconds"].items() if key not in ("uptrain", "control")}
    report["seconds"] = kept | spent
    report["uptraining"] = dataclasses.asdict(settings) | results["uptrain"] | {"device": device_name(device)}
    if text.skipped.rows:
        report["uptraining"]["skipped_rows"] = text.skipped.rows
    if settings.control:
        report["uptraining"]["control_curve"] = results["control"]["curve"]


def _not_better(folder: Path, run: Path, settings: Recipe, start: Any, best: Any) -> NotBetterError:
    """What to say of a run whose best measurement is worse than the start."""
    name = {"kl": "KL to the source", "loss": "held-out loss"}[settings.judged_by]
    before, after = start[settings.judged_by], best[settings.judged_by]
    return NotBetterError(
        f"uptraining made it worse: {name} {nats(before)} at the start, {nats(after)} at best (loss "
        f"{nats(start['loss'])}, then {nats(best['loss'])}); {folder} is as it was. Try a learning_rate below "
        f"{settings.learning_rate:g}, or more tokens (--restart). What was trained is in {run}; to take it: "
        f"sqa-uptrain {folder} --keep-anyway"
    )


def _publish(
    folder: Path,
    run: Path,
    report: dict[str, Any],
    settings: Recipe,
    job: Job,
    origin: Path,
    progress: Progress,
    how_measured: dict[str, Any],
    target: Path,
) -> None:
    """The trained model at `target`, mostly in the place of the converted one, measured beside the others.

    Raises NotBetterError when it is worse.
    """
    if conversion_id(folder) != (run / OF).read_text():
        raise OutputError(f"{folder} was converted anew while it was trained")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with staged_output(target, overwrite=target == folder, size=size) as staging:
        _save(load_model(run / "uptrain" / FINAL, dtype="float32"), folder, staging)
        (staging / RECIPE).write_text(dump_recipe(settings), encoding="utf-8")
        report["sha256"] = {path.name: sha256_of(path) for path in sorted(staging.glob("*.safetensors"))}
        report.pop("reloaded", None)  # that was of the old weights
        if job.held_out is not None:
            report.pop("not_measured", None)  # it is now, on other text
        known = report.get("quality", {})
        if job.held_out is None:
            report["quality"] = {key: known[key] for key in known if key not in ("uptrained", "control")}
        else:
            start = time.perf_counter()
            rows: dict[str, Any] = {"source": origin, "converted": folder, "uptrained": staging}
            if settings.control:  # which was saved as it was trained; `compare` measures it in the source's dtype
                rows["control"] = partial(load_model, run / "control" / FINAL)
            scores = partial(answer_scores, tokenizer=job.text.tokenizer, held_out=job.held_out)
            report["quality"] = compare(
                rows,
                job.held_out,
                trust_remote_code=job.trust_remote_code,
                progress=progress,
                also=scores if settings.pairs else None,
                **how_measured,
            )
            quality = report["quality"]
            before, after = quality["converted"], quality["uptrained"]
            if not job.keep_anyway and after[settings.judged_by] > before[settings.judged_by]:
                raise _not_better(folder, run, settings, before, after)
            if all(known.get(key) == quality[key] for key in ("data", "tokens")):
                if "uptrained" in known:  # the folder was trained before, and this run went on from there
                    quality |= {"before": quality["converted"], "converted": known["converted"]}
                if "mean" in known:
                    quality["mean"] = known["mean"]
            shown = {name: rows[name] for name in ("source", "converted", "uptrained")}
            report["samples"] = continuations(shown, job.held_out, trust_remote_code=job.trust_remote_code)
            report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        write_report(staging, report)
        (run / BECAME).write_text(conversion_id(staging))


def _origin(report: dict[str, Any], source: str | Path | None) -> Path:
    """The folder of the unconverted model. Raises CheckpointError when it is not there, or is not that."""
    try:
        origin = resolve(source) if source else resolve(report["source"]["name"], report["source"]["revision"])
    except CheckpointError as error:
        raise CheckpointError(f"{one_line(error)} (the unconverted model; --source names it)") from error
    config = source_config(str(origin), origin)
    if "sqa" in config:
        raise CheckpointError(f"--source {origin} is a converted model; it takes the unconverted one")
    family = family_of(config)
    architecture = family.source_architecture(config)
    if architecture != report["source"]["architecture"]:
        raise CheckpointError(
            f"--source {origin} is a {architecture}, this model was made from a {report['source']['architecture']}"
        )
    if known := report.get("source_weights"):  # older reports have none
        opened = open_source(str(origin))
        names = {family.canonical(name): name for name in opened.index}
        other = unlike(known, opened, {canonical: name for canonical, name in names.items() if canonical})
        if other is not None:
            raise CheckpointError(
                f"--source {origin} holds other weights than this model was made from ({other} differs): give those it "
                "was made from, in the dtype they had, or convert these"
            )
    if not family.has_language_model_head(config):
        raise RecipeError(f"a {architecture} has no language model head to train")
    return origin


def _save(model: Any, folder: Path, staging: Path) -> None:
    """New weights in the dtypes, names and files of the old ones; everything else is copied, with weights that are no
    part of the model."""
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, staging / path.name, symlinks=True)
        elif path.suffix != ".safetensors":
            shutil.copyfile(path, staging / path.name)
        else:
            tensors: dict[str, Any] = {}
            with safe_open(path, framework="pt", backend="pread") as old:
                for name in old.keys():  # noqa: SIM118 - not a dict
                    before = old.get_tensor(name)
                    new = state.get(name, state.get(name.removeprefix(prefix), before))
                    new = new.detach().cpu().to(before.dtype).contiguous()
                    twice = any(new.data_ptr() == other.data_ptr() for other in tensors.values())  # a tie, stored so
                    tensors[name] = new.clone() if twice else new
            write_shard(staging / path.name, tensors)
