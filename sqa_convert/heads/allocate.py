"""Heads shared out among layers: counts for each, whose totals are fixed, at the least total cost. Knows no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Counts = tuple[int, int]
"""query and key/value heads of one layer"""

SHARES = (1, 5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
"""of the heads of a layer, about: the query heads that are looked at where there are many"""


def head_counts(heads: int) -> list[Counts]:
    """All counts (Hq, Hkv) that a layer of so many heads may keep, Hkv a divisor of Hq, from 1/1 to all of them."""
    return [(q, kv) for q in range(1, heads + 1) for kv in range(1, q + 1) if q % kv == 0]


def some_head_counts(heads: int, few: int = 12) -> list[Counts]:
    """The same of at most `few` heads; of more, query heads near `SHARES` of all that many numbers divide."""

    def divisors(number: int) -> int:
        return sum(number % n == 0 for n in range(1, number + 1))

    def choice(wanted: int) -> int:
        near = range(max(1, wanted - heads // 16), min(heads, wanted + heads // 16) + 1)
        return max(near, key=lambda number: (divisors(number), -abs(number - wanted)))

    chosen = {choice(max(1, round(share * heads))) for share in SHARES} | {heads}
    return [(q, kv) for q, kv in head_counts(heads) if heads <= few or q in chosen]


def allocate(costs: Sequence[Mapping[Counts, float]], total: Counts) -> list[Counts]:
    """Counts of each layer that cost the least of all that add up to a total; by dynamic programming, exact.

    Args:
        costs: of each layer, of all the counts it may have.
        total: query and key/value heads of all layers together.

    Returns:
        Counts of each layer. Of equals those that come first in `costs`.

    Raises:
        ValueError: no counts add up to the total.
    """
    import numpy as np

    q_total, kv_total = total
    best = np.full((q_total + 1, kv_total + 1), np.inf)  # of the layers so far, by what they keep together
    best[0, 0] = 0.0
    choices = []
    for options in costs:
        after, choice = np.full_like(best, np.inf), np.full(best.shape, -1)
        for number, ((q, kv), cost) in enumerate(options.items()):
            if q > q_total or kv > kv_total:
                continue
            reached = best[: q_total + 1 - q, : kv_total + 1 - kv] + cost
            lower = reached < after[q:, kv:]
            after[q:, kv:][lower] = reached[lower]
            choice[q:, kv:][lower] = number
        choices.append(choice)
        best = after
    if not np.isfinite(best[q_total, kv_total]):
        raise ValueError(f"no counts of {len(costs)} layers add up to {q_total}/{kv_total}")
    chosen = []
    for options, choice in zip(reversed(costs), reversed(choices), strict=True):
        counts = list(options)[choice[q_total, kv_total]]
        chosen.append(counts)
        q_total, kv_total = q_total - counts[0], kv_total - counts[1]
    return chosen[::-1]
