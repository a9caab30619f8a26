"""What `svd`, `procrustes` and the search share: circuits from their factors, biases folded, gauges balanced.

Of a head only its score form Wq^T Wk and its output map Wv^T Wo can be seen from outside. An invertible d x d matrix
between the two factors of either (the gauge) changes nothing; GPT-2 and T5 have no rotary embedding in the way.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attend import query_with_bias
from .partition import Partition
from .weights import AttentionHeads

if TYPE_CHECKING:
    from .statistics import Statistics


def shared_factor(factors: list[Tensor], weights: list[Tensor], metric_root: Tensor, rank: int) -> Tensor:
    """The best common right factor of several forms, in closed form (Eckart-Young).

    Forms L_c^T A_c with left Gram matrices W_c = L_c L_c^T are approximated by L_c^T (A_c F E^T) X with one X = E F^-1,
    at the least squared error in the metric S = F F^T on the right.

    Args:
        factors: A_c, each (k_c, D).
        weights: W_c, each (k_c, k_c), positive semidefinite.
        metric_root: F, (D, D), lower triangular.
        rank: d, rows of X.

    Returns:
        E (d, D), orthonormal rows that span the best subspace of the rows of A_c F, the strongest first.
    """
    stacked = torch.cat([a @ metric_root for a in factors])  # (K, D)
    basis, upper = torch.linalg.qr(stacked.T)  # (D, m), (m, K), m = min(D, K)
    weight = torch.block_diag(*weights)
    _, vectors = torch.linalg.eigh(upper @ weight @ upper.T)  # ascending
    rows = (basis @ vectors[:, -rank:].flip(1)).T  # (min(d, m), D)
    if len(rows) < rank:  # fewer directions than rows: the rest reads nothing
        rows = torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])
    return rows


def balance(heads: AttentionHeads, only: list[int] | None = None) -> AttentionHeads:
    """Scales each key row against its query rows and each value row against its output rows to equal norms.

    The function is the same; Adam's steps then fit both sides. `only` names key/value heads, by default all.
    """
    repeats = len(heads.query) // len(heads.key)
    query, key, value, output = (t.clone() for t in (heads.query, heads.key, heads.value, heads.output))
    query_bias = None if heads.query_bias is None else heads.query_bias.clone()
    for g in range(len(key)) if only is None else only:
        mine = slice(g * repeats, (g + 1) * repeats)
        full = query[mine] if query_bias is None else torch.cat([query[mine], query_bias[mine, :, None]], -1)
        ratio = _ratio(full.square().sum(-1).mean(0), key[g].square().sum(-1))  # (d,)
        key[g] *= ratio[:, None]
        query[mine] /= ratio[:, None]
        if query_bias is not None:
            query_bias[mine] /= ratio
        ratio = _ratio(output[mine].square().sum(-1).mean(0), value[g].square().sum(-1))
        value[g] *= ratio[:, None]
        output[mine] /= ratio[:, None]
    return dataclasses.replace(heads, query=query, key=key, value=value, output=output, query_bias=query_bias)


def _ratio(other: Tensor, own: Tensor) -> Tensor:
    """What to scale rows of squared norm `own` by, so that they meet rows of `other`; 1 where either is zero."""
    usable = (own > 0) & (other > 0)
    return torch.where(usable, (other / own.where(usable, torch.ones_like(own))).sqrt().sqrt(), torch.ones_like(own))


@dataclass(frozen=True)
class Merged:
    """What a group of heads became."""

    key: Tensor
    """(d, D)"""
    value: Tensor
    """(d, D)"""
    queries: list[Tensor]
    """(d, D + 1) of each cluster, the bias last"""
    outputs: list[Tensor]
    """(d, D) of each cluster"""


def assemble(
    heads: AttentionHeads,
    partition: Partition,
    statistics: Statistics,
    patterns: list[dict[int, float]],
    merged: list[Merged],
) -> AttentionHeads:
    """Computed groups as the converted site: biases settled, gauges balanced, groups of one head verbatim.

    Args:
        patterns: of each cluster, the heads whose pattern (and T5 position bias) it takes, and their shares.
        merged: of each group.
    """
    repeats = len(partition.clusters) // len(partition.groups)
    alone = {g: group[0] for g, group in enumerate(partition.kv_groups) if len(group) == 1}
    shared = [g for g in range(len(merged)) if g not in alone]
    query = torch.stack([q for group in merged for q in group.queries])
    output = torch.stack([o for group in merged for o in group.outputs])
    key, value = torch.stack([group.key for group in merged]), torch.stack([group.value for group in merged])
    for g, head in alone.items():  # one head is its group's only cluster
        query[g * repeats], output[g * repeats] = query_with_bias(heads)[head], heads.output[head].double()
        key[g], value[g] = heads.key[head].double(), heads.value[head].double()

    like = heads.query
    result = AttentionHeads(
        query=query[..., :-1].to(like),
        key=key.to(like),
        value=value.to(like),
        output=output.to(like),
        query_bias=None if heads.query_bias is None else query[..., -1].to(like),
        key_bias=_biases_of_single_heads(heads.key_bias, len(key), alone),
        value_bias=_biases_of_single_heads(heads.value_bias, len(key), alone),
        output_bias=_output_bias(heads, partition, statistics, patterns, value, output, shared),
        position_bias=_position_bias(heads.position_bias, patterns),
    )
    return balance(result, only=shared)


def _biases_of_single_heads(biases: Tensor | None, count: int, alone: dict[int, int]) -> Tensor | None:
    """Biases of keys or values (Hkv, d): zero but for groups of one head."""
    if biases is None:
        return None
    result = biases.new_zeros(count, biases.shape[1])
    for g, head in alone.items():
        result[g] = biases[head]
    return result


def _position_bias(table: Tensor | None, patterns: list[dict[int, float]]) -> Tensor | None:
    if table is None:
        return None
    return torch.stack([table[list(p)].T @ torch.tensor(list(p.values())).to(table) for p in patterns])


def _output_bias(
    heads: AttentionHeads,
    partition: Partition,
    statistics: Statistics,
    patterns: list[dict[int, float]],
    value: Tensor,
    output: Tensor,
    shared: list[int],
) -> Tensor | None:
    """The output bias with value biases folded in (exact: patterns sum to one), and the mean of what is lost: (D,)."""
    if heads.output_bias is None:
        return None
    bias = heads.output_bias.double().clone()
    repeats = len(partition.clusters) // len(partition.groups)
    for g in shared:
        for c in range(g * repeats, (g + 1) * repeats):
            for h in partition.clusters[c]:
                mean = heads.value[h].double() @ statistics.mean_read(h)  # (d,), what the head adds before its output
                mean = mean if heads.value_bias is None else mean + heads.value_bias[h].double()
                bias += mean @ heads.output[h].double()
            read = sum(share * statistics.mean_read(h) for h, share in patterns[c].items())
            bias -= value[g] @ read @ output[c]
    return bias.to(heads.output_bias)
