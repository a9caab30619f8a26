"""Rotate the heads of a group onto each other, then average them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .methods import register_method
from .partition import Partition
from .weights import AttentionHeads

if TYPE_CHECKING:
    from torch import Tensor

    from .statistics import Statistics

_ROUNDS = 30


@register_method(
    "procrustes",
    summary="rotate the heads of a group onto their mean, average, restore the norm",
    source="Jin et al., arXiv 2412.20677 (generalised Procrustes analysis), with the norms restored",
    needs_statistics=True,
)
def procrustes(heads: AttentionHeads, partition: Partition, statistics: Statistics) -> AttentionHeads:
    """`mean` after each head was brought into the coordinates of its group.

    Queries and keys, and values and output projections, are first balanced (equal Gram matrices on both sides, in the
    metric of the inputs), which leaves a rotation free; that rotation brings each head as near to the group's mean as
    it goes. Then queries are averaged over the cluster, keys and values over the group, each mean brought back to its
    members' mean norm, and output projections summed. Without rotary embeddings the rotation changes no head.

    Args:
        heads: the H heads of the source.
        partition: of those H heads.
        statistics: moments of the inputs, from data or from the norms' weights.

    Returns:
        Hq query heads and Hkv key/value heads, in the dtype of the source; groups of one head verbatim.
    """
    import torch

    from .attend import query_with_bias
    from .merge_circuits import Merged, assemble
    from .statistics import with_ridge

    query, key = query_with_bias(heads), heads.key.double()
    value, output = heads.value.double(), heads.output.double()
    query_root = torch.linalg.cholesky(with_ridge(statistics.query))
    key_root = torch.linalg.cholesky(with_ridge(statistics.key))
    merged = []
    for group, clusters in zip(partition.kv_groups, partition.groups, strict=True):
        members = list(group)
        place = {h: i for i, h in enumerate(group)}
        q, k = _aligned(query[members] @ query_root, key[members] @ key_root)
        value_root = torch.linalg.cholesky(with_ridge(statistics.value_metric(group)))
        v, o = _aligned(value[members] @ value_root, output[members])
        queries = [_mean(q[[place[h] for h in c]]) for c in clusters]
        merged.append(
            Merged(
                key=torch.linalg.solve_triangular(key_root, _mean(k), upper=False, left=False),
                value=torch.linalg.solve_triangular(value_root, _mean(v), upper=False, left=False),
                queries=[torch.linalg.solve_triangular(query_root, c, upper=False, left=False) for c in queries],
                outputs=[o[[place[h] for h in c]].sum(0) for c in clusters],
            )
        )
    shares = [dict.fromkeys(c, 1 / len(c)) for c in partition.clusters]
    return assemble(heads, partition, statistics, shares, merged)


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors (t, d, m), (t, d, n) of every head's form left^T right, balanced and rotated onto their mean."""
    import torch

    rank = left.shape[1]
    basis, upper = torch.linalg.qr(left.mT)  # (t, m, d), (t, d, d)
    other_basis, other_upper = torch.linalg.qr(right.mT)
    u, energies, vh = torch.linalg.svd(upper @ other_upper.mT, full_matrices=False)
    level = energies.sqrt()[:, :, None]
    missing = (0, 0, 0, rank - energies.shape[1])  # heads wider than the model have rows that do nothing
    left = torch.nn.functional.pad(level * (basis @ u).mT, missing)
    right = torch.nn.functional.pad(level * (other_basis @ vh.mT).mT, missing)
    both = torch.cat([left, right], -1)  # (t, d, m + n)
    target = both[both.square().sum((1, 2)).argmax()]
    rotation = torch.eye(both.shape[1], dtype=both.dtype).expand(len(both), -1, -1)
    for _ in range(_ROUNDS):
        u, _, vh = torch.linalg.svd(target @ both.mT)  # (t, d, d)
        rotation = u @ vh
        target = (rotation @ both).mean(0)
    return rotation @ left, rotation @ right


def _mean(members: Tensor) -> Tensor:
    """The mean (d, D) of (t, d, D), at the members' mean norm."""
    mean = members.mean(0)
    norm = mean.norm()
    return mean if norm == 0 else mean * (members.flatten(1).norm(dim=1).mean() / norm)
