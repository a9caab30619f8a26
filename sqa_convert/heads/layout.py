"""The one layout of attention weights inside this package.

Notation, used everywhere: D model width, d head size, H heads of the source, Hq query heads kept, Hkv key/value heads
kept, r = Hq / Hkv. Row vectors: head h computes q = x @ query[h].T + query_bias[h], and adds z @ output[h] to the
layer's output, z its (T, d) attention output. How a checkpoint stores this (transposed, fused) is known to `families`
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttentionHeads:
    """The weights of one attention site, head by head."""

    query: Tensor
    """(Hq, d, D)"""
    key: Tensor
    """(Hkv, d, D)"""
    value: Tensor
    """(Hkv, d, D)"""
    output: Tensor
    """(Hq, d, D)"""
    query_bias: Tensor | None = None
    """(Hq, d)"""
    key_bias: Tensor | None = None
    """(Hkv, d)"""
    value_bias: Tensor | None = None
    """(Hkv, d)"""
    output_bias: Tensor | None = None
    """(D,)"""
    position_bias: Tensor | None = None
    """(Hq, buckets), T5's relative position table, added to the scores"""
