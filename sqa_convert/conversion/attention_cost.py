"""What the attention of a model costs: heads, parameters, operations, cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.dtypes import DTYPES
from ..families import Dimensions, Site


@dataclass(frozen=True)
class Cost:
    """What the attention of a model costs."""

    q_heads: dict[str, int | list[int]]
    """by site kind: one number, or a list of every layer's where they differ"""
    kv_heads: dict[str, int | list[int]]
    parameters: int
    """of the whole model"""
    kv_cache_bytes: int
    """per token of context, all layers: decoder self-attention, or for T5 also cross-attention per encoder token"""
    attention_flops: int
    """of all attention sites for one input of `context` tokens, projections included"""
    score_flops: int
    """of those, the two (T, T) products: what falls by H / Hq"""


def count_parameters(shapes: Mapping[str, tuple[int, ...]], others: frozenset[str]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in others)


def counts_by_layer(counts: Mapping[Site, tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
    """(Hq, Hkv) of every layer, by site kind; `counts` holds the sites of a kind in the order of their layers."""
    result: dict[str, list[tuple[int, int]]] = {}
    for site, kept in counts.items():
        result.setdefault(site.kind, []).append(kept)
    return result


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers


def attention_cost(sizes: Dimensions, counts: Mapping[Site, tuple[int, int]], parameters: int, dtype: str) -> Cost:
    """Args: counts: (Hq, Hkv) of each site; parameters: of the whole model; dtype: safetensors' name."""
    tokens, d = sizes.context, sizes.head_dim
    scores = sum(4 * tokens * tokens * q * d for q, _ in counts.values())
    projections = sum(4 * tokens * sizes.width * d * (q + kv) for q, kv in counts.values())
    by_layer = counts_by_layer(counts)
    return Cost(
        q_heads={kind: _one_or_all([q for q, _ in layers]) for kind, layers in by_layer.items()},
        kv_heads={kind: _one_or_all([kv for _, kv in layers]) for kind, layers in by_layer.items()},
        parameters=parameters,
        kv_cache_bytes=sum(2 * kv * d * DTYPES[dtype][1] for s, (_, kv) in counts.items() if s.kind != "encoder"),
        attention_flops=projections + scores,
        score_flops=scores,
    )
