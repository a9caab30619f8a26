"""Apply one rule to the members of every group, array by array: what `mean`, `first` and `select` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .layout import AttentionHeads
from .partition import Partition

if TYPE_CHECKING:
    from torch import Tensor

    Rule = Callable[[Tensor, tuple[int, ...]], Tensor]
    """((H, ...) of all heads, the members of one group) -> (...)"""


def pool(heads: AttentionHeads, partition: Partition, *, query: Rule, key_value: Rule, output: Rule) -> AttentionHeads:
    """Merges heads by one rule each for queries, for keys and values, and for output projections.

    `query` also merges the query bias and T5's position bias; the output bias stays. A group of one head is copied
    verbatim, whatever the rule.
    """
    import torch

    def merge(weights: Tensor | None, groups: tuple[tuple[int, ...], ...], rule: Rule) -> Tensor | None:
        if weights is None:
            return None
        return torch.stack([weights[g[0]] if len(g) == 1 else rule(weights, g) for g in groups])

    clusters, groups = partition.clusters, partition.kv_groups
    return AttentionHeads(
        query=merge(heads.query, clusters, query),
        key=merge(heads.key, groups, key_value),
        value=merge(heads.value, groups, key_value),
        output=merge(heads.output, clusters, output),
        query_bias=merge(heads.query_bias, clusters, query),
        key_bias=merge(heads.key_bias, groups, key_value),
        value_bias=merge(heads.value_bias, groups, key_value),
        output_bias=heads.output_bias,
        position_bias=merge(heads.position_bias, clusters, query),
    )


def mean_of(weights: Tensor, group: tuple[int, ...]) -> Tensor:
    return sum_of(weights, group).div_(len(group))


def sum_of(weights: Tensor, group: tuple[int, ...]) -> Tensor:
    total = weights[group[0]].clone()
    for head in group[1:]:  # in place: gathering the heads first takes longer than adding them
        total += weights[head]
    return total


def first_of(weights: Tensor, group: tuple[int, ...]) -> Tensor:
    return weights[group[0]]
