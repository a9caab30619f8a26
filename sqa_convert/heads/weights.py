"""The one layout of attention weights inside this package.

Notation, used everywhere: D model width, d head size, H heads of the source, Hq query heads kept, Hkv key/value heads
kept, r = Hq / Hkv. Row vectors: head h computes q = x @ query[h].T + query_bias[h], and adds z @ output[h] to the
layer's output, z its (T, d) attention output. How a checkpoint stores this (transposed, fused) is known to `families`
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from typing_extensions import TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints.dtypes import Array

A = TypeVar("A", bound="Tensor | Array", default="Tensor")


@dataclass(frozen=True)
class AttentionHeads(Generic[A]):
    """The weights of one attention site, head by head: torch's tensors, or numpy's arrays where torch is not needed."""

    query: A
    """(Hq, d, D)"""
    key: A
    """(Hkv, d, D)"""
    value: A
    """(Hkv, d, D)"""
    output: A
    """(Hq, d, D)"""
    query_bias: A | None = None
    """(Hq, d)"""
    key_bias: A | None = None
    """(Hkv, d)"""
    value_bias: A | None = None
    """(Hkv, d)"""
    output_bias: A | None = None
    """(D,)"""
    position_bias: A | None = None
    """(Hq, buckets), T5's relative position table, added to the scores"""

    def tensors(self: AttentionHeads[Any]) -> AttentionHeads:
        """The same memory as tensors."""
        import torch

        return AttentionHeads(*(None if a is None else torch.as_tensor(a) for a in vars(self).values()))

    def arrays(self: AttentionHeads[Any]) -> AttentionHeads[Array]:
        """The same memory, on the CPU, as arrays."""
        import numpy as np

        arrays: Iterator[Any] = (None if a is None else np.asarray(a) for a in vars(self).values())
        return AttentionHeads(*arrays)
