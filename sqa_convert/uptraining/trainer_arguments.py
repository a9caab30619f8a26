"""What a recipe means to the Trainer, and whether this machine can do it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..errors import RecipeError
from . import fsdp_and_deepspeed, processes
from .recipe import Recipe

_CHECKPOINTS = 2  # of a run, that stay

_SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def local_batch(recipe: Recipe) -> tuple[int, int]:
    """Sequences that a process computes at once, and how many times for one step. Raises RecipeError."""
    share, rest = divmod(recipe.batch_size, processes.count())
    micro = min(recipe.micro_batch or share, share)
    if rest or not share or share % micro:
        raise RecipeError(
            f"batch_size {recipe.batch_size} cannot be shared out evenly among {processes.count()} processes, "
            f"{micro or 1} sequences at once in each: see batch_size, micro_batch"
        )
    return micro, share // micro


def check_recipe(recipe: Recipe, evaluate: bool, device: torch.device) -> None:
    """Raises RecipeError where this machine cannot do what a recipe asks. Nothing is read or written."""
    local_batch(recipe)
    fsdp_and_deepspeed.check_engine(recipe.fsdp)
    if recipe.fsdp and processes.count() == 1:
        raise RecipeError("fsdp shares a model out among processes: start them with torchrun, see the recipe")
    if recipe.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError("precision: bfloat16 is not supported by this GPU; choose auto or float32")
    if recipe.control and not evaluate:
        raise RecipeError("the control is measured beside the model: leave out --control, or --no-evaluate")
    known = get_available_reporting_integrations()
    if missing := [name for name in _trackers(recipe) if name not in known]:
        installed = ", ".join(known) or "none"
        raise RecipeError(f"report_to: {', '.join(missing)} is no tracker that is installed (installed: {installed})")
    if recipe.lora_rank and find_spec("peft") is None:
        raise RecipeError("lora_rank needs the package peft: pip install 'sqa-convert[lora]'")


def _trackers(recipe: Recipe) -> list[str]:
    return [name.strip() for name in recipe.report_to.split(",") if name.strip() not in ("", "none")]


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe's arithmetic is in bfloat16 on this device."""
    return recipe.precision == "bfloat16" or (
        recipe.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def training_arguments(
    recipe: Recipe,
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
        best: whether the model that was measured best is loaded at the end.
        resumed: whether the run goes on from a checkpoint.
    """
    micro, accumulation = local_batch(recipe)
    every = max(1, recipe.steps // recipe.evaluations)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(recipe.schedule, recipe.schedule),
        lr_scheduler_kwargs=(
            {"num_decay_steps": recipe.steps // 5, "decay_type": "linear"} if recipe.schedule == "wsd" else None
        ),
        warmup_steps=round(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=uses_bfloat16(recipe, device),
        torch_compile=recipe.compile,
        **({"gradient_checkpointing": True} if recipe.gradient_checkpointing else {}),
        **({"fsdp": True} if recipe.fsdp else {}),
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
        save_total_limit=_CHECKPOINTS,
        save_on_each_node=processes.apart(),
        load_best_model_at_end=best,
        restore_callback_states_from_checkpoint=resumed and best and recipe.patience > 0,
        metric_for_best_model=f"eval_{recipe.judged_by}" if best else None,
        greater_is_better=False if best else None,
        logging_strategy="steps" if _trackers(recipe) else "no",
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=_trackers(recipe) or "none",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would each get a whole batch
    if device.index is not None and arguments.device != device:
        arguments._setup_devices = device  # the Trainer knows the first GPU only
        torch.cuda.set_device(device)  # where its data go
    return arguments
