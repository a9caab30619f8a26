"""A short training run that takes a converted model the rest of the way, with `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from .checkpoint import resolve, staged_output, write_shard
from .conversion import Progress, silent
from .data import collator, documents, token_blocks
from .distill import DistillationTrainer
from .errors import DataError
from .evaluation import choose_device, compare, load_model, load_tokenizer
from .recipe import Recipe, load_recipe
from .report import read_report, write_report

_NO_DROPOUT: dict[str, dict[str, Any]] = {
    "sqa_gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "sqa_t5": {"dropout_rate": 0.0},
}


def uptrain(
    folder: str | Path,
    recipe: str | Recipe = "quick",
    *,
    source: str | None = None,
    data: str | None = None,
    device: str = "auto",
    evaluate: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Uptrains a folder made by `convert`, in place: it stays as it was until the new weights are complete.

    Args:
        folder: the converted model.
        recipe: a packaged recipe's name, a YAML file, or a Recipe.
        source: the unconverted model, by default the one named in the report.
        data: text to train on instead of the recipe's; its held-out part is evaluated on.
        device: "auto", "cpu", "cuda", "mps".
        evaluate: measure source, converted and uptrained on held-out text.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        The report, with the row "uptrained".

    Raises:
        RecipeError, CheckpointError, DataError: see `sqa_convert.errors`.
    """
    folder = Path(folder)
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, data=data)
    report = read_report(folder)
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(config_text)
    origin, _ = resolve(source or report["source"]["name"], report["source"]["revision"])
    chosen = choose_device(device)

    set_seed(settings.seed)
    start = time.perf_counter()
    tokenizer = load_tokenizer(folder, trust_remote_code)
    blocks = _training_blocks(tokenizer, settings, config)
    model = load_model(folder, dtype="float32", **_NO_DROPOUT[config["model_type"]])
    _freeze_key_biases(model)
    teacher = (
        load_model(origin, dtype="float32", trust_remote_code=trust_remote_code) if settings.loss == "kl" else None
    )

    size = sum(path.stat().st_size for path in folder.iterdir())
    with staged_output(folder, overwrite=True, size=size) as staging:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = DistillationTrainer(
                model=model,
                teacher=teacher,
                args=_arguments(settings, scratch, chosen),
                train_dataset=list(blocks),
                data_collator=collator(tokenizer, model.config.is_encoder_decoder),
                callbacks=[_Report(lambda done, total: progress("uptrain", done, total))],
            )
            trainer.remove_callback(PrinterCallback)
            result = trainer.train()
        _save(model, report, folder, staging)
        (staging / "config.json").write_text(config_text, encoding="utf-8")
        report["uptraining"] = dataclasses.asdict(settings) | {
            "steps": result.global_step,
            "tokens": result.global_step * settings.tokens_per_step,
            "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else str(chosen),
        }
        report["seconds"]["uptrain"] = round(time.perf_counter() - start, 2)
        if evaluate:
            del model, teacher, trainer
            rows = {"source": origin, "converted": folder, "uptrained": staging}
            report["quality"] = compare(
                rows, data=settings.data, device=device, trust_remote_code=trust_remote_code, progress=progress
            )
        write_report(staging, report)
    return report


def _training_blocks(tokenizer: Any, settings: Recipe, config: dict[str, Any]) -> torch.Tensor:
    longest = config.get("n_positions") or settings.sequence_length
    if settings.sequence_length > longest:
        raise DataError(f"sequence_length {settings.sequence_length} is more than the model's {longest} positions")
    blocks = token_blocks(
        documents(settings.data, "train"), tokenizer, settings.sequence_length, settings.tokens, settings.data
    )
    if int(blocks.max()) >= config["vocab_size"]:
        raise DataError(f"the tokenizer makes token {int(blocks.max())}, the model knows {config['vocab_size']} tokens")
    return blocks


def _freeze_key_biases(model: torch.nn.Module) -> None:
    """A key bias adds a constant over keys, which softmax ignores: its gradient is rounding noise."""
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)


def _arguments(settings: Recipe, scratch: str, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would each get a whole batch
    return arguments


class _Report(TrainerCallback):
    def __init__(self, step: Callable[[int, int], None]) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step(state.global_step, state.max_steps)


def _save(model: Any, report: dict[str, Any], folder: Path, staging: Path) -> None:
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
