"""What the attentions of a model read while it runs over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.site_inputs import Inputs
from .call_inputs import Call, MasksDifferError, call_of
from .find_attention import Attentions
from .run_batches import Runner

MEMORY = 4e9
"""bytes of inputs kept at a time"""


@dataclass
class Seen:
    """What one attention was given on some batches."""

    calls: list[Call]
    masks_differ: bool = False
    """by head, in one call at least"""

    @property
    def causal(self) -> bool:
        """Whether it attends causally in every call."""
        return all(call.causal for call in self.calls)

    def inputs(self, causal: bool) -> list[Inputs]:
        """Of an attention that is taken for causal, or is told of it by masks."""
        return [call.inputs if causal else call.explicit for call in self.calls]

    @property
    def positions(self) -> int:
        """Of queries that count."""
        return sum(call.inputs.positions for call in self.calls)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for call in self.calls for tensor in call.inputs.held)


@torch.no_grad()
def watch_calls(runner: Runner, attentions: Attentions, batches: Sequence[Any]) -> dict[str, Seen]:
    """What each of some attentions reads on batches, in their order."""
    seen = {name: Seen([]) for name in attentions}
    paddings: dict[nn.Module, Tensor | None] = {}  # of the queries of a decoder layer's cross-attention, in this call

    def watch(name: str, module: nn.MultiheadAttention) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            try:
                seen[name].calls.append(call_of(module, args, kwargs, paddings.get(module)))
            except MasksDifferError:
                seen[name].masks_differ = True

        return hook

    def decoder(layer: nn.TransformerDecoderLayer, args: Any, kwargs: Any) -> None:
        given = args[4] if len(args) > 4 else kwargs.get("tgt_key_padding_mask")
        paddings[layer.multihead_attn] = given

    hooks = [
        module.register_forward_pre_hook(watch(name, module), with_kwargs=True) for name, module in attentions.items()
    ]
    hooks += [
        layer.register_forward_pre_hook(decoder, with_kwargs=True)
        for layer in runner.model.modules()
        if isinstance(layer, nn.TransformerDecoderLayer)
    ]
    try:
        for batch in batches:
            runner(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def in_groups(attentions: Attentions, nbytes: dict[str, float]) -> Iterator[Attentions]:
    """Attentions whose inputs fit into memory together, at least one at a time."""
    group: Attentions = {}
    size = 0.0
    for name, module in attentions.items():
        if group and size + nbytes[name] > MEMORY:
            yield group
            group, size = {}, 0.0
        group[name] = module
        size += nbytes[name]
    yield group
