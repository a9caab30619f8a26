"""The first head of each group, the second published baseline."""

from __future__ import annotations

from typing import Any

from .methods import register_method
from .partition import Partition
from .pool import first_of, pool, sum_of
from .weights import A, AttentionHeads


@register_method(
    "first",
    summary="keep the first head of a group, sum its output projections",
    source="Ainslie et al., GQA, arXiv 2305.13245, section 3.3",
)
def first(heads: AttentionHeads[A], partition: Partition, statistics: Any = None) -> AttentionHeads[A]:
    """The first head's Wq of each query cluster and Wk, Wv of each key/value group; Wo is summed over the cluster.

    Args:
        heads: the H heads of the source.
        partition: of those H heads.
        statistics: not used.

    Returns:
        Hq query heads and Hkv key/value heads, in the dtype of the source.
    """
    return pool(heads, partition, query=first_of, key_value=first_of, output=sum_of)
