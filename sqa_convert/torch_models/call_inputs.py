"""One call of `nn.MultiheadAttention` as what its heads read: inputs and masks, with what counts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.site_inputs import Inputs
from ..layers.grouped_attention import causal_mask
from ..layers.multihead_masks import added

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


class MasksDifferError(Exception):
    """Heads are masked each in its own way, so that no one pattern can stand for several."""


@dataclass(frozen=True)
class Call:
    """A call on B sequences, float32 on the CPU; an explicit `mask` in `inputs` unless it is the causal one."""

    inputs: Inputs
    causal: bool
    """whether the mask is the causal one, and left out"""

    @property
    def explicit(self) -> Inputs:
        """With the causal mask in it."""
        if not self.causal:
            return self.inputs
        batch, length = self.inputs.x.shape[:2]
        mask = torch.zeros(length, length).masked_fill_(~causal_mask(length, length), -torch.inf)
        return replace(self.inputs, mask=mask.expand(batch, -1, -1))


@torch.no_grad()
def call_of(module: nn.MultiheadAttention, args: Any, kwargs: Any, query_padding: Tensor | None = None) -> Call:
    """What a call reads.

    Args:
        module: that is called.
        args: of the call.
        kwargs: of the call.
        query_padding: (B, T), bool or to be added, of queries that are none, where the call does not say it.

    Raises:
        MasksDifferError: the masks of one sequence differ by head.
    """
    given = _SIGNATURE.bind(module, *args, **kwargs).arguments
    query, key, value = given["query"], given["key"], given["value"]
    to_itself, one_source = _same(query, key), _same(key, value)
    batch_dim = 0 if module.batch_first else 1
    query, key, value = (t.unsqueeze(batch_dim) if t.dim() == 2 else t for t in (query, key, value))
    x, memory, values = (_held(t if module.batch_first else t.transpose(0, 1)) for t in (query, key, value))
    batch, length, keys = x.shape[0], x.shape[1], memory.shape[1]
    padding = added(given.get("key_padding_mask"), torch.float32, "key_padding_mask")
    padding = None if padding is None else padding.cpu().reshape(-1, keys)  # (B, S)
    mask = _mask(given.get("attn_mask"), batch, module.num_heads, (length, keys))
    attended = None
    if padding is not None:
        attended = padding != -torch.inf
        if padding[attended].any():  # numbers that weigh keys, not padding
            weighed = padding.masked_fill(~attended, 0)[:, None].expand(-1, length, -1)
            mask = weighed if mask is None else mask + weighed
    counted = attended if to_itself else _unpadded(query_padding, (batch, length))
    causal = mask is not None and length == keys and (batch == 1 or mask.stride(0) == 0) and _is_causal(mask[0])
    causal = causal and (attended is None or bool(attended[:, 0].all()))
    if not causal:
        counted, attended, mask = _without_blind_rows(counted, attended, mask, (batch, length))
    inputs = Inputs(
        x,
        None if to_itself else memory,
        None if counted is None or bool(counted.all()) else counted,
        None if attended is None or bool(attended.all()) else attended,
        None if one_source else values,
        None if causal else mask,
    )
    return Call(inputs, causal)


def _held(tensor: Tensor) -> Tensor:
    """A copy, whatever the model does to its own later."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _mask(given: Tensor | None, batch: int, heads: int, shape: tuple[int, int]) -> Tensor | None:
    """(B, T, S), to be added; of one mask for all sequences its stride is 0. Raises MasksDifferError."""
    if given is None:
        return None
    mask = added(given, torch.float32, "attn_mask")
    assert mask is not None
    mask = mask.cpu()
    if mask.dim() == 2:
        return mask.expand(batch, *shape)
    mask = mask.view(batch, heads, *shape)
    if not bool((mask == mask[:, :1]).all()):
        raise MasksDifferError
    return mask[:, 0]


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask (T, T) hides what comes later and nothing else."""
    before = causal_mask(*mask.shape)
    return not bool(mask[before].any()) and bool((mask[~before] == -torch.inf).all())


def _unpadded(padding: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """(B, T), True at positions that are none of `padding`."""
    if padding is None or padding.numel() != shape[0] * shape[1]:
        return None
    kept = ~padding if padding.dtype == torch.bool else padding != -torch.inf
    return kept.cpu().reshape(shape)


def _without_blind_rows(
    counted: Tensor | None, attended: Tensor | None, mask: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Queries that may attend to nothing count in nothing, and may attend: what they read would be no number."""
    if attended is not None and not bool(attended.any(1).all()):
        empty = ~attended.any(1, keepdim=True)  # (B, 1)
        counted = (torch.ones(shape).bool() if counted is None else counted) & ~empty
        attended = attended | empty
    if mask is not None:
        seen = mask != -torch.inf
        seen = seen if attended is None else seen & attended[:, None]
        blind = ~seen.any(2)  # (B, T)
        if bool(blind.any()):
            counted = (torch.ones(shape).bool() if counted is None else counted) & ~blind
            mask = mask.masked_fill(blind[..., None], 0)
    return counted, attended, mask
