"""The inputs of attention sites while a model runs over text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.measure import model_inputs
from ..families import Site
from ..heads.site_inputs import Inputs
from ..progress import step_done
from ..text.collate import IGNORED

Batch = dict[str, Tensor]
"""inputs of a model, and the labels of what it predicts"""


class _EnoughError(Exception):
    """Everything wanted of a forward pass has been seen."""


@torch.no_grad()
def capture(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[Site, list[Inputs]]:
    """The inputs of some attention sites, of each batch, in `dtype` on the CPU."""
    seen: dict[Site, list[Inputs]] = {site: [] for site in sites}
    last, crosses = sites[-1], [site for site in sites if site.kind == "cross"]
    memory: list[Tensor] = []  # of this batch, for all its sites
    counted: dict[str, Tensor | None] = {}

    def watch(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if crosses and site == crosses[0]:
                memory.append(read_by_cross(kwargs).to(dtype).cpu())
            attended = {"encoder": counted["encoder"], "cross": counted["encoder"]}.get(site.kind)
            own = memory[0] if site.kind == "cross" else None
            seen[site].append(Inputs(hidden.to(dtype).cpu(), own, counted[site.kind], attended))
            if site == last:
                raise _EnoughError

        return hook

    hooks = [module_at(model, site.prefix).register_forward_pre_hook(watch(site), with_kwargs=True) for site in sites]
    try:
        for batch in batches:
            step_done()
            memory.clear()
            counted.update(positions(model, batch))
            with contextlib.suppress(_EnoughError):
                model(**model_inputs(model, batch, device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def positions(model: Any, batch: Batch) -> dict[str, Tensor | None]:
    """Of each kind of attention the query positions that count, (B, T) bool; None where all do.

    They are those that something is predicted at, and in an encoder those that are read.
    """
    labels, read = batch.get("labels"), batch.get("attention_mask")
    predicted = batch.get("decoder_attention_mask")
    if labels is not None:
        predicted = labels != IGNORED
        if not model.config.is_encoder_decoder:  # a position predicts the next token; the last one's is not here
            predicted = torch.cat([predicted[:, 1:], predicted[:, -1:]], 1)
    decoder = _unless_all(predicted)
    return {"encoder": _unless_all(read), "decoder": decoder, "cross": decoder}


def _unless_all(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.bool()


def read_by_cross(kwargs: dict[str, Any]) -> Tensor:
    """What a cross-attention reads, out of the arguments of its call: T5 and UMT5 name it differently."""
    states: Tensor = kwargs["key_value_states" if "key_value_states" in kwargs else "encoder_hidden_states"]
    return states


def module_at(model: nn.Module, prefix: str) -> nn.Module:
    """The module at a canonical prefix; a model without a head lacks the first part of the name."""
    base = getattr(model, "base_model_prefix", "")
    missing = base and not hasattr(model, base)
    return model.get_submodule(prefix.removeprefix(f"{base}.") if missing else prefix)
