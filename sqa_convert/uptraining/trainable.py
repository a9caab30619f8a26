"""What is trained of a model: all of it, attention, or LoRA on attention's projections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..evaluation.load import load_config
from .recipe import Recipe


def no_dropout(path: Path, trust_remote_code: bool = False) -> dict[str, float]:
    """Settings that switch dropout off; they must be there when a model is built."""
    config = load_config(path, trust_remote_code)
    return {name: 0.0 for name in vars(config) if name.endswith("_pdrop") or name == "dropout_rate"}


def choose_trained(model: Any, recipe: Recipe) -> None:
    """Freezes what is not trained, and key biases: softmax ignores them, so their gradient is rounding noise."""
    in_attention = {id(parameter) for _, module in _attentions(model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        wanted = recipe.train == "all" or id(parameter) in in_attention
        parameter.requires_grad_(wanted and not name.endswith("k_proj.bias"))


def with_lora(model: Any, rank: int) -> Any:
    """The model with adapters on attention's projections.

    They are named in full, since a GPT-2's feed-forward layer has a `c_proj` too.
    """
    from peft import LoraConfig, get_peft_model

    names = [
        f"{place}.{name}"
        for place, attention in _attentions(model)
        for name, child in attention.named_modules()
        if isinstance(child, (torch.nn.Linear, Conv1D))
    ]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)))


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if type(module).__name__.endswith("Attention"))
