"""Apply one rule to the members of every group, array by array: what `mean`, `first` and `select` share.

Works on numpy's arrays and on torch's tensors alike, so that it need not wait for torch to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .partition import Partition
from .weights import A, AttentionHeads

Rule = Callable[[Any, tuple[int, ...], Any], None]
"""(H, ...) of all heads, the members of one group, and a view of (...) to write their one head into"""


def pool(
    heads: AttentionHeads[A], partition: Partition, *, query: Rule, key_value: Rule, output: Rule
) -> AttentionHeads[A]:
    """Merges heads by one rule each for queries, for keys and values, and for output projections.

    `query` also merges the query bias and T5's position bias; the output bias stays. A group of one head is copied
    verbatim, whatever the rule.
    """

    def merge(weights: Any, groups: tuple[tuple[int, ...], ...], rule: Rule) -> Any:
        merged = _empty(len(groups), weights)
        for i, group in enumerate(groups):
            (rule if len(group) > 1 else first_of)(weights, group, merged[i])
        return merged

    def merge_biases(biases: Any, groups: tuple[tuple[int, ...], ...], rule: Rule) -> Any:
        return None if biases is None else merge(biases, groups, rule)

    clusters, groups = partition.clusters, partition.kv_groups
    return AttentionHeads(
        query=merge(heads.query, clusters, query),
        key=merge(heads.key, groups, key_value),
        value=merge(heads.value, groups, key_value),
        output=merge(heads.output, clusters, output),
        query_bias=merge_biases(heads.query_bias, clusters, query),
        key_bias=merge_biases(heads.key_bias, groups, key_value),
        value_bias=merge_biases(heads.value_bias, groups, key_value),
        output_bias=heads.output_bias,
        position_bias=merge_biases(heads.position_bias, clusters, query),
    )


def mean_of(weights: Any, group: tuple[int, ...], place: Any) -> None:
    sum_of(weights, group, place)
    place /= len(group)


def sum_of(weights: Any, group: tuple[int, ...], place: Any) -> None:
    first_of(weights, group, place)
    for head in group[1:]:  # in place: gathering the heads first takes longer than adding them
        place += weights[head]


def first_of(weights: Any, group: tuple[int, ...], place: Any) -> None:
    place[...] = weights[group[0]]


def _empty(heads: int, like: Any) -> Any:
    """(heads, ...), in memory as `like` lies: what is transposed there is turned only when it is stored."""
    import numpy as np

    shape = (heads, *like.shape[1:])
    return np.empty_like(like, shape=shape) if isinstance(like, np.ndarray) else like.new_empty(shape)
