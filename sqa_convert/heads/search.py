"""Which heads to put together: the nested partition that loses the least energy of the layer's output.

Over few heads every partition is looked at. Over many, groups are first valued by their pairs, which are few, and the
best found by swaps; what they cost together decides between that and neighbours.
"""

from __future__ import annotations

import math
from itertools import islice

import torch

from .cheapest_sets import MOST_MEMBERS, even_partitions, exact, starts, swapped
from .group_cost import MOST_SPLITS, GroupCost, PairCost
from .partition import Partition
from .statistics import Statistics
from .weights import AttentionHeads

_MOST_COSTS = 10_000  # splits of groups whose cost is computed

_MOST_WORK = 2e11  # multiplications for that; beyond either, swaps

_COMPARED_SPLITS = 2  # of a group found by its pairs, the cheapest by patterns


def search(
    heads: AttentionHeads, statistics: Statistics, q_groups: int, kv_groups: int, generator: torch.Generator
) -> Partition:
    """The partition of the least cost: group sizes differ by at most one, and so do cluster sizes within a group.

    Exact up to a fixed amount of work, by pairs of heads beyond it.

    Args:
        heads: the H heads of the source.
        statistics: of the site.
        q_groups: Hq, a multiple of `kv_groups`.
        kv_groups: Hkv.
        generator: draws the starts of the search by swaps.

    Returns:
        The partition, its groups in the order of their first heads.
    """
    count, d = heads.query.shape[:2]
    if q_groups == kv_groups == count:
        return Partition.identity(count)
    members, clusters = tuple(range(count)), q_groups // kv_groups
    if count <= MOST_MEMBERS and _affordable(count, kv_groups, clusters, d):
        cost = GroupCost(heads, statistics, clusters, generator)
        groups = exact(members, kv_groups, cost)
    else:
        cost = GroupCost(heads, statistics, clusters, generator, _COMPARED_SPLITS)
        by_pairs = swapped(members, kv_groups, PairCost(cost), generator)
        neighbours = next(starts(members, kv_groups, generator))
        groups = min(by_pairs, neighbours, key=lambda groups: sum(map(cost, groups)))
    return Partition(tuple(cost.split(group) for group in sorted(groups)))


def _affordable(heads: int, kv_groups: int, clusters: int, d: int) -> bool:
    """Whether the cost of every possible group can be computed."""
    size = math.ceil(heads / kv_groups)
    splits = sum(1 for _ in islice(even_partitions(tuple(range(size)), clusters), MOST_SPLITS))
    costs = math.comb(heads, size) * splits
    return costs <= _MOST_COSTS and costs * 10.0 * (size * d) ** 3 <= _MOST_WORK
