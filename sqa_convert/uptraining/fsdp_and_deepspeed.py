"""FSDP and DeepSpeed: which one shares a model out among the processes, and its weights made whole again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RecipeError
from . import processes

_ENGINE = "engine"  # a file of each checkpoint: what it was written by


def check_engine(fsdp: bool) -> None:
    """Raises RecipeError where `accelerate launch` asks for what is not supported, or for what contradicts `fsdp`."""
    wanted = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP")}
    if wanted["DEEPSPEED"] and fsdp:
        raise RecipeError("fsdp: true in the recipe, and DeepSpeed from accelerate launch: choose one")
    if wanted["FSDP"] and os.environ.get("FSDP_VERSION", "1") == "1":
        raise RecipeError("FSDP 1 from accelerate launch is not supported: give fsdp_version: 2 in its file")


def engine(trainer: Any) -> str:
    """What shares the model out, and in how many parts if checkpoints depend on that; "" if nothing does."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:  # each process has a file of its part of the optimizer
        return f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage} in {processes.count()} processes"
    if trainer.is_fsdp_enabled:
        plugin = state.fsdp_plugin
        form = "sharded" if "SHARDED" in str(plugin.state_dict_type) else "full"
        return f"FSDP{plugin.fsdp_version} with {form} checkpoints"
    return ""


def mark(trainer: Any, checkpoint: Path) -> None:
    """Notes in a checkpoint which engine wrote it."""
    (checkpoint / _ENGINE).write_text(engine(trainer))


def check_checkpoint(trainer: Any, checkpoint: str | None) -> None:
    """Raises RecipeError when another engine wrote a checkpoint than would read it."""
    path = None if checkpoint is None else Path(checkpoint) / _ENGINE
    if path is None or not path.is_file():
        return
    was, now = path.read_text(), engine(trainer)
    if was != now:
        plain = "no FSDP or DeepSpeed"
        raise RecipeError(f"--resume: the run began with {was or plain}, not {now or plain}: as it began, or --restart")


def check_folder(trainer: Any) -> None:
    """Raises RecipeError when parts of a checkpoint would lie on nodes that cannot see each other's files."""
    if any(processes.gather(processes.apart())) and (name := engine(trainer)):
        raise RecipeError(f"{name.split(' in ')[0]} on several nodes needs FOLDER to lie where all of them see it")


def is_contradiction(error: ValueError) -> bool:
    """Whether DeepSpeed complains of a file that sets batch size, rate or dtype otherwise than the recipe."""
    return "DeepSpeed config values" in str(error)


def whole_weights(trainer: Any) -> dict[str, Tensor] | None:
    """The trained weights in float32, by the names of the model; None where each process holds all of them.

    Every process must call it; the first one's is complete.
    """
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        weights = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)  # one at a time, from all processes
                if processes.is_first():
                    weights[name] = whole.detach().cpu()
        unset_hf_deepspeed_config()  # else the next model loaded is shared out as well
        return weights
    if trainer.is_fsdp_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return None
