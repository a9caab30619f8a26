"""What a recipe means to the Trainer, and whether this machine can do it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..errors import RecipeError
from . import engines, processes
from .recipe import Recipe

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
