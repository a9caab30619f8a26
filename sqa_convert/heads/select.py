"""Head pruning: whole heads stay, the others go."""

from __future__ import annotations

import math
from typing import Any

from .methods import register_method
from .partition import Partition
from .pool import pool
from .weights import A, AttentionHeads


@register_method(
    "select",
    summary="keep the strongest head of a group whole, drop the others (head pruning)",
    source="Michel et al., arXiv 1905.10650; strength here is the norm of the head's output map",
)
def select(heads: AttentionHeads[A], partition: Partition, statistics: Any = None) -> AttentionHeads[A]:
    """The query and output projection of the strongest head of each cluster, key and value of the strongest of a group.

    Calibration hands in heads whose output projections are in the metric of what matters to the model's predictions, so
    that strength is measured in it.

    Args:
        heads: the H heads of the source.
        partition: of those H heads.
        statistics: not used.

    Returns:
        Hq query heads and Hkv key/value heads, in the dtype of the source.
    """
    strength = output_map_norm(heads)

    def strongest(weights: Any, group: tuple[int, ...], place: Any) -> None:
        place[...] = weights[max(group, key=lambda h: strength[h])]

    return pool(heads, partition, query=strongest, key_value=strongest, output=strongest)


def output_map_norm(heads: AttentionHeads[Any]) -> list[float]:
    """Frobenius norm of each head's map Wv Wo, a (D, D) matrix of rank d that is never formed; length H."""
    values = heads.value @ heads.value.swapaxes(1, 2)  # (H, d, d)
    outputs = heads.output @ heads.output.swapaxes(1, 2)
    return [math.sqrt(max(square, 0)) for square in (values * outputs).sum((1, 2)).tolist()]
