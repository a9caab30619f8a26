"""What the attention of a model costs: heads, parameters, operations, cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.dtypes import DTYPES
from ..families import Dimensions, Site


@dataclass(frozen=True)
class Cost:
    """What the attention of a model costs."""

    q_heads: dict[str, int]
    """by site kind"""
    kv_heads: dict[str, int]
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


def attention_cost(
    sizes: Dimensions, sites: Sequence[Site], counts: Mapping[str, tuple[int, int]], parameters: int, dtype: str
) -> Cost:
    tokens, d = sizes.context, sizes.head_dim
    scores = sum(4 * tokens * tokens * counts[site.kind][0] * d for site in sites)
    projections = sum(4 * tokens * sizes.width * d * sum(counts[site.kind]) for site in sites)
    return Cost(
        q_heads={kind: q for kind, (q, _) in counts.items()},
        kv_heads={kind: kv for kind, (_, kv) in counts.items()},
        parameters=parameters,
        kv_cache_bytes=sum(2 * counts[s.kind][1] * d * DTYPES[dtype][1] for s in sites if s.kind != "encoder"),
        attention_flops=projections + scores,
        score_flops=scores,
    )
