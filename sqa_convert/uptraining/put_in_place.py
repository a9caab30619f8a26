"""The result of a run: the trained model measured beside the others, and put in its place."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoints.safetensors_writer import write_shard
from ..checkpoints.small_files import sha256_of
from ..checkpoints.staging import staged_output
from ..devices import device_name
from ..errors import OutputError
from ..evaluation.evaluate import compare
from ..evaluation.generation import answer_scores, continuations
from ..evaluation.hidden_states import compare_hidden_states, load_any
from ..evaluation.load import load_model
from ..progress import Stages
from ..report.formatting import nats
from ..report.provenance import origin
from ..report.write import write_report
from .data import TrainingData
from .recipe import Recipe, dump_recipe
from .run_folder import BECAME, OF, RECIPE, NotBetterError, Run, conversion_id
from .train_one_model import FINAL, Job


def note_training(
    report: dict[str, Any],
    recipe: Recipe,
    results: dict[str, dict[str, Any]],
    text: TrainingData,
    device: torch.device,
) -> None:
    """Puts into a report what was trained, and how long it took."""
    spent = {stage: result["seconds"] for stage, result in results.items()}
    others = {stage: seconds for stage, seconds in report["seconds"].items() if stage not in ("uptrain", "control")}
    report["seconds"] = others | spent
    report["uptraining"] = dataclasses.asdict(recipe) | results["uptrain"] | {"device": device_name(device)} | origin()
    if text.skipped.rows:
        report["uptraining"]["skipped_rows"] = text.skipped.rows
    if recipe.control:
        report["uptraining"]["control_curve"] = results["control"]["curve"]


def put_in_place(run: Run, report: dict[str, Any], job: Job, own_loss: float | None, progress: Stages) -> None:
    """Puts the trained model at `run.target`, mostly the converted one's own place, measured beside the others.

    Args:
        run: what was trained.
        report: of the converted model; it becomes that of the trained one.
        job: of the run's trainings.
        own_loss: the source's loss on what it writes itself, None where nothing is measured.
        progress: is told of the measuring.

    Raises:
        NotBetterError: it is worse than the converted model.
        OutputError: it cannot be written, or the converted model was replaced meanwhile.
    """
    if conversion_id(run.folder) != (run.checkpoints / OF).read_text():
        raise OutputError(f"{run.folder} was converted anew while it was trained")
    size = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    with staged_output(run.target, overwrite=run.target == run.folder, size=size) as staging:
        _save(load_any(run.checkpoints / "uptrain" / FINAL, dtype="float32"), run.folder, staging)
        (staging / RECIPE).write_text(dump_recipe(run.recipe), encoding="utf-8")
        report["sha256"] = {path.name: sha256_of(path) for path in sorted(staging.glob("*.safetensors"))}
        report.pop("reloaded", None)  # that was of the old weights
        if job.held_out is None:
            rows = report.get("quality", {})
            report["quality"] = {name: rows[name] for name in rows if name not in ("uptrained", "control")}
        else:
            report.pop("not_measured", None)  # it is now, on other text
            start = time.perf_counter()
            _measure(run, staging, report, job, own_loss, progress)
            report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        progress("draw report", 0, 1)
        report["uptraining"]["stages"] = progress.seconds()
        write_report(staging, report)
        (run.checkpoints / BECAME).write_text(conversion_id(staging))


def _measure(
    run: Run, trained: Path, report: dict[str, Any], job: Job, own_loss: float | None, progress: Stages
) -> None:
    """Puts into a report how well source, converted and trained model predict, and what they write.

    Raises NotBetterError.
    """
    assert job.held_out is not None
    models: dict[str, Any] = {"source": run.source, "converted": run.folder, "uptrained": trained}
    if run.recipe.loss == "hidden":
        quality = compare_hidden_states(
            models, job.held_out, trust_remote_code=job.trust_remote_code, progress=progress
        )
        _check_gain(run, job, quality)
        _put_quality(report, quality)
        return
    control = {}
    if run.recipe.control:  # which was saved as it was trained; `compare` measures it in the source's dtype
        control = {"control": partial(load_model, run.checkpoints / "control" / FINAL)}
    quality = compare(
        models | control,
        job.held_out,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
        also=_answer_scores(job) if run.recipe.columns else None,
        untrained=set() if run.trained_before else {"converted"},
        own=own_loss,
        gains={"uptrained": "converted"},
        spelled_by={"uptrained": trained},
    )
    _check_gain(run, job, quality)
    _put_quality(report, quality)
    progress("write samples", 0, 1)
    report["samples"] = continuations(models, job.held_out, trust_remote_code=job.trust_remote_code)


def _check_gain(run: Run, job: Job, quality: dict[str, Any]) -> None:
    """Raises NotBetterError."""
    before, after = quality["converted"], quality["uptrained"]
    if not job.keep_anyway and after[run.recipe.judged_by] > before[run.recipe.judged_by]:
        raise not_better(run, before, after)


def _put_quality(report: dict[str, Any], quality: dict[str, Any]) -> None:
    """Puts what was measured into a report, beside what it knows of the same text."""
    known = report.get("quality", {})
    if all(known.get(key) == quality[key] for key in ("data", "tokens")):
        if "uptrained" in known:  # the folder was trained before, and this run went on from there
            quality |= {"before": quality["converted"], "converted": known["converted"]}
        if "mean" in known:
            quality["mean"] = known["mean"]
    report["quality"] = quality


def _answer_scores(job: Job) -> Callable[[Any], dict[str, float]]:
    return partial(answer_scores, tokenizer=job.text.measured.tokenizer, held_out=job.held_out)


def not_better(run: Run, start: dict[str, float], best: dict[str, float]) -> NotBetterError:
    """What to say of a run whose best measurement is worse than the start."""
    recipe = run.recipe
    before, after = start[recipe.judged_by], best[recipe.judged_by]
    if recipe.judged_by == "error":
        measured = f"error of the hidden state {before:.3%} at the start, {after:.3%} at best"
    else:
        name = {"kl": "KL to the source", "loss": "held-out loss"}[recipe.judged_by]
        measured = f"{name} {nats(before)} at the start, {nats(after)} at best"
        measured += f" (loss {nats(start['loss'])}, then {nats(best['loss'])})"
    return NotBetterError(
        f"uptraining made it worse: {measured}; {run.folder} is as it was. Try a learning_rate below "
        f"{recipe.learning_rate:g}, or more tokens (--restart). What was trained is in {run.checkpoints}; to take it: "
        f"sqa-uptrain {run.folder} --keep-anyway"
    )


def _save(model: Any, folder: Path, staging: Path) -> None:
    """A folder with the weights of a model, in the dtypes, names and files of another; all else is copied from there.

    Weights that are no part of the model are copied too.
    """
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
                    tied = any(new.data_ptr() == other.data_ptr() for other in tensors.values())
                    tensors[name] = new.clone() if tied else new
            write_shard(staging / path.name, tensors)
