"""One model by one recipe: what is trained of it, on what, and how the Trainer is set up."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from ..checkpoints.files import write_json
from ..devices import peak_flops
from ..errors import RecipeError, one_line
from ..evaluation.held_out import HeldOut
from ..evaluation.load import load_model
from ..evaluation.quality import Predictions
from ..speed.flops import training_flops
from . import engines, processes
from .arguments import training_arguments
from .data import TrainingData
from .recipe import Recipe
from .trainable import choose_trained, no_dropout, with_lora
from .trainer import COMPLETE, Said, UptrainingTrainer

FINAL = "final"
"""folder of a finished training's model"""

FINISHED = "finished.json"
"""of that folder, written last"""


@dataclass(frozen=True)
class Job:
    """What the trainings of one run have in common."""

    text: TrainingData
    held_out: HeldOut | None
    """measured on as it goes; None measures nothing"""
    expected: Predictions | None
    """the unconverted model's, of that text"""
    device: torch.device
    trust_remote_code: bool
    keep_anyway: bool = False
    """go on where a measurement is far worse than the start"""
    until: int = 0
    """the step to end after, of a schedule made for all; 0: the last"""


def train(path: Path, teacher: Any, settings: Recipe, job: Job, output: Path, said: Said) -> dict[str, Any]:
    """One model by one recipe, from its last checkpoint in `output` if there is one.

    The trained model is put into `output`/FINAL, in float32, by the first process; one that is there already is kept.
    It is the one that was measured best after the start, where measurements are made and `job.until` is not given.

    Args:
        path: the model to begin with.
        teacher: the unconverted model, where the loss needs it.
        output: for checkpoints.

    Returns:
        Steps, tokens and seconds in all, the curve, what the device did; what was kept ("kept_steps", and "kept" in
        words), and whether that is "better" than the start, or as good.
    """
    done = output / FINAL / FINISHED
    result = json.loads(done.read_text()) if processes.is_first() and done.is_file() else None
    result = processes.from_first(result)
    if result is not None:
        return dict(result)
    checkpoint = _last_checkpoint(output)
    measured = job.held_out is not None
    set_seed(settings.seed)
    model = load_model(
        path, dtype="float32", trust_remote_code=job.trust_remote_code, **no_dropout(path, job.trust_remote_code)
    )
    choose_trained(model, settings)
    # Pairs are of many lengths, so what one of them needs says nothing.
    flops = None if settings.pairs else training_flops(model, job.text.example()) / settings.sequence_length
    if settings.lora_rank:
        model = with_lora(model, settings.lora_rank)
    best = measured and not job.until
    arguments = training_arguments(settings, output, job.device, measured, best, resumed=checkpoint is not None)
    trainer = UptrainingTrainer(
        model=model,
        teacher=teacher,
        ce=settings.ce,
        args=arguments,
        train_dataset=job.text.rows(settings.steps * settings.batch_size),
        data_collator=job.text.collate,
        held_out=job.held_out,
        eval_dataset=None if job.held_out is None else job.held_out.batches,  # the Trainer asks for one
        expected=job.expected,
        tokens_per_step=settings.tokens_per_step,
        flops=flops,
        peak=peak_flops(job.device, processes.count()) if arguments.bf16 else None,
        said=said,
        until=job.until or settings.steps,
        stop_early=best and not job.keep_anyway,
        before=float((Path(checkpoint) / COMPLETE).read_text()) if checkpoint else 0.0,
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and best else [],
    )
    with processes.together():
        engines.check_checkpoint(trainer, checkpoint)
    engines.check_folder(trainer)
    try:
        with _logged_beside(output):
            result = trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        if engines.is_contradiction(error):
            raise RecipeError(f"accelerate's file and the recipe disagree: {one_line(error, 600)}") from error
        raise
    finally:
        trainer.watch.restore()
    if trainer.watch.interrupted and trainer.state.global_step < (job.until or settings.steps):
        raise KeyboardInterrupt
    tokens = result.global_step * settings.tokens_per_step
    seconds = trainer.watch.seconds()
    found = {
        "steps": result.global_step,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(trainer.watch.tokens_per_second(result.global_step) or tokens / seconds),
        "curve": trainer.curve,
    }
    if flops:
        found["flops_per_token"] = round(flops)
        if trainer.peak:
            found["mfu"] = round(found["tokens_per_second"] * flops / trainer.peak, 4)
    found |= _kept(trainer, settings) if best else {"kept_steps": result.global_step}
    weights = engines.whole_weights(trainer)  # by all processes
    with processes.together():  # none leaves, and nothing is cleared away, before they are written
        if processes.is_first():
            _write_final(trainer, weights, path, settings, job, output / FINAL)
            write_json(done, found)
    trainer.accelerator.free_memory()
    del trainer, model  # they hold each other, and would stay beside the next model until they are looked for
    gc.collect()
    return found


@contextlib.contextmanager
def _logged_beside(output: Path) -> Iterator[None]:
    """TensorBoard's files of each stage in a folder that stays; it would write among the checkpoints, which go."""
    name, folder = "TENSORBOARD_LOGGING_DIR", output.parent.with_suffix(".runs") / output.name
    if name in os.environ:  # the user's own
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _kept(trainer: UptrainingTrainer, settings: Recipe) -> dict[str, Any]:
    """Which measurement of a run is taken, and whether the start was better."""
    key, steps = settings.judged_by, trainer.state.best_global_step
    points = {round(point["tokens"]) // settings.tokens_per_step: point for point in trainer.curve}
    if not steps or steps not in points:  # gone on from where nothing was measured
        return {"kept_steps": trainer.state.global_step}
    name = {"kl": "KL", "loss": "loss"}[key]
    return {
        "kept_steps": steps,
        "kept": f"the best held-out {name}, after {steps * settings.tokens_per_step:,} tokens",
        "better": 0 not in points or points[steps][key] <= points[0][key],
    }


def _write_final(trainer: Any, weights: Any, path: Path, settings: Recipe, job: Job, final: Path) -> None:
    """The trained model as a folder; where its `weights` were shared out, built anew from `path` to hold them."""
    if weights is None:
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    else:
        model = load_model(path, dtype="float32", trust_remote_code=job.trust_remote_code)
        choose_trained(model, settings)
        model = with_lora(model, settings.lora_rank) if settings.lora_rank else model
        _fill(model, weights)
    model = model.merge_and_unload() if settings.lora_rank else model
    model.save_pretrained(final)


def _fill(model: Any, weights: dict[str, Any]) -> None:
    """Puts weights into a model. Raises RuntimeError unless all that is trained is there, in its shape."""
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in weights]
    if unexpected or missing:
        raise RuntimeError(f"weights were not gathered: {(missing + unexpected)[:3]}")


def _last_checkpoint(output: Path) -> str | None:
    """The newest that is complete, on every node; what was cut off while being written goes."""
    complete = {}
    for path in output.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete[step_of(path / COMPLETE)] = path
        elif processes.is_writer():
            shutil.rmtree(path, ignore_errors=True)
    steps = processes.gather(set(complete))  # and none looks on before what is cut off is gone
    everywhere = set.intersection(*steps)
    if steps[0] and not everywhere:
        raise RecipeError(
            f"--resume: a node has no checkpoint of {output}: put FOLDER where all nodes see it, or --restart"
        )
    return str(complete[max(everywhere)]) if everywhere else None


def step_of(path: Path) -> int:
    """Of a file in a checkpoint."""
    return int(path.parent.name.rpartition("-")[2])
