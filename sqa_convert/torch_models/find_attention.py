"""Which attentions of a model are converted, and why others are not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from ..errors import RecipeError, UnsupportedModelError, shown
from ..layers.multihead_weights import extra_keys, why_not

Attentions = dict[str, nn.MultiheadAttention]
"""by their names in the model; "" is the model itself"""


def bare(model: Any) -> nn.Module:
    """A model without what was put around it to run it: `torch.compile`, `DataParallel`. Raises RecipeError."""
    while isinstance(model, nn.Module):
        inside = model._modules.get("_orig_mod")
        if inside is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inside = model._modules.get("module")
        if inside is None:
            return model
        model = inside
    raise RecipeError(f"model is a {shown(type(model).__name__)}: give a torch module")


def find_attention(model: nn.Module, patterns: Sequence[str] | None) -> tuple[Attentions, dict[str, str]]:
    """The attentions to be converted, and of those that stay the reason.

    Args:
        model: any.
        patterns: names of modules, with `*` for any part; None: all.

    Raises:
        RecipeError: a pattern fits no attention.
        UnsupportedModelError: there is no attention that can be converted.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not every:
        raise UnsupportedModelError(f"{type(model).__name__} holds no nn.MultiheadAttention")
    asked = [patterns] if isinstance(patterns, str) else patterns
    for pattern in asked or ():
        if not any(fnmatch(name, pattern) for name in every):
            raise RecipeError(f"--modules {shown(pattern)}: this model has {shown(', '.join(every), 300)}")
    kept: dict[str, str] = {}
    for name, module in every.items():
        extra = extra_keys(module)
        if asked is not None and not any(fnmatch(name, pattern) for pattern in asked):
            kept[name] = "not asked for"
        elif why := why_not(module) or (f"{extra}: no one key is right for several heads" if extra else ""):
            kept[name] = why
    found = {name: module for name, module in every.items() if name not in kept}
    if not found:
        name, why = next(iter(kept.items()))
        raise UnsupportedModelError(f"no attention of this {type(model).__name__} can be converted: {name}: {why}")
    return found, kept
