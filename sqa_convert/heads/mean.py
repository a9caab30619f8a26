"""Mean pooling, the published way from multi-head to grouped attention."""

from __future__ import annotations

from typing import Any

from .methods import register_method
from .partition import Partition
from .pool import mean_of, pool, sum_of
from .weights import A, AttentionHeads


@register_method(
    "mean",
    summary="average the queries, keys and values of a group, sum its output projections",
    source="Ainslie et al., GQA, arXiv 2305.13245, section 2.1",
)
def mean(heads: AttentionHeads[A], partition: Partition, statistics: Any = None) -> AttentionHeads[A]:
    """Means of Wq over each query cluster, of Wk and Wv over each key/value group; Wo is summed over the cluster.

    The heads of a cluster share one attention pattern afterwards, so their outputs add: a mean of Wo would shrink
    them. Lossless when the heads of each group are copies of one head. Averages of unrelated heads shrink, so merged
    and single heads end at different temperatures: it is a baseline, and left as published.

    Args:
        heads: the H heads of the source.
        partition: of those H heads.
        statistics: not used.

    Returns:
        Hq query heads and Hkv key/value heads, in the dtype of the source.
    """
    return pool(heads, partition, query=mean_of, key_value=mean_of, output=sum_of)
