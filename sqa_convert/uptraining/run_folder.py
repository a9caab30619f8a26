"""The folder beside a model in uptraining: who owns it, what is left of it, and going on with it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoints.staging import empty, hold
from ..errors import (
    CheckpointError,
    InterruptedByUserError,
    OutputError,
    QualityError,
    RecipeError,
    SQAError,
    one_line,
)
from ..report.report_json import read_report
from . import processes
from .recipe import Recipe, dump_recipe, load_recipe, override
from .train_one_model import FINAL, FINISHED, step_of
from .trainer import COMPLETE, DivergedError

RECIPE = "recipe.yaml"

OF = "of"  # which conversion a run belongs to

BECAME = "became"  # what it was replaced by, if that was the last thing done

_OUTPUT = "output"  # where the result goes, if not in the model's place

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_FULL_IN_WORDS = ("No space left", "Disk quota exceeded", "File too large")

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""in the errors of torch.save, which hide why a file could not be written"""


@dataclass(frozen=True)
class Run:
    """One uptraining: of which model, towards which, by which recipe."""

    folder: Path
    """of the converted model"""
    source: Path
    """the folder of its source"""
    target: Path
    """where the result goes, mostly `folder`"""
    recipe: Recipe
    trained_before: bool
    """whether the model is the result of an earlier run"""

    @property
    def checkpoints(self) -> Path:
        return run_folder(self.folder)


class NotBetterError(QualityError):
    """Uptraining is done and made the model worse: nothing was replaced, and what was trained is kept beside it."""


def run_folder(folder: Path) -> Path:
    """Where the checkpoints of a model's uptraining are, while it is not done."""
    return folder.resolve().parent / f"{folder.resolve().name}.uptraining"


def target_folder(folder: Path, output: Path | None = None, resume: bool = False) -> Path:
    """Where the result of a run goes: to `output`, else where a run that goes on was told to put it, else to `folder`.

    Raises RecipeError.
    """
    run = run_folder(folder)
    if output is None and resume and (run / _OUTPUT).is_file():
        return Path((run / _OUTPUT).read_text(encoding="utf-8"))
    if output is None or output.resolve() == folder.resolve():
        return folder
    place = output.resolve()
    if place.is_relative_to(run):
        raise RecipeError(f"--output {output}: there the checkpoints are kept; give another folder")
    if place.is_relative_to(folder.resolve()):
        raise RecipeError(f"--output {output} is inside {folder}, which is copied there; give a folder beside it")
    return output


def is_trained(folder: Path) -> bool:
    """Whether beside `folder` lies a finished training that did not take its place."""
    run = run_folder(folder)
    return (run / OF).is_file() and (run / "uptrain" / FINAL / FINISHED).is_file()


def goes_on(folder: Path, resume: bool, keep_anyway: bool, *anew: Any) -> bool:
    """Whether a run goes on with what lies beside `folder`.

    It does when told to resume; and when told to keep what a whole training left there, unless anything in `anew` asks
    for another training.
    """
    return resume or (keep_anyway and all(value is None for value in anew) and is_trained(folder))


def run_recipe(
    folder: Path, run: Path, recipe: str | Path | Recipe | None, resume: bool, restart: bool, **overrides: Any
) -> Recipe:
    """The recipe of a run; one that goes on has its own. Asked in the first process only. Raises RecipeError."""
    if _is_done(run, folder):
        _discard(run)  # all that was left to do
    if resume:
        if restart or recipe is not None or any(value is not None for value in overrides.values()):
            raise RecipeError(f"--resume goes on with the recipe in {run}: leave out --restart and what changes it")
        if not (run / OF).is_file():
            raise RecipeError(f"--resume: there is no {run}, so no run that was stopped")
        if (run / OF).read_text() != conversion_id(folder):
            raise RecipeError(f"--resume: {folder} was converted anew since the run in {run} began: --restart")
        return load_recipe(str(run / RECIPE))
    recipe = override("quick" if recipe is None else recipe, **overrides)
    if not restart and is_trained(folder):
        raise RecipeError(
            f"{run} holds what a whole run trained: --resume takes it if it is better than {folder}, --keep-anyway "
            "even if it is worse, --restart throws it away"
        )
    if not restart and any(run.glob(f"*/checkpoint-*/{COMPLETE}")):
        raise RecipeError(f"{run} holds a run that was stopped: --resume goes on with it, --restart throws it away")
    return recipe


def _is_done(run: Path, folder: Path) -> bool:
    """Whether a run's result is in its place."""
    became = run / BECAME
    try:
        return became.is_file() and became.read_text() == conversion_id(target_folder(folder, resume=True))
    except CheckpointError:  # it is gone
        return False


def _discard(run: Path) -> None:
    """Removes a run that is done. The file that says so goes last."""
    with contextlib.suppress(OSError):
        empty(run, last=BECAME)
        run.rmdir()


def conversion_id(folder: Path) -> str:
    """Tells a conversion from every other: a hash of its report, without what measuring its speed adds."""
    report = {key: value for key, value in read_report(folder).items() if key != "speed"}
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def alone(run: Path, folder: Path) -> Iterator[None]:
    """One uptraining of a folder at a time, which leaves nothing behind when it is done. Raises OutputError."""
    lock = None
    try:
        with processes.together():
            if processes.is_first():
                lock = _lock(run, folder)
        processes.look(run)
        with processes.together():
            if processes.is_writer() and not processes.is_first():
                lock = _lock(run, folder)
        yield
        if processes.is_writer():
            _discard(run)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(run: Path, folder: Path) -> int | None:
    try:
        return hold(run)
    except BlockingIOError as error:
        raise OutputError(f"{folder} is being uptrained by another process") from error
    except OSError as error:
        raise OutputError(f"{run} cannot be made: {one_line(error)}") from error


@contextlib.contextmanager
def recoverable(run: Path, folder: Path) -> Iterator[None]:
    """What stops a training is said in one line, with what is left of it."""
    try:
        yield
    except NotBetterError:  # says itself what is left
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        fault = _fault(error, run)
        if fault is None:  # a mistake in a program: nothing is cleared away
            raise
        left = _what_is_left(run, folder)
        if fault is error:
            raise
        if isinstance(error, DivergedError):  # nobody should go on with that
            left = _unchanged(folder)
        raise type(fault)(f"{fault}; {left}") from error


def _fault(error: BaseException, run: Path) -> BaseException | None:
    """An error as users are told of it: one they can mend, `error` itself where that says enough, or None."""
    match error:
        case KeyboardInterrupt():
            return InterruptedByUserError("interrupted")
        case torch.OutOfMemoryError():
            return RecipeError(
                "out of memory on the device: lower micro_batch or set gradient_checkpointing, "
                f"in {run / RECIPE} if the run is to go on"
            )
        case QualityError() | OutputError():
            return type(error)(one_line(error))
        case SQAError() | SystemExit():
            return error
        case OSError() | RuntimeError() | SafetensorError():
            if why := _unwritten(error):
                return OutputError(f"{run} cannot be written: {why}")
            if processes.is_lost(error):
                return SQAError("another process of this run has ended")
    return None


def _unwritten(error: Exception) -> str:
    """Why a file could not be written; "" where an error is about something else."""
    text = str(error)
    if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_IN_WORDS):
        return "the disk is full"
    if any(words in text for words in _TORCH_SAVE):
        return "the disk is full or failing"
    return one_line(error) if isinstance(error, OSError) or "(os error " in text else ""  # Rust's, of safetensors


def _what_is_left(run: Path, folder: Path) -> str:
    """What is left of a run that stops here. One with nothing to go on from is removed."""
    target = target_folder(folder, resume=True)
    if processes.is_first() and _is_done(run, folder):
        _discard(run)
        return f"{target} is uptrained"
    steps: dict[str, int] = {}
    for path in run.glob(f"*/checkpoint-*/{COMPLETE}"):
        stage = path.parent.parent.name
        steps[stage] = max(steps.get(stage, 0), step_of(path))
    if not steps:
        if processes.is_writer():
            shutil.rmtree(run, ignore_errors=True)
        return _unchanged(folder)
    last = " and ".join(f"step {step} of {stage}" for stage, step in sorted(steps.items(), reverse=True))
    return f"{_unchanged(folder)}; go on from {last} with: sqa-uptrain {folder} --resume"


def _unchanged(folder: Path) -> str:
    return f"{folder} is still the converted model"


def begin(run: Run) -> None:
    """Writes down what a run does, as far as a run that goes on has not done so."""
    if not processes.is_writer():
        return
    if run.target != run.folder:
        (run.checkpoints / _OUTPUT).write_text(str(run.target.resolve()), encoding="utf-8")
    if not (run.checkpoints / OF).is_file():
        (run.checkpoints / RECIPE).write_text(dump_recipe(run.recipe), encoding="utf-8")
        (run.checkpoints / OF).write_text(conversion_id(run.folder))
