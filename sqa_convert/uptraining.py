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

from .checkpoint import resolve
from .data import SpanCorruption, collator, documents, token_blocks
from .distill import DistillationTrainer
from .errors import DataError
from .evaluation import (
    check_vocabulary,
    choose_device,
    compare,
    device_name,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from .execution import Progress, silent
from .output import staged_output, write_shard
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
    seed: int | None = None,
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
        seed: instead of the recipe's.
        evaluate: measure source, converted and uptrained on held-out text.
        trust_remote_code: let code that the source brings along run.
        progress: called as the work goes on.

    Returns:
        The report, with the column "uptrained".

    Raises:
        RecipeError, CheckpointError, DataError: see `sqa_convert.errors`.
    """
    folder = Path(folder)
    settings = override(recipe, data=data, seed=seed)
    report = read_report(folder)
    origin = resolve(source) if source else resolve(report["source"]["name"], report["source"]["revision"])
    blocks, collate = training_blocks(folder, settings, trust_remote_code=trust_remote_code)
    held_out = None
    if evaluate:
        held_out = prepare(
            folder, settings.data, device=device, seed=settings.seed, trust_remote_code=trust_remote_code
        )

    set_seed(settings.seed)
    start = time.perf_counter()
    chosen = choose_device(device)
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    model = load_model(folder, dtype="float32", **_NO_DROPOUT[json.loads(config_text)["model_type"]])
    _freeze_key_biases(model)
    teacher = None
    if settings.loss == "kl":
        teacher = load_model(origin, dtype="float32", trust_remote_code=trust_remote_code)

    size = sum(path.stat().st_size for path in folder.iterdir())
    with staged_output(folder, overwrite=True, size=size) as staging:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = DistillationTrainer(
                model=model,
                teacher=teacher,
                args=_arguments(settings, scratch, chosen),
                train_dataset=list(blocks),
                data_collator=collate,
                callbacks=[_Report(lambda done, total: progress("uptrain", done, total))],
            )
            trainer.remove_callback(PrinterCallback)
            result = trainer.train()
        _save(model, folder, staging)
        report["uptraining"] = dataclasses.asdict(settings) | {
            "steps": result.global_step,
            "tokens": result.global_step * settings.tokens_per_step,
            "device": device_name(chosen),
        }
        report["seconds"]["uptrain"] = round(time.perf_counter() - start, 2)
        if held_out is not None:
            del model, teacher, trainer
            start = time.perf_counter()
            rows = {"source": origin, "converted": folder, "uptrained": staging}
            report["quality"] = compare(rows, held_out, trust_remote_code=trust_remote_code, progress=progress)
            report["seconds"]["evaluate"] = round(time.perf_counter() - start, 2)
        write_report(staging, report)
    return report


def override(recipe: str | Recipe, **settings: Any) -> Recipe:
    """A recipe with the settings that are not None. Raises RecipeError."""
    if isinstance(recipe, str):
        return load_recipe(recipe, **settings)
    return dataclasses.replace(recipe, **{key: value for key, value in settings.items() if value is not None})


def training_blocks(
    folder: str | Path, settings: Recipe, *, tokens: int | None = None, trust_remote_code: bool = False
) -> tuple[torch.Tensor, Any]:
    """The text of a recipe as (n, sequence_length) token blocks, and what makes batches of them.

    Args:
        folder: source or result; they share tokenizer and vocabulary.
        tokens: read no more than this, to see whether a recipe can be run at all.

    Raises:
        CheckpointError, DataError: the tokenizer does not load, the text is too short, or they do not fit the model.
    """
    config = load_config(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    longest = settings.sequence_length if config.is_encoder_decoder else config.n_positions
    if settings.sequence_length > longest:
        raise DataError(f"sequence_length {settings.sequence_length} is more than the model's {longest} positions")
    texts = documents(settings.data, "train")
    blocks = token_blocks(texts, tokenizer, settings.sequence_length, tokens or settings.tokens, settings.data)
    check_vocabulary(blocks, config.vocab_size, SpanCorruption.of(tokenizer) if config.is_encoder_decoder else None)
    return blocks, collator(tokenizer, config.is_encoder_decoder)


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
