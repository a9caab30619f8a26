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
        self, heads: AttentionHeads, x: Tensor, memory: Tensor | None = None, attended: Tensor | None = None
    ) -> Tensor:
        """What each query head reads, before its output projection: (B, T, D), memory (B, S, D) -> (B, T, Hq, d).

        `attended` (B, S) tells the keys that may be attended to from padding; None: all may.
        """
        source = x if memory is None else memory
        query = _project(x, heads.query, heads.query_bias)  # (B, Hq, T, d)
        repeats = len(heads.query) // len(heads.key)
        key = _project(source, heads.key, heads.key_bias).repeat_interleave(repeats, 1)  # (B, Hq, S, d)
        value = _project(source, heads.value, heads.value_bias).repeat_interleave(repeats, 1)
        bias = self._bias(heads, torch.arange(x.shape[1], device=x.device), source.shape[1])
        bias = _without_padding(bias, attended, query.dtype)
        causal = self.causal and bias is None
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=self.scale
        ).transpose(1, 2)

    def layer(
        self, heads: AttentionHeads, x: Tensor, memory: Tensor | None = None, attended: Tensor | None = None
    ) -> Tensor:
        """The layer's output: (B, T, D)."""
        outputs = self.outputs(heads, x, memory, attended).flatten(-2) @ heads.output.flatten(0, 1)
        return outputs if heads.output_bias is None else outputs + heads.output_bias

    def patterns(
        self,
        heads: AttentionHeads,
        x: Tensor,
        rows: Tensor,
        memory: Tensor | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Attention patterns of some query positions: rows (n,) -> (B, Hq, n, S)."""
        source = x if memory is None else memory
        query = _project(x[:, rows], heads.query, heads.query_bias)
        repeats = len(heads.query) // len(heads.key)
        key = _project(source, heads.key, heads.key_bias).repeat_interleave(repeats, 1)
        scores = query @ key.mT * self.scale
        bias = self._bias(heads, rows, source.shape[1])
        if bias is not None:
            scores = scores + bias
        elif self.causal:
            positions = torch.arange(source.shape[1], device=x.device)
            scores = scores.masked_fill(positions > rows[:, None], -torch.inf)
        if attended is not None:
            scores = scores.masked_fill(~attended[:, None, None], -torch.inf)
        return scores.softmax(-1)

    def _bias(self, heads: AttentionHeads, rows: Tensor, keys: int) -> Tensor | None:
        """T5's position bias with the causal mask in it, (Hq, n, S)."""
        if heads.position_bias is None or self.bucket is None:
            return None
        distance = torch.arange(keys, device=rows.device) - rows[:, None]  # (n, S)
        bias = heads.position_bias[:, self.bucket(distance)]
        return bias.masked_fill(distance > 0, -torch.inf) if self.causal else bias


def _without_padding(bias: Tensor | None, attended: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, (Hq, T, S) or None, with -inf for keys that are padding: (B, Hq or 1, T or 1, S)."""
    if attended is None:
        return bias
    padding = torch.zeros(attended.shape, dtype=dtype, device=attended.device).masked_fill(~attended, -torch.inf)
    return padding[:, None, None] if bias is None else bias + padding[:, None, None]


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
