"""The inputs of attention sites while a model runs over text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Site

Batch = dict[str, Tensor]
"""inputs of a model"""


class _EnoughError(Exception):
    """Everything wanted of a forward pass has been seen."""


@torch.no_grad()
def capture(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], device: torch.device
) -> dict[Site, tuple[Tensor, Tensor | None]]:
    """The inputs of some attention sites (N, T, D), and what cross-attention reads (N, S, D); float32 on the CPU."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    memory: list[Tensor] = []
    last, crosses = sites[-1], [site for site in sites if site.kind == "cross"]

    def watch(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[site].append(hidden.float().cpu())
            if crosses and site == crosses[0]:
                memory.append(kwargs["key_value_states"].float().cpu())
            if site == last:
                raise _EnoughError

        return hook

    hooks = [module_at(model, site.prefix).register_forward_pre_hook(watch(site), with_kwargs=True) for site in sites]
    try:
        for batch in batches:
            with contextlib.suppress(_EnoughError):
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    together = torch.cat(memory) if memory else None
    return {site: (torch.cat(seen.pop(site)), together if site.kind == "cross" else None) for site in sites}


def module_at(model: nn.Module, prefix: str) -> nn.Module:
    """The module at a canonical prefix; a model without a head lacks the first part of the name."""
    base = getattr(model, "base_model_prefix", "")
    missing = base and not hasattr(model, base)
    return model.get_submodule(prefix.removeprefix(f"{base}.") if missing else prefix)
