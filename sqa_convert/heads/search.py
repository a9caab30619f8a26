"""Which heads to put together: the nested partition that loses the least energy of the layer's output.

Over few heads every partition is looked at. Over many, groups are first valued by their pairs, which are few, and the
best found by swaps; what they cost together decides between that and neighbours.
"""

from __future__ import annotations

import math
from itertools import combinations, islice

import torch

from .cheapest_sets import MOST_MEMBERS, even_partitions, even_sizes, exact, starts, swapped
from .group_cost import MOST_SPLITS, CircuitGrams, GroupCost, PairCost
from .one_thread import one_thread
from .partition import Partition
from .statistics import Statistics
from .weights import AttentionHeads

_MOST_COSTS = 10_000  # splits of groups whose cost is computed

MOST_WORK = 2e11
"""multiplications for that; beyond either, swaps"""

_COMPARED_SPLITS = 2  # of a group found by its pairs, the cheapest by patterns


def search(
    heads: AttentionHeads, statistics: Statistics, q_groups: int, kv_groups: int, generator: torch.Generator
) -> Partition:
    """As `search_by`."""
    return search_by(CircuitGrams(heads, statistics), q_groups, kv_groups, generator)


@one_thread()
def search_by(
    grams: CircuitGrams, q_groups: int, kv_groups: int, generator: torch.Generator, most_work: float = MOST_WORK
) -> Partition:
    """The partition of the least cost: group sizes differ by at most one, and so do cluster sizes within a group.

    Exact up to a fixed amount of work, by pairs of heads beyond it.

    Args:
        grams: of the H heads of the source.
        q_groups: Hq, a multiple of `kv_groups`.
        kv_groups: Hkv.
        generator: draws the starts of the search by swaps.
        most_work: multiplications for the costs of all groups; where they take more, the search goes by pairs.

    Returns:
        The partition, its groups in the order of their first heads.
    """
    count, d = len(grams.key), grams.d
    if q_groups == kv_groups == count:
        return Partition.identity(count)
    members, clusters = tuple(range(count)), q_groups // kv_groups
    if count <= MOST_MEMBERS and _affordable(count, kv_groups, clusters, d, most_work):
        cost = GroupCost(grams, clusters, generator)
        cost.prepare(group for size in even_sizes(count, kv_groups) for group in combinations(members, size))
        groups = exact(members, kv_groups, cost)
    else:
        cost = GroupCost(grams, clusters, generator, _COMPARED_SPLITS)
        by_pairs = swapped(members, kv_groups, PairCost(cost), generator)
        neighbours = next(starts(members, kv_groups, generator))
        groups = min(by_pairs, neighbours, key=lambda groups: sum(map(cost, groups)))
    return Partition(tuple(cost.split(group) for group in sorted(groups)))


def _affordable(heads: int, kv_groups: int, clusters: int, d: int, most_work: float) -> bool:
    """Whether the cost of every possible group can be computed."""
    size = math.ceil(heads / kv_groups)
    splits = sum(1 for _ in islice(even_partitions(tuple(range(size)), clusters), MOST_SPLITS))
    costs = math.comb(heads, size) * splits
    return costs <= _MOST_COSTS and costs * 10.0 * (size * d) ** 3 <= most_work
