"""One model by one recipe: what is trained of it, on what, and how the Trainer is set up."""

from __future__ import annotations

import gc
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

from .errors import RecipeError
from .evaluation import HeldOut, load_model, predict
from .flops import peak_flops, training_flops
from .recipe import Recipe
from .trainer import COMPLETE, Said, UptrainingTrainer
from .training_data import TrainingData

_KEPT = 2  # checkpoints of a run
_SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_batch(settings: Recipe) -> tuple[int, int]:
    """Sequences a process computes at once, and how often for one step. Raises RecipeError."""
    share, rest = divmod(settings.batch_size, _processes())
    micro = min(settings.micro_batch or share, share)
    if rest or not share or share % micro:
        raise RecipeError(
            f"batch_size {settings.batch_size} cannot be shared out evenly among {_processes()} processes, "
            f"{micro or 1} sequences at once in each: see batch_size, micro_batch"
        )
    return micro, share // micro


def check_settings(settings: Recipe, evaluate: bool) -> None:
    """Raises RecipeError for what a recipe asks of this machine in vain, before anything is read or written."""
    local_batch(settings)
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


def train(
    path: Path,
    teacher: Any,
    settings: Recipe,
    text: TrainingData,
    held_out: HeldOut | None,
    output: Path,
    device: torch.device,
    trust_remote_code: bool,
    said: Said,
) -> tuple[Any, dict[str, Any]]:
    """One model by one recipe. Returns it, and steps, tokens, the curve, and what the device did."""
    set_seed(settings.seed)
    model = load_model(path, dtype="float32", trust_remote_code=trust_remote_code)
    _without_dropout(model)
    _choose_trained(model, settings)
    per_token = training_flops(model, text.example()) / settings.sequence_length
    if settings.lora_rank:
        model = _with_lora(model, settings.lora_rank)
    arguments = _arguments(settings, output, device, measured=held_out is not None)
    expected = None
    if held_out is not None:
        expected = predict(teacher, held_out)
    trainer = UptrainingTrainer(
        model=model,
        teacher=teacher if settings.ce < 1 else None,
        ce=settings.ce,
        args=arguments,
        train_dataset=text.rows(settings.steps * settings.batch_size),
        data_collator=text.collate,
        held_out=held_out,
        eval_dataset=None if held_out is None else held_out.batches,  # the Trainer asks for one
        expected=expected,
        tokens_per_step=settings.tokens_per_step,
        flops=per_token,
        peak=peak_flops(device, _processes()) if arguments.bf16 else None,
        said=said,
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and held_out is not None else [],
    )
    try:
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(output))
    finally:
        trainer.watch.restore()
    if trainer.watch.interrupted and trainer.state.global_step < settings.steps:
        raise KeyboardInterrupt
    speed = trainer.watch.tokens_per_second(result.global_step)
    model = trainer.accelerator.unwrap_model(trainer.model)
    measured = {
        "steps": result.global_step,
        "tokens": result.global_step * settings.tokens_per_step,
        "curve": trainer.curve,
        "tokens_per_second": round(speed),
        "flops_per_token": round(per_token),
    }
    if trainer.peak:
        measured["mfu"] = round(speed * per_token / trainer.peak, 4)
    del trainer
    gc.collect()
    return (model.merge_and_unload() if settings.lora_rank else model), measured


def _last_checkpoint(output: Path) -> str | None:
    """The newest that is complete; what was cut off while being written goes."""
    complete = []
    for path in output.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete.append(path / COMPLETE)
        elif is_first():
            shutil.rmtree(path, ignore_errors=True)
    return str(max(complete, key=step_of).parent) if complete else None


def _without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in vars(model.config).items():  # attention takes its own from the config
        if value and (name.endswith("_pdrop") or name == "dropout_rate"):
            setattr(model.config, name, 0.0)


def _choose_trained(model: Any, settings: Recipe) -> None:
    """What is not trained is frozen; so are key biases: softmax ignores them, their gradient is rounding noise."""
    in_attention = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        wanted = settings.train == "all" or id(parameter) in in_attention
        parameter.requires_grad_(wanted and not name.endswith("k_proj.bias"))


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = {
        name.rpartition(".")[2]
        for parent, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
    }
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)))


def _arguments(settings: Recipe, output: Path, device: torch.device, measured: bool) -> TrainingArguments:
    micro, accumulation = local_batch(settings)
    every = max(1, settings.steps // settings.evaluations)
    bf16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    best = bool(settings.patience) and measured
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(settings.schedule, settings.schedule),
        lr_scheduler_kwargs={"num_decay_steps": settings.steps // 5} if settings.schedule == "wsd" else None,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=bf16,
        torch_compile=settings.compile,
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
        **({"fsdp": "full_shard auto_wrap"} if settings.fsdp else {}),
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and _processes() > 1 else None,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        eval_strategy="steps" if measured else "no",
        eval_on_start=measured,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=_KEPT,
        load_best_model_at_end=best,
        metric_for_best_model="eval_kl" if best else None,
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
    return arguments


def step_of(path: Path) -> int:
    """Of a file in a checkpoint."""
    return int(path.parent.name.rpartition("-")[2])
