"""Heads put into sets of even sizes, at the least total cost of the sets: exactly, or by swaps. Knows no weights.

Sizes are even when they differ by at most one: of so many members and parts, some sets have `size` members, and `extra`
sets one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, pairwise, product

import torch

MOST_MEMBERS = 16  # to be arranged exactly

_STARTS = 4  # of a search by swaps

_LOWER = 1 - 1e-9  # a cost below this share of another is lower, and not only rounded otherwise

Group = tuple[int, ...]
Groups = tuple[Group, ...]
Cost = Callable[[Group], float]


def arrange(members: Group, parts: int, cost: Cost, generator: torch.Generator) -> Groups:
    """The partition of `members` into `parts` sets of even sizes with the least total cost, or a good one by swaps."""
    if len(members) <= MOST_MEMBERS:
        return exact(members, parts, cost)
    return swapped(members, parts, cost, generator)


def exact(members: Group, parts: int, cost: Cost) -> Groups:
    """The cheapest partition, by dynamic programming over subsets."""
    size, extra = divmod(len(members), parts)
    return _cheapest(members, size, extra, cost, {})[1]


def _cheapest(
    rest: Group, size: int, extra: int, cost: Cost, known: dict[tuple[Group, int], tuple[float, Groups]]
) -> tuple[float, Groups]:
    if not rest:
        return 0.0, ()
    if (rest, extra) not in known:
        options = []
        for first, others, extra_left in _first_sets(rest, size, extra):
            total, sets = _cheapest(others, size, extra_left, cost, known)
            options.append((cost(first) + total, (first, *sets)))
        known[rest, extra] = min(options)
    return known[rest, extra]


def _first_sets(rest: Group, size: int, extra: int) -> Iterator[tuple[Group, Group, int]]:
    """Every set that may hold the first of `rest`, what it leaves, and how many of the sets to come have one more."""
    sets = (len(rest) - extra) // size
    sizes = ([size + 1] if extra else []) + ([size] if sets > extra else [])
    for length in sizes:
        for others in combinations(rest[1:], length - 1):
            first = (rest[0], *others)
            yield first, tuple(h for h in rest if h not in first), extra - (length > size)


def even_sizes(members: int, parts: int) -> set[int]:
    """Of the sets."""
    return {members // parts, -(-members // parts)}


def even_partitions(members: Group, parts: int) -> Iterator[Groups]:
    """All partitions into `parts` sets of even sizes."""
    size, extra = divmod(len(members), parts)

    def partitions(rest: Group, extra: int) -> Iterator[Groups]:
        if not rest:
            yield ()
            return
        for first, others, extra_left in _first_sets(rest, size, extra):
            for sets in partitions(others, extra_left):
                yield (first, *sets)

    return partitions(members, extra)


def swapped(members: Group, parts: int, cost: Cost, generator: torch.Generator) -> Groups:
    """The cheapest of the partitions that swaps lead to from several starts."""
    known = cache(cost)
    ends = (improved(start, known) for start in starts(members, parts, generator))
    return min(ends, key=lambda groups: sum(map(known, groups)))


def starts(members: Group, parts: int, generator: torch.Generator) -> Iterator[Groups]:
    """Neighbours together, then seeded shuffles."""
    size, extra = divmod(len(members), parts)
    cuts = [i * size + min(i, extra) for i in range(parts + 1)]
    order = list(members)
    for _ in range(_STARTS):
        yield tuple(tuple(sorted(order[a:b])) for a, b in pairwise(cuts))
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]


def improved(start: Groups, cost: Cost) -> Groups:
    """Swaps heads between two groups as long as that lowers the cost."""
    groups = list(start)
    lowered = True
    while lowered:
        lowered = False
        for a, b in combinations(range(len(groups)), 2):
            better = _first_better_swap(groups[a], groups[b], cost)
            if better is not None:
                (groups[a], groups[b]), lowered = better, True
    return tuple(groups)


def _first_better_swap(one: Group, other: Group, cost: Cost) -> tuple[Group, Group] | None:
    """Two groups after a head of the one has changed places with one of the other; None where no swap costs less."""
    limit = (cost(one) + cost(other)) * _LOWER
    for i, j in product(one, other):
        pair = tuple(sorted({*one, j} - {i})), tuple(sorted({*other, i} - {j}))
        if cost(pair[0]) + cost(pair[1]) < limit:
            return pair
    return None
