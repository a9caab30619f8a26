"""Which heads of the source end up together: nested, possibly uneven partitions. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RecipeError
from ..flags_as_arguments import names_arguments

VARIANTS: dict[str, tuple[float, float]] = {
    "gqa": (1.0, 0.25),
    "mqa": (1.0, 0.0),
    "sqa": (0.5, 0.25),
    "ssqa": (0.5, 0.5),
    "xsqa": (0.25, 0.25),
    "xsmqa": (0.25, 0.0),
    "lsqa": (0.75, 0.25),
}
"""Query and key/value heads as fractions of the source's, 0 for one head. Source: arXiv 2510.01817, section 3."""


@dataclass(frozen=True)
class Partition:
    """`groups[g][c]` holds the source heads merged into query cluster c of key/value group g.

    Query head i of the result is the i-th cluster in reading order, so it reads key/value head i // r.
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    """Hkv groups, each of Hq / Hkv clusters, each of one or more heads of the source, counted from 0."""

    def __post_init__(self) -> None:
        members = sorted(h for cluster in self.clusters for h in cluster)
        if members != list(range(len(members))) or not all(self.clusters) or len({len(g) for g in self.groups}) != 1:
            raise RecipeError(
                f"{self.groups} is no partition: every head from 0 on must stand in one non-empty cluster, "
                "and every key/value group must have as many clusters"
            )

    @classmethod
    @names_arguments
    def contiguous(cls, heads: int, q_groups: int, kv_groups: int) -> Partition:
        """Neighbouring heads together, sizes differing by at most one.

        Args:
            heads: of the source, H.
            q_groups: query heads kept, Hq.
            kv_groups: key/value heads kept, Hkv.

        Raises:
            RecipeError: not 1 <= kv_groups <= q_groups <= heads, or q_groups is no multiple of kv_groups.
        """
        check_head_counts(heads, q_groups, kv_groups)
        return cls(
            tuple(tuple(_spread(group, q_groups // kv_groups)) for group in _spread(tuple(range(heads)), kv_groups))
        )

    @classmethod
    def identity(cls, heads: int) -> Partition:
        """Every head on its own."""
        return cls.contiguous(heads, heads, heads)

    @property
    def heads(self) -> int:
        """Heads of the source, H."""
        return sum(len(cluster) for cluster in self.clusters)

    @property
    def clusters(self) -> tuple[tuple[int, ...], ...]:
        """The source heads of each query head of the result, length Hq."""
        return tuple(cluster for group in self.groups for cluster in group)

    @property
    def kv_groups(self) -> tuple[tuple[int, ...], ...]:
        """The source heads of each key/value head of the result, length Hkv."""
        return tuple(tuple(h for cluster in group for h in cluster) for group in self.groups)

    @property
    def is_identity(self) -> bool:
        """Whether every head stays on its own."""
        return all(len(group) == 1 for group in self.kv_groups)


def _spread(members: tuple[int, ...], parts: int) -> Iterable[tuple[int, ...]]:
    """Cuts into `parts` runs whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(len(members), parts)
    start = 0
    for i in range(parts):
        stop = start + size + (i < longer)
        yield members[start:stop]
        start = stop


@names_arguments
def check_head_counts(heads: int, q_groups: int, kv_groups: int) -> None:
    """Refuses counts that are not possible.

    Args:
        heads: of the source, H.
        q_groups: query heads to keep, at most H.
        kv_groups: key/value heads to keep, a divisor of `q_groups`.

    Raises:
        RecipeError: naming the nearest counts that are possible.
    """
    for flag, groups in (("--q-groups", q_groups), ("--kv-groups", kv_groups)):
        if not hasattr(groups, "__index__"):
            raise RecipeError(f"{flag} {groups!r}: give a whole number")
    if not 1 <= q_groups <= heads:
        raise RecipeError(
            f"--q-groups {q_groups}: the source has {heads} heads, so 1 to {heads} query heads can be kept"
        )
    if not 1 <= kv_groups <= q_groups or q_groups % kv_groups:
        divisors = [n for n in range(1, q_groups + 1) if q_groups % n == 0]
        multiples = list(range(kv_groups, heads + 1, kv_groups)) if kv_groups >= 1 else []
        other = _nearest(multiples, q_groups)
        raise RecipeError(
            f"--kv-groups {kv_groups} must divide --q-groups {q_groups}: "
            f"with {q_groups} query heads use --kv-groups {_nearest(divisors, kv_groups)}"
            + (f", with {kv_groups} key/value heads use --q-groups {other}" if other else "")
        )


def _nearest(allowed: list[int], wanted: int, count: int = 4) -> str:
    return " or ".join(str(n) for n in sorted(sorted(allowed, key=lambda n: abs(n - wanted))[:count]))


@names_arguments
def variant_heads(variant: str, heads: int) -> tuple[int, int]:
    """Query and key/value heads of a named variant of a source with `heads` heads.

    Query heads are the fraction rounded half up, at least one; key/value heads are the divisor of that number nearest
    to their fraction, ties to the larger.

    Args:
        variant: a name of `VARIANTS`.
        heads: of the source, H.

    Returns:
        Hq and Hkv.

    Raises:
        RecipeError: no such variant.
    """
    if variant not in VARIANTS:
        raise RecipeError(f"--variant {variant}: choose one of {', '.join(VARIANTS)}")
    q_fraction, kv_fraction = VARIANTS[variant]
    q_groups = max(1, int(q_fraction * heads + 0.5))
    target = kv_fraction * heads if kv_fraction else 1
    kv_groups = min((n for n in range(1, q_groups + 1) if q_groups % n == 0), key=lambda n: (abs(n - target), -n))
    return q_groups, kv_groups
