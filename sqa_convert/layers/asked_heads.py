"""How many heads a layer is to keep."""

from __future__ import annotations

from ..errors import RecipeError
from ..heads import Partition, check_head_counts, variant_heads


def asked_heads(
    heads: int, q_groups: int | None, kv_groups: int | None, variant: str | None, partition: Partition | None = None
) -> tuple[int, int]:
    """Hq and Hkv of what is asked for, of H heads. Raises RecipeError."""
    if partition is not None and partition.heads != heads:
        raise RecipeError(f"--partition of {partition.heads} heads: this module has {heads}")
    if variant is not None:
        if q_groups is not None or kv_groups is not None:
            raise RecipeError(f"--variant {variant}: give it, or --q-groups and --kv-groups, not both")
        counts = variant_heads(variant, heads)
    elif partition is not None and q_groups is None and kv_groups is None:
        return len(partition.clusters), len(partition.groups)
    else:
        kept = heads if q_groups is None else q_groups
        counts = kept, kept if kv_groups is None else kv_groups
        check_head_counts(heads, *counts)
    if partition is not None and counts != (len(partition.clusters), len(partition.groups)):
        raise RecipeError(
            f"--partition keeps {len(partition.clusters)} and {len(partition.groups)} heads: "
            f"{counts[0]} and {counts[1]} are asked for"
        )
    return counts
