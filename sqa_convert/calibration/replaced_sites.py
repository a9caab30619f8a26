"""What converted heads cost the predictions, of one attention site or of many: the source runs with theirs in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conversion.plan import Plan
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import Predictions, Quality, finite_quality
from ..families import Site
from ..heads import AttentionHeads
from .activations import module_at, read_by_cross


@dataclass(frozen=True)
class Replacement:
    """A source model on text, whose attention sites can be replaced one by one. Nothing of the model is changed."""

    model: Any
    """in eval mode, on the device of `text`"""
    plan: Plan
    """of a conversion of it: how its sites attend"""
    text: HeldOut
    """rows that begin at position 0 and are padded at the end, or documents one behind the other, told by positions"""
    source: Predictions
    """of the model on that text"""

    def kl(self, heads: Mapping[Site, AttentionHeads]) -> float | None:
        """KL divergence to the model as it is, nats a token, with these heads in its sites; None if not finite."""
        quality = self.quality(heads)
        return None if quality is None else quality.kl

    def quality(self, heads: Mapping[Site, AttentionHeads]) -> Quality | None:
        """How well the model predicts with these heads in its sites, against itself; None if not finite."""
        with self._in_place(heads):
            return finite_quality(self.model, self.text, self.source)

    @contextlib.contextmanager
    def _in_place(self, heads: Mapping[Site, AttentionHeads]) -> Iterator[None]:
        seen: dict[str, Tensor | None] = {}

        def look(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            seen["read"] = None if mask is None or bool(mask.all()) else mask.bool()  # of its input, by an encoder
            seen["apart"] = None if positions is None else _between_documents(positions)

        hooks = [self.model.register_forward_pre_hook(look, with_kwargs=True)]
        try:
            for site, converted in heads.items():
                module = module_at(self.model, site.prefix)
                hooks.append(module.register_forward_hook(self._instead(site, converted, seen), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _instead(self, site: Site, heads: AttentionHeads, seen: Mapping[str, Tensor | None]) -> Callable[..., Any]:
        """A hook that gives what converted heads make of a site's inputs in place of what the site made."""
        attention = self.plan.family.attention(site, self.plan.source_config)
        device = self.text.device
        weights = AttentionHeads(*(None if t is None else t.to(device) for t in vars(heads).values()))

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            memory = read_by_cross(kwargs) if site.kind == "cross" else None
            attended = seen["read"] if site.kind in ("encoder", "cross") else None
            return (attention.layer(weights, hidden, memory, attended, mask=seen["apart"]), *output[1:])

        return hook


def _between_documents(positions: Tensor) -> Tensor:
    """A mask (B, T, T) to add to scores, of rows whose positions (B, T) begin again with each document."""
    document = (positions == 0).cumsum(-1)
    other = document[:, :, None] != document[:, None, :]
    return torch.zeros(other.shape, device=positions.device).masked_fill(other, -torch.inf)
