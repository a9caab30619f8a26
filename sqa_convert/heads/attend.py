"""How a site attends: scores to patterns to outputs, in the canonical layout. The definition that fits are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .weights import AttentionHeads


@dataclass(frozen=True)
class Attention:
    """All of an attention site that is no weight. B batch, T query positions, S key positions."""

    scale: float
    """of the scores: d^-0.5 in GPT-2, 1 in T5"""
    causal: bool
    bucket: Callable[[Tensor], Tensor] | None = None
    """T5: distances key - query -> columns of `position_bias`"""

    def outputs(
        self,
        heads: AttentionHeads,
        x: Tensor,
        memory: Tensor | None = None,
        attended: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What each query head reads, before its output projection: (B, T, D) -> (B, T, Hq, d).

        Args:
            heads: of the site.
            x: (B, T, D), what queries are made of.
            memory: (B, S, D), what keys are made of; None: `x`.
            attended: (B, S), tells the keys that may be attended to from padding; None: all may.
            values: (B, S, D), what values are made of; None: what keys are made of.
            mask: (B, T, S), added to the scores of all heads.
        """
        source = x if memory is None else memory
        query = _project(x, heads.query, heads.query_bias)  # (B, Hq, T, d)
        repeats = len(heads.query) // len(heads.key)
        key = _project(source, heads.key, heads.key_bias).repeat_interleave(repeats, 1)  # (B, Hq, S, d)
        value = _project(source if values is None else values, heads.value, heads.value_bias)
        value = value.repeat_interleave(repeats, 1)
        rows = torch.arange(x.shape[1], device=x.device)
        added = self._added(heads, rows, source.shape[1], query.dtype, attended, mask)
        causal = self.causal and added is None
        return scaled_dot_product_attention(
            query, key, value, attn_mask=added, is_causal=causal, scale=self.scale
        ).transpose(1, 2)

    def layer(
        self,
        heads: AttentionHeads,
        x: Tensor,
        memory: Tensor | None = None,
        attended: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The layer's output: (B, T, D). Arguments as `outputs`."""
        outputs = self.outputs(heads, x, memory, attended, values, mask).flatten(-2) @ heads.output.flatten(0, 1)
        return outputs if heads.output_bias is None else outputs + heads.output_bias

    def patterns(
        self,
        heads: AttentionHeads,
        x: Tensor,
        rows: Tensor,
        memory: Tensor | None = None,
        attended: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention patterns of some query positions: rows (n,) -> (B, Hq, n, S)."""
        source = x if memory is None else memory
        query = _project(x[:, rows], heads.query, heads.query_bias)
        repeats = len(heads.query) // len(heads.key)
        key = _project(source, heads.key, heads.key_bias).repeat_interleave(repeats, 1)
        scores = query @ key.mT * self.scale
        of_rows = None if mask is None else mask[:, rows]
        added = self._added(heads, rows, source.shape[1], scores.dtype, attended, of_rows)
        if added is not None:
            scores = scores + added
        elif self.causal:
            positions = torch.arange(source.shape[1], device=x.device)
            scores = scores.masked_fill(positions > rows[:, None], -torch.inf)
        return scores.softmax(-1)

    def _added(
        self,
        heads: AttentionHeads,
        rows: Tensor,
        keys: int,
        dtype: torch.dtype,
        attended: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor | None:
        """What is added to the scores of some rows, broadcasting to (B, Hq, n, S): None where that is nothing but a
        causal mask."""
        bias = self._bias(heads, rows, keys)
        added = None if bias is None else bias[None]
        if attended is not None:
            padding = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
            padding = padding.masked_fill(~attended, -torch.inf)[:, None, None]
            added = padding if added is None else added + padding
        if mask is not None:
            added = mask[:, None] if added is None else added + mask[:, None]
        if added is not None and bias is None and self.causal:
            later = torch.arange(keys, device=rows.device) > rows[:, None]  # (n, S)
            added = added.masked_fill(later, -torch.inf)
        return added

    def _bias(self, heads: AttentionHeads, rows: Tensor, keys: int) -> Tensor | None:
        """T5's position bias with the causal mask in it, (Hq, n, S)."""
        if heads.position_bias is None or self.bucket is None:
            return None
        distance = torch.arange(keys, device=rows.device) - rows[:, None]  # (n, S)
        bias = heads.position_bias[:, self.bucket(distance)]
        return bias.masked_fill(distance > 0, -torch.inf) if self.causal else bias


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, T, D) by (heads, d, D) -> (B, heads, T, d)"""
    heads, d, _ = weight.shape
    made = torch.nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return made.view(*x.shape[:-1], heads, d).transpose(1, 2)


def query_with_bias(heads: AttentionHeads) -> Tensor:
    """Wq with its bias as one more input: (H, d, D + 1), float64."""
    query = heads.query.double()
    bias = torch.zeros_like(query[..., :1]) if heads.query_bias is None else heads.query_bias.double()[..., None]
    return torch.cat([query, bias], -1)
