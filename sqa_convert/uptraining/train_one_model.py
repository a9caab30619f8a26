"""One model by one recipe: what is trained of it, on what, and how the Trainer is set up."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from ..checkpoints.small_files import write_json
from ..devices import peak_flops
from ..errors import RecipeError, one_line
from ..evaluation.fused_gelu import fused_gelu
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.hidden_states import load_any
from ..speed.flops import training_flops
from ..text.collate import PairCollator
from . import fsdp_and_deepspeed, processes
from .data import TrainingData
from .hidden_state_trainer import EXAMPLES, HiddenStateTrainer
from .recipe import Recipe
from .trainable import choose_trained, no_dropout, with_lora
from .trainer import COMPLETE, StepProgress, UptrainingTrainer
from .trainer_arguments import training_arguments

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
    expected: Any
    """what the source makes of that text: predictions, or hidden states"""
    device: torch.device
    trust_remote_code: bool
    keep_anyway: bool = False
    """go on where a measurement is far worse than the start"""
    until: int = 0
    """the step to end after, of a schedule made for all; 0: the last"""

    @property
    def chooses(self) -> bool:
        """Whether the result is the model that was measured best; else the last one."""
        return self.held_out is not None and not self.until


def train(path: Path, teacher: Any, recipe: Recipe, job: Job, output: Path, progress: StepProgress) -> dict[str, Any]:
    """One model by one recipe, from its last checkpoint in `output` if there is one.

    The first process writes the trained model to `output`/FINAL, in float32; one that is there already stays. It is the
    one that was measured best after the start, or the last one (`job.chooses`).

    Args:
        path: the model to begin with.
        teacher: the source, where the loss needs it.
        recipe: the recipe.
        job: what this training has in common with others of the run.
        output: for checkpoints.
        progress: called after each step.

    Returns:
        Steps, tokens and seconds in all, the curve, what the device did; what was kept ("kept_steps", and "kept" in
        words), and whether that is "better" than the start, or as good.
    """
    finished = output / FINAL / FINISHED
    earlier = json.loads(finished.read_text()) if processes.is_first() and finished.is_file() else None
    earlier = processes.from_first(earlier)
    if earlier is not None:
        return dict(earlier)
    checkpoint = _last_checkpoint(output)
    set_seed(recipe.seed)
    trainer = _trainer(path, teacher, recipe, job, output, checkpoint, progress)
    with processes.together():
        fsdp_and_deepspeed.check_checkpoint(trainer, checkpoint)
    fsdp_and_deepspeed.check_folder(trainer)
    try:
        with _logged_beside(output), fused_gelu(trainer.model, *([] if teacher is None else [teacher])):
            steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    except ValueError as error:
        if fsdp_and_deepspeed.is_contradiction(error):
            raise RecipeError(f"accelerate's file and the recipe disagree: {one_line(error, 600)}") from error
        raise
    finally:
        trainer.watch.restore()
    if trainer.watch.interrupted and trainer.state.global_step < (job.until or recipe.steps):
        raise KeyboardInterrupt
    result = _costs(trainer, recipe, steps)
    result |= _choice(trainer, recipe) if job.chooses else {"kept_steps": steps}
    weights = fsdp_and_deepspeed.whole_weights(trainer)  # by all processes
    with processes.together():  # none leaves, and nothing is cleared away, before they are written
        if processes.is_first():
            _write_final(trainer, weights, path, recipe, job, output / FINAL)
            write_json(finished, result)
    trainer.accelerator.free_memory()
    del trainer  # it is part of a cycle, and its model would stay beside the next until that is found
    gc.collect()
    return result


def _trainer(
    path: Path,
    teacher: Any,
    recipe: Recipe,
    job: Job,
    output: Path,
    checkpoint: str | None,
    progress: StepProgress,
) -> UptrainingTrainer:
    """The model to train, in a Trainer that is ready to begin, or to go on from `checkpoint`."""
    model = load_any(
        path, dtype="float32", trust_remote_code=job.trust_remote_code, **no_dropout(path, job.trust_remote_code)
    )
    choose_trained(model, recipe)
    # Pairs are of many lengths, so what one of them needs says nothing.
    pairs = isinstance(job.text.collate, PairCollator)
    flops = None if pairs else training_flops(model, job.text.example()) / recipe.sequence_length
    if recipe.lora_rank:
        model = with_lora(model, recipe.lora_rank)
    measured = job.held_out is not None
    arguments = training_arguments(recipe, output, job.device, measured, job.chooses, resumed=checkpoint is not None)
    kind: Any = UptrainingTrainer
    if recipe.loss == "hidden":
        kind = partial(HiddenStateTrainer, example=job.text.example(EXAMPLES))
    return kind(
        model=model,
        teacher=teacher,
        ce=recipe.ce,
        args=arguments,
        train_dataset=job.text.rows(recipe.steps * recipe.batch_size),
        data_collator=job.text.collate,
        held_out=job.held_out,
        eval_dataset=None if job.held_out is None else job.held_out.batches,  # the Trainer asks for one
        expected=job.expected,
        tokens_per_step=recipe.tokens_per_step,
        flops=flops,
        peak=peak_flops(job.device, processes.count()) if arguments.bf16 else None,
        progress=progress,
        until=job.until or recipe.steps,
        stop_early=job.chooses and not job.keep_anyway,
        seconds_before=float((Path(checkpoint) / COMPLETE).read_text()) if checkpoint else 0.0,
        callbacks=[EarlyStoppingCallback(recipe.patience)] if recipe.patience and job.chooses else [],
    )


def _costs(trainer: UptrainingTrainer, recipe: Recipe, steps: int) -> dict[str, Any]:
    """Steps, tokens and seconds of a run, the curve, and what the device did."""
    tokens, seconds = steps * recipe.tokens_per_step, trainer.watch.seconds()
    costs: dict[str, Any] = {
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(trainer.watch.tokens_per_second(steps) or tokens / seconds),
        "curve": trainer.curve,
    }
    if trainer.flops:
        costs["flops_per_token"] = round(trainer.flops)
        if trainer.peak:
            costs["mfu"] = round(costs["tokens_per_second"] * trainer.flops / trainer.peak, 4)
    return costs


@contextlib.contextmanager
def _logged_beside(output: Path) -> Iterator[None]:
    """TensorBoard's files go to a folder that stays; it would write among the checkpoints, which are removed."""
    name, folder = "TENSORBOARD_LOGGING_DIR", output.parent.with_suffix(".runs") / output.name
    if name in os.environ:  # the user's own
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _choice(trainer: UptrainingTrainer, recipe: Recipe) -> dict[str, Any]:
    """Which measurement of a run is taken, and whether it is better than the start, or as good."""
    key, steps = recipe.judged_by, trainer.state.best_global_step
    points = {round(point["tokens"]) // recipe.tokens_per_step: point for point in trainer.curve}
    if not steps or steps not in points:  # gone on from where nothing was measured
        return {"kept_steps": trainer.state.global_step}
    name = {"kl": "KL", "loss": "loss", "error": "error"}[key]
    return {
        "kept_steps": steps,
        "kept": f"the best held-out {name}, after {steps * recipe.tokens_per_step:,} tokens",
        "better": 0 not in points or points[steps][key] <= points[0][key],
    }


def _write_final(trainer: Any, weights: Any, path: Path, recipe: Recipe, job: Job, final: Path) -> None:
    """The trained model as a folder. Where its `weights` were shared out it is loaded from `path` to take them."""
    if weights is None:
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    else:
        model = load_any(path, dtype="float32", trust_remote_code=job.trust_remote_code)
        choose_trained(model, recipe)
        model = with_lora(model, recipe.lora_rank) if recipe.lora_rank else model
        _fill(model, weights)
    model = model.merge_and_unload() if recipe.lora_rank else model
    model.save_pretrained(final)


def _fill(model: Any, weights: dict[str, Any]) -> None:
    """Puts weights into a model. Raises RuntimeError unless all that is trained is there, in its shape."""
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in weights]
    if unexpected or missing:
        raise RuntimeError(f"weights were not gathered: {(missing + unexpected)[:3]}")


def _last_checkpoint(output: Path) -> str | None:
    """The newest that is complete on every node. One that was cut off while it was written is removed."""
    complete = {}
    for path in output.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete[step_of(path / COMPLETE)] = path
        elif processes.is_writer():
            shutil.rmtree(path, ignore_errors=True)
    steps = processes.gather(set(complete))  # waits, too, until all are removed that were cut off
    everywhere = set.intersection(*steps)
    if steps[0] and not everywhere:
        raise RecipeError(
            f"--resume: a node has no checkpoint of {output}: put FOLDER where all nodes see it, or --restart"
        )
    return str(complete[max(everywhere)]) if everywhere else None


def step_of(path: Path) -> int:
    """The step of the checkpoint that a file lies in."""
    return int(path.parent.name.rpartition("-")[2])
