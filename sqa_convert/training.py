"""One model by one recipe: what is trained of it, on what, and how the Trainer is set up."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D

from . import engines, processes
from .devices import peak_flops
from .errors import RecipeError, one_line
from .evaluation import HeldOut, Predictions, load_config, load_model
from .flops import training_flops
from .output import write_json
from .recipe import Recipe
from .trainer import COMPLETE, Said, UptrainingTrainer
from .training_data import TrainingData

FINAL = "final"
"""folder of a finished training's model"""
_FINISHED = "finished.json"  # written last
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


def train(path: Path, teacher: Any, settings: Recipe, job: Job, output: Path, said: Said) -> dict[str, Any]:
    """One model by one recipe, from its last checkpoint in `output` if there is one.

    The trained model is put into `output`/FINAL, in float32, by the first process; one that is there already is kept.

    Args:
        path: the model to begin with.
        teacher: the unconverted model, where the loss needs it.
        output: for checkpoints.

    Returns:
        Steps, tokens and seconds in all, the curve, and what the device did.
    """
    done = output / FINAL / _FINISHED
    result = json.loads(done.read_text()) if processes.is_first() and done.is_file() else None
    result = processes.from_first(result)
    if result is not None:
        return dict(result)
    checkpoint = _last_checkpoint(output)
    measured = job.held_out is not None
    set_seed(settings.seed)
    model = load_model(path, dtype="float32", trust_remote_code=job.trust_remote_code, **no_dropout(path, job))
    _choose_trained(model, settings)
    # Pairs are of many lengths, so what one of them needs says nothing.
    flops = None if settings.pairs else training_flops(model, job.text.example()) / settings.sequence_length
    if settings.lora_rank:
        model = _with_lora(model, settings.lora_rank)
    arguments = training_arguments(settings, output, job.device, measured, resumed=checkpoint is not None)
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
        before=float((Path(checkpoint) / COMPLETE).read_text()) if checkpoint else 0.0,
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and measured else [],
    )
    with processes.together():
        engines.check_checkpoint(trainer, checkpoint)
    engines.check_folder(trainer)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        if engines.is_contradiction(error):
            raise RecipeError(f"accelerate's file and the recipe disagree: {one_line(error, 600)}") from error
        raise
    finally:
        trainer.watch.restore()
    if trainer.watch.interrupted and trainer.state.global_step < settings.steps:
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
    key = arguments.metric_for_best_model
    kept_start = False
    if key is not None and trainer.curve:
        values = [point[key.removeprefix("eval_")] for point in trainer.curve]
        kept_start = values[0] <= min(values[1:], default=values[0])
        found["kept"] = "the start, no measurement was better" if kept_start else f"the best {key}"
    weights = engines.whole_weights(trainer)  # by all processes
    with processes.together():  # none leaves, and nothing is cleared away, before they are written
        if processes.is_first():
            _write_final(trainer, weights, path, kept_start, settings, job, output / FINAL)
            write_json(done, found)
    return found


def _write_final(
    trainer: Any, weights: Any, path: Path, kept_start: bool, settings: Recipe, job: Job, final: Path
) -> None:
    """The trained model as a folder, or the one at `path` that it began with; `weights` where they were shared out."""
    if kept_start or weights is not None:
        model: Any = load_model(path, dtype="float32", trust_remote_code=job.trust_remote_code)
    else:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if not kept_start:
        if weights is not None:
            _choose_trained(model, settings)
            model = _with_lora(model, settings.lora_rank) if settings.lora_rank else model
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


def no_dropout(path: Path, job: Job) -> dict[str, float]:
    """Settings that switch dropout off; they must be there when a model is built."""
    config = load_config(path, job.trust_remote_code)
    return {name: 0.0 for name in vars(config) if name.endswith("_pdrop") or name == "dropout_rate"}


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
        if isinstance(child, (torch.nn.Linear, Conv1D))
    }
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)))


def training_arguments(
    settings: Recipe, output: Path, device: torch.device, measured: bool, resumed: bool = False
) -> TrainingArguments:
    """What a recipe means to the Trainer.

    Args:
        output: for checkpoints.
        measured: whether there is held-out text to measure on.
        resumed: whether a checkpoint is gone on from.
    """
    micro, accumulation = local_batch(settings)
    every = max(1, settings.steps // settings.evaluations)
    bf16 = settings.precision == "bfloat16" or (
        settings.precision == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    best = bool(settings.patience) and measured
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
        bf16=bf16,
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
        restore_callback_states_from_checkpoint=resumed and best,
        metric_for_best_model=("eval_loss" if settings.ce == 1 else "eval_kl") if best else None,
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
