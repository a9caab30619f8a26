"""The masks of `nn.MultiheadAttention` as one that is added to scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from .grouped_attention import causal_mask


def added(mask: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """A mask as `nn.MultiheadAttention` takes it, bool with True where nothing may be attended to, as numbers to add.

    Raises RecipeError: it is neither bool nor floating.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise RecipeError(f"{name} of {mask.dtype}: give a bool or a floating mask")
    return mask.to(dtype)


def by_head(mask: Tensor, batch: int, shape: tuple[int, int], query_heads: int, source_heads: int) -> Tensor:
    """An `attn_mask` that broadcasts to (N, Hq, L, S).

    Args:
        mask: (L, S); (N, L, S), one for each sequence; (N Hq, L, S), or (N H, L, S) of the heads that there were, of
            which query head i takes that of head i H // Hq.
        batch: N.
        shape: (L, S).
        query_heads: Hq.
        source_heads: H.

    Raises:
        RecipeError: it has another shape.
    """
    if mask.shape[-2:] == shape:
        if mask.dim() == 2:
            return mask
        if mask.dim() == 3 and len(mask) == batch * query_heads:
            return mask.view(batch, query_heads, *shape)
        if mask.dim() == 3 and len(mask) == batch * source_heads:
            taken = torch.arange(query_heads, device=mask.device) * source_heads // query_heads
            return mask.view(batch, source_heads, *shape)[:, taken]
        if mask.dim() == 3 and len(mask) == batch:
            return mask[:, None]
    firsts = sorted({batch, batch * query_heads, batch * source_heads})
    shapes = ", ".join(str((first, *shape)) for first in firsts)
    raise RecipeError(f"attn_mask of shape {tuple(mask.shape)}: it must be {shape} or one of {shapes}")


@dataclass(frozen=True)
class Masks:
    """What a call of `nn.MultiheadAttention` is given to mask with."""

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool

    def merged(
        self, queries: Tensor, keys: int, source_heads: int, past: int, with_kernel: bool
    ) -> tuple[Tensor | None, bool]:
        """What is added to the scores, that broadcasts to (N, Hq, L, S), or None; and whether attention is causal
        besides.

        Args:
            queries: (N, Hq, L, d).
            keys: S.
            source_heads: H.
            past: positions before the first query.
            with_kernel: whether a kernel that knows causal attention may be called.

        Raises:
            RecipeError: a mask does not fit.
        """
        batch, query_heads, length, _ = queries.shape
        shape, mask = (length, keys), self.attn_mask
        if self.is_causal and with_kernel and not past and self.key_padding_mask is None:
            return None, True
        if self.is_causal and mask is None and length > 1:
            mask = ~causal_mask(length, keys, past=past, device=queries.device)
        total = added(mask, queries.dtype, "attn_mask")
        if total is not None:
            total = by_head(total, batch, shape, query_heads, source_heads)
        padding = added(self.key_padding_mask, queries.dtype, "key_padding_mask")
        if padding is None:
            return total, False
        if padding.shape != (batch, keys):
            raise RecipeError(
                f"key_padding_mask of shape {tuple(padding.shape)}: it must be {(batch, keys)}, sequences and keys"
            )
        padding = padding[:, None, None]
        return padding if total is None else total + padding, False
