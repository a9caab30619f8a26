"""One model by one recipe: what is trained of it, on what, and how the Trainer is set up."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

from . import engines, processes
from .devices import peak_flops
from .errors import RecipeError, one_line
from .evaluation import HeldOut, Predictions, load_model
from .flops import training_flops
from .output import write_json
from .recipe import Recipe
from .trainable import choose_trained, no_dropout, with_lora
from .trainer import COMPLETE, Said, UptrainingTrainer
from .training_data import TrainingData

FINAL = "final"
"""folder of a finished training's model"""
FINISHED = "finished.json"
"""of that folder, written last"""
_KEPT = 2  # checkpoints of a run
_SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def local_batch(settings: Recipe) -> tuple[int, int]:
    """Sequences a process computes at once, and how often for one step. Raises RecipeError."""
    share, rest = divmod(settings.batch_size, processes.count())
    micro = min(settings.micro_batch or share, share)
    if rest or not share or share % micro:
        raise RecipeError(
            f"batch_size {settings.batch_size} cannot be shared out evenly among {processes.count()} processes, "
            f"{micro or 1} sequences at once in each: see batch_size, micro_batch"
        )
    return micro, share // micro


def check_settings(settings: Recipe, evaluate: bool, device: torch.device) -> None:
    """Raises RecipeError for what a recipe asks of this machine in vain, before anything is read or written."""
    local_batch(settings)
    engines.check_engine(settings.fsdp)
    if settings.fsdp and processes.count() == 1:
        raise RecipeError("fsdp shares a model out among processes: start them with torchrun, see the recipe")
    if settings.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError("precision: bfloat16 is not supported by this GPU; choose auto or float32")
    if settings.control and not evaluate:
        raise RecipeError("the control is measured beside the model: leave out --control, or --no-evaluate")
    known = get_available_reporting_integrations()
    if missing := [name for name in _trackers(settings) if name not in known]:
        installed = ", ".join(known) or "none"
        raise RecipeError(f"report_to: {', '.join(missing)} is no tracker that is installed (installed: {installed})")
    if settings.lora_rank and find_spec("peft") is None:
        raise RecipeError("lora_rank needs the package peft: pip install 'sqa-convert[lora]'")


def _trackers(settings: Recipe) -> list[str]:
    return [name.strip() for name in settings.report_to.split(",") if name.strip() not in ("", "none")]


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
    if weights is not None:
        model: Any = load_model(path, dtype="float32", trust_remote_code=job.trust_remote_code)
    else:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if weights is not None:
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


def uses_bfloat16(settings: Recipe, device: torch.device) -> bool:
    """Whether a recipe's arithmetic is in bfloat16 on this device."""
    return settings.precision == "bfloat16" or (
        settings.precision == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def training_arguments(
    settings: Recipe,
    output: Path,
    device: torch.device,
    measured: bool,
    best: bool = False,
    resumed: bool = False,
) -> TrainingArguments:
    """What a recipe means to the Trainer.

    Args:
        output: for checkpoints.
        measured: whether there is held-out text to measure on.
        best: whether the best measurement is gone back to at the end.
        resumed: whether a checkpoint is gone on from.
    """
    micro, accumulation = local_batch(settings)
    every = max(1, settings.steps // settings.evaluations)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(settings.schedule, settings.schedule),
        lr_scheduler_kwargs=(
            {"num_decay_steps": settings.steps // 5, "decay_type": "linear"} if settings.schedule == "wsd" else None
        ),
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=uses_bfloat16(settings, device),
        torch_compile=settings.compile,
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
        **({"fsdp": True} if settings.fsdp else {}),
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and processes.count() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        eval_strategy="steps" if measured else "no",
        eval_on_start=measured and not resumed,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=_KEPT,
        save_on_each_node=processes.apart(),
        load_best_model_at_end=best,
        restore_callback_states_from_checkpoint=resumed and best and settings.patience > 0,
        metric_for_best_model=f"eval_{settings.judged_by}" if best else None,
        greater_is_better=False if best else None,
        logging_strategy="steps" if _trackers(settings) else "no",
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=_trackers(settings) or "none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would each get a whole batch
    if device.index is not None and arguments.device != device:
        arguments._setup_devices = device  # the Trainer knows the first GPU only
        torch.cuda.set_device(device)  # where its data go
    return arguments


def step_of(path: Path) -> int:
    """Of a file in a checkpoint."""
    return int(path.parent.name.rpartition("-")[2])
