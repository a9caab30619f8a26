"""What a model does on text: the inputs of its attention sites, and how much each part of their outputs matters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .execution import Progress, silent
from .families import Site

SENSITIVITY_TOKENS = 16_384
"""predictions whose gradients are looked at"""

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

    hooks = [_module(model, site.prefix).register_forward_pre_hook(watch(site), with_kwargs=True) for site in sites]
    try:
        for batch in batches:
            with contextlib.suppress(_EnoughError):
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    together = torch.cat(memory) if memory else None
    return {site: (torch.cat(parts), together if site.kind == "cross" else None) for site, parts in seen.items()}


def _module(model: nn.Module, prefix: str) -> nn.Module:
    """The module at a canonical prefix; a model without a head lacks the first part of the name."""
    base = getattr(model, "base_model_prefix", "")
    missing = base and not hasattr(model, base)
    return model.get_submodule(prefix.removeprefix(f"{base}.") if missing else prefix)


def sensitivity(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    device: torch.device,
    generator: torch.Generator,
    progress: Progress = silent,
) -> dict[Site, Tensor]:
    """How much each direction of a site's output matters to the model's predictions: (D, D), float64, a Fisher matrix.

    To second order the KL divergence that an error e of a site's output causes is e F e^T / 2, with F the mean of g^T
    g over positions, g the gradient of the log-likelihood of tokens drawn from the model's own prediction.

    Source: Fisher information as in K-FAC, Martens and Grosse, arXiv 1503.05671.
    """
    found: dict[Site, Tensor] = {}

    def watch(site: Site) -> Callable[..., None]:
        def accumulate(gradient: Tensor) -> None:
            rows = gradient.flatten(0, 1).double().cpu() if device.type == "mps" else gradient.flatten(0, 1).double()
            square = (rows.T @ rows).cpu()
            found[site] = found[site] + square if site in found else square

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output[0].register_hook(accumulate)

        return hook

    hooks = [_module(model, site.prefix).register_forward_hook(watch(site)) for site in sites]
    # Weights are frozen, so that gradients flow to activations alone; they start at the embeddings.
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks += [module.register_forward_hook(lambda m, args, output: output.requires_grad_()) for module in embeddings]
    tokens = 0
    try:
        for batch in batches:
            progress("measure sensitivity", min(tokens, SENSITIVITY_TOKENS), SENSITIVITY_TOKENS)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = model(**inputs, use_cache=False).logits  # (B, T, V)
            drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1).cpu(), 1, generator=generator)
            nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten().to(device), reduction="sum").backward()
            tokens += logits.shape[0] * logits.shape[1]
            if tokens >= SENSITIVITY_TOKENS:
                break
    finally:
        for handle in hooks:
            handle.remove()
    progress("measure sensitivity", SENSITIVITY_TOKENS, SENSITIVITY_TOKENS)
    return {site: matrix / matrix.diagonal().mean().clamp(min=1e-30) for site, matrix in found.items()}
