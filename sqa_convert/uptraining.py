"""A short training run that takes a converted model the rest of the way, and a control beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import read_config, resolve
from .errors import CheckpointError, InterruptedByUserError, OutputError, QualityError, RecipeError, one_line
from .evaluation import choose_device, compare, device_name, load_model
from .execution import Progress, silent
from .families import family_of
from .generation import answer_scores
from .output import staged_output, write_shard
from .recipe import Recipe, dump_recipe, load_recipe
from .report import read_report, write_report
from .trainer import COMPLETE
from .training import check_settings, is_first, step_of, train
from .training_data import training_data

RECIPE = "recipe.yaml"


def uptrain(
    folder: str | Path,
    recipe: str | Recipe = "quick",
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
        recipe: a packaged recipe's name, a YAML file, or a Recipe.
        source: the unconverted model, by default the one named in the report.
        data: text to train on instead of the recipe's; its held-out part is measured on.
        device: "auto", "cpu", "cuda", "mps".
        seed: instead of the recipe's.
        evaluate: measure source, converted and uptrained on held-out text, and the model as it learns.
        control: also train the source on the same tokens; instead of the recipe's.
        resume: go on with a run that was stopped, by its own recipe.
        restart: throw such a run away.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        The report, with "uptraining" and the new rows of "quality".

    Raises:
        RecipeError, CheckpointError, DataError: see `sqa_convert.errors`; nothing was written.
        InterruptedByUserError: by Ctrl-C, after a checkpoint.
        QualityError: the loss was no number.
        OutputError: the disk is full.
    """
    folder = Path(folder)
    report = read_report(folder)
    run = run_folder(folder)
    settings = _settings(run, recipe, resume, restart, data=data, seed=seed, control=control)
    origin = _origin(report, source)
    chosen = choose_device(device)
    check_settings(settings, evaluate)
    text = training_data(folder, settings, trust_remote_code=trust_remote_code)
    held_out = text.held_out(chosen) if evaluate else None
    if restart and is_first():
        shutil.rmtree(run, ignore_errors=True)

    start = time.perf_counter()
    trained = {"uptrained": ("uptrain", folder, settings)}
    if settings.control:
        trained["control"] = ("control", origin, dataclasses.replace(settings, loss="ce"))
    results: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, (stage, path, how) in trained.items():
        teacher = None
        if held_out is not None or how.ce < 1:
            teacher = load_model(origin, dtype="float32", trust_remote_code=trust_remote_code)
        with _recoverable(run, folder):
            _begin(run, settings)
            models[name], results[name] = train(
                path,
                teacher,
                how,
                text,
                held_out,
                run / stage,
                chosen,
                trust_remote_code,
                partial(progress, stage),
            )
        report["seconds"][stage] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
    if not is_first():
        return report

    size = sum(path.stat().st_size for path in folder.iterdir())
    with staged_output(folder, overwrite=True, size=size) as staging:
        _save(models.pop("uptrained"), folder, staging)
        (staging / RECIPE).write_text(dump_recipe(settings), encoding="utf-8")
        report["uptraining"] = dataclasses.asdict(settings) | results["uptrained"] | {"device": device_name(chosen)}
        if settings.control:
            report["uptraining"]["control_curve"] = results["control"]["curve"]
        if held_out is not None:
            rows = {"source": origin, "converted": folder, "uptrained": staging, **models}
            also: Any = {"also": partial(answer_scores, tokenizer=text.tokenizer, held_out=held_out)}
            report["quality"] = compare(
                rows,
                held_out,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **(also if settings.pairs else {}),
            )
            report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        write_report(staging, report)
    shutil.rmtree(run, ignore_errors=True)
    return report


def run_folder(folder: Path) -> Path:
    """Where the checkpoints of a model's uptraining are, while it is not done."""
    return folder.resolve().parent / f"{folder.resolve().name}.uptraining"


def _settings(run: Path, recipe: str | Recipe, resume: bool, restart: bool, **overrides: Any) -> Recipe:
    """The recipe of a run: of one to go on with its own. Raises RecipeError."""
    unfinished = run / RECIPE
    if resume:
        if not unfinished.is_file():
            raise RecipeError(f"--resume: there is no {run}, so no run that was stopped")
        return load_recipe(str(unfinished))
    settings = override(recipe, **overrides)
    if not restart and any(run.glob(f"*/checkpoint-*/{COMPLETE}")):
        raise RecipeError(f"{run} holds a run that was stopped: --resume goes on with it, --restart throws it away")
    return settings


def override(recipe: str | Recipe, **settings: Any) -> Recipe:
    """A recipe with the settings that are not None. Raises RecipeError."""
    if isinstance(recipe, str):
        return load_recipe(recipe, **settings)
    return dataclasses.replace(recipe, **{key: value for key, value in settings.items() if value is not None})


def _origin(report: dict[str, Any], source: str | None) -> Path:
    """The folder of the unconverted model. Raises CheckpointError when it is not there, or is not that."""
    try:
        origin = resolve(source) if source else resolve(report["source"]["name"], report["source"]["revision"])
    except CheckpointError as error:
        raise CheckpointError(f"{one_line(error)} (the unconverted model; --source names it)") from error
    config = read_config(str(origin), origin)
    if "sqa" in config:
        raise CheckpointError(f"--source {origin} is a converted model; it takes the unconverted one")
    architecture = family_of(config).source_architecture(config)
    if architecture != report["source"]["architecture"]:
        raise CheckpointError(
            f"--source {origin} is a {architecture}, this model was made from a {report['source']['architecture']}"
        )
    return origin


@contextlib.contextmanager
def _recoverable(run: Path, folder: Path) -> Iterator[None]:
    """What stops a training is said in one line, with what was kept of it."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedByUserError(f"interrupted; {_kept(run, folder)}") from error
    except QualityError as error:
        raise QualityError(f"{one_line(error)}; {_kept(run, folder)}") from error
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"out of memory on the device: lower micro_batch or sequence_length, or set gradient_checkpointing "
            f"({_kept(run, folder)})"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, (CheckpointError, OutputError)):
            raise
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "PytorchStreamWriter" in str(error)
        if full or any(text in str(error) for text in ("No space left", "File too large", "Disk quota exceeded")):
            raise OutputError(f"{run} cannot be written, the disk is full; {_kept(run, folder)}") from error
        if isinstance(error, OSError):
            raise OutputError(f"{run} cannot be written: {one_line(error)}; {_kept(run, folder)}") from error
        raise


def _kept(run: Path, folder: Path) -> str:
    last = max((step_of(path) for path in run.glob(f"*/checkpoint-*/{COMPLETE}")), default=None)
    if last is None:
        shutil.rmtree(run, ignore_errors=True)
        return f"{folder} is still the converted model"
    return f"{folder} is still the converted model; go on from step {last} with: sqa-uptrain {folder} --resume"


def _begin(run: Path, settings: Recipe) -> None:
    if is_first():
        run.mkdir(exist_ok=True)
        (run / RECIPE).write_text(dump_recipe(settings), encoding="utf-8")


def _save(model: Any, folder: Path, staging: Path) -> None:
    """New weights in the dtypes, names and files of the old ones; everything else is copied."""
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, staging / path.name)
            continue
        tensors = {}
        with safe_open(path, framework="pt", backend="pread") as old:
            for name in old.keys():  # noqa: SIM118 - not a dict
                tensor = old.get_tensor(name)
                new = state.get(name, state.get(name.removeprefix(prefix)))
                tensors[name] = tensor if new is None else new.detach().cpu().to(tensor.dtype).contiguous()
        write_shard(staging / path.name, tensors)
