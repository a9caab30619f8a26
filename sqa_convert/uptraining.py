"""A short training run that takes a converted model the rest of the way, and a control beside it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from . import processes
from .callers import undisturbed
from .checkpoint import local_folder, resolve, source_config
from .describe import write_report
from .devices import choose_device, device_name, own_device
from .errors import CheckpointError, OutputError, RecipeError, one_line
from .evaluation import compare, load_model, measure, predict
from .families import family_of
from .generation import answer_scores, continuations
from .output import check_output, empty, expanded, sha256_of, staged_output
from .progress import Progress, silent
from .recipe import Recipe, dump_recipe
from .report import read_report
from .run_folder import BECAME, OF, RECIPE, alone, begin, conversion_id, recoverable, run_folder, run_settings
from .shards import write_shard
from .text_fit import misfits
from .training import FINAL, Job, check_settings, train
from .training_data import training_data


@undisturbed
def uptrain(
    folder: str | Path,
    recipe: str | Recipe | None = None,
    *,
    source: str | None = None,
    data: str | None = None,
    device: str = "auto",
    seed: int | None = None,
    evaluate: bool = True,
    control: bool | None = None,
    resume: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Uptrains a folder made by `convert`, in place: it stays as it was until the new weights are complete.

    While it runs, checkpoints are kept in FOLDER.uptraining beside it. Under `torchrun` or `accelerate launch` all
    processes train and the first one writes.

    Args:
        folder: the converted model.
        recipe: a packaged recipe's name, a YAML file, or a Recipe; by default "quick".
        source: the unconverted model, by default the one named in the report.
        data: text to train on instead of the recipe's; its held-out part is measured on.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: instead of the recipe's.
        evaluate: measure source, converted and uptrained on held-out text, and the model as it learns.
        control: also train the source on the same tokens; instead of the recipe's.
        resume: go on with a run that was stopped, by its own recipe.
        restart: throw such a run away.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        The report, with "uptraining" and the rows "uptrained" and, of a control, "control" in "quality".

    Raises:
        RecipeError: the recipe is not possible, or the work does not fit into the device's memory.
        CheckpointError: the folder was not made by `convert`, or the source is missing or another model.
        DataError: the text is missing, too short, or does not fit the model.
        InterruptedByUserError: by Ctrl-C, after a checkpoint.
        QualityError: the loss was no number.
        OutputError: the disk is full.

    After any of them the folder is as it was.

    Source: distillation on the source's logits alone as in Minitron, arXiv 2407.14679.
    """
    folder = expanded(folder, "FOLDER")
    chosen = own_device(choose_device(device))
    processes.join(chosen)
    run = run_folder(folder)
    settings: Any = None
    with processes.together():
        report, conversion = read_report(folder), conversion_id(folder)
        check_output(folder, overwrite=True, flag="FOLDER")
        if processes.is_first():
            settings = run_settings(folder, run, recipe, resume, restart, data=data, seed=seed, control=control)
    settings, first = processes.from_first((settings, conversion))
    with processes.together():
        if conversion != first:
            raise CheckpointError(f"{folder} is another conversion than the one the first process sees under that name")
        origin = _origin(report, source)
        check_settings(settings, evaluate, chosen)
        text = training_data(folder, settings, trust_remote_code=trust_remote_code)
        held_out = text.held_out(chosen) if evaluate else None
    stages = {"uptrain": (folder, settings)}
    if settings.control:
        stages["control"] = (origin, dataclasses.replace(settings, loss="ce", patience=0))
    results: dict[str, Any] = {}
    how_measured: dict[str, Any] = {"untrained": set() if "uptraining" in report else {"converted"}}
    report["seconds"] = {key: spent for key, spent in report["seconds"].items() if key not in ("uptrain", "control")}
    with alone(run, folder), recoverable(run, folder):
        with processes.together():
            if not resume and processes.is_writer():
                empty(run)
            begin(run, folder, settings)
        teacher = expected = None
        if held_out is not None or settings.ce < 1:
            teacher = load_model(origin, dtype="float32", trust_remote_code=trust_remote_code)
            if held_out is not None:
                expected = predict(teacher, held_out)
                fit = held_out.fit(teacher, measure(expected).loss)
                for doubt in misfits(fit, "--data"):
                    progress("uptrain", 0, settings.steps, f"warning: {doubt['text']}")
                how_measured |= {"own": fit.own_loss}
        job = Job(text, held_out, expected, chosen, trust_remote_code)
        for stage, (path, how) in stages.items():
            if how.ce == 1:
                teacher = None
            results[stage] = train(path, teacher, how, job, run / stage, partial(progress, stage))
            report["seconds"][stage] = results[stage]["seconds"]
        del teacher
        if processes.is_first():
            report["uptraining"] = dataclasses.asdict(settings) | results["uptrain"] | {"device": device_name(chosen)}
            if settings.control:
                report["uptraining"]["control_curve"] = results["control"]["curve"]
            _publish(folder, run, report, settings, job, origin, progress, how_measured)
        elif processes.apart():
            report["uptrained_on"] = processes.first_host()
    return report


def check_uptrain(
    folder: str | Path,
    recipe: str | Recipe | None = None,
    *,
    source: str | None = None,
    device: str = "auto",
    evaluate: bool = True,
    resume: bool = False,
    restart: bool = False,
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
    settings = run_settings(folder, run_folder(folder), recipe, resume, restart)
    chosen = own_device(choose_device(device))
    check_settings(settings, evaluate, chosen)
    if local_folder(source or report["source"]["name"], None if source else report["source"]["revision"]) is not None:
        _origin(report, source)
    text = training_data(folder, settings, tokens=settings.sequence_length, trust_remote_code=trust_remote_code)
    if evaluate:
        text.held_out(chosen)
    return settings


def _publish(
    folder: Path,
    run: Path,
    report: dict[str, Any],
    settings: Recipe,
    job: Job,
    origin: Path,
    progress: Progress,
    how_measured: dict[str, Any],
) -> None:
    """The trained model in the place of the converted one, measured beside the others."""
    if conversion_id(folder) != (run / OF).read_text():
        raise OutputError(f"{folder} was converted anew while it was trained")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with staged_output(folder, overwrite=True, size=size) as staging:
        _save(load_model(run / "uptrain" / FINAL, dtype="float32"), folder, staging)
        (staging / RECIPE).write_text(dump_recipe(settings), encoding="utf-8")
        report["sha256"] = {path.name: sha256_of(path) for path in sorted(staging.glob("*.safetensors"))}
        report.pop("reloaded", None)  # that was of the old weights
        known = report.get("quality", {})
        if job.held_out is None:
            report["quality"] = {key: known[key] for key in known if key not in ("uptrained", "control")}
        else:
            start = time.perf_counter()
            rows = {"source": origin, "converted": folder, "uptrained": staging}
            if settings.control:
                rows["control"] = run / "control" / FINAL
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


def _origin(report: dict[str, Any], source: str | None) -> Path:
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
