"""Apply one rule to the members of every group, array by array: what `mean`, `first` and `select` share.

Tensors and arrays alike: what is so simple need not wait until torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .layout import A, AttentionHeads
from .partition import Partition

Rule = Callable[[Any, tuple[int, ...]], Any]
"""((H, ...) of all heads, the members of one group) -> (...)"""


def pool(
    heads: AttentionHeads[A], partition: Partition, *, query: Rule, key_value: Rule, output: Rule
) -> AttentionHeads[A]:
    """Merges heads by one rule each for queries, for keys and values, and for output projections.

    `query` also merges the query bias and T5's position bias; the output bias stays. A group of one head is copied
    verbatim, whatever the rule.
    """

    def merge(weights: Any, groups: tuple[tuple[int, ...], ...], rule: Rule) -> Any:
        return _stack([weights[g[0]] if len(g) == 1 else rule(weights, g) for g in groups], weights)

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


def _stack(heads: list[Any], like: Any) -> Any:
    import numpy as np

    if not isinstance(like, np.ndarray):
        import torch

        return torch.stack(heads)
    made = np.empty_like(like, shape=(len(heads), *like.shape[1:]))  # transposed as `like` is: turned when it is stored
    return np.stack(heads, out=made)


def mean_of(weights: Any, group: tuple[int, ...]) -> Any:
    total = sum_of(weights, group)
    total /= len(group)
    return total


def sum_of(weights: Any, group: tuple[int, ...]) -> Any:
    total = weights[group[0]] + weights[group[1]]
    for head in group[2:]:  # in place: gathering the heads first takes longer than adding them
        total += weights[head]
    return total


def first_of(weights: Any, group: tuple[int, ...]) -> Any:
    return weights[group[0]]
