"""Converted heads with one half of theirs restored: patterns (queries and keys), or values (and output projections)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .partition import Partition
from .weights import AttentionHeads


def with_source_values(source: AttentionHeads, converted: AttentionHeads, partition: Partition) -> AttentionHeads:
    """As many heads as the source has, with its values and output projections; each looks where the converted query
    head of its cluster looks.

    Args:
        source: H heads.
        converted: what was made of them.
        partition: which went together.
    """
    cluster, group, _ = _places(partition, converted.query.device)
    return replace(
        source,
        query=converted.query[cluster],
        key=converted.key[group],
        query_bias=_at(converted.query_bias, cluster),
        key_bias=_at(converted.key_bias, group),
        position_bias=_at(converted.position_bias, cluster),
    )


def with_source_patterns(source: AttentionHeads, converted: AttentionHeads, partition: Partition) -> AttentionHeads:
    """As many heads as the source has, looking where they do there; each reads the converted values of its group, and
    the heads of a cluster add through its output projection in equal shares. Arguments as `with_source_values`.
    """
    cluster, group, sizes = _places(partition, converted.query.device)
    return replace(
        source,
        value=converted.value[group],
        output=converted.output[cluster] / sizes[:, None, None],
        value_bias=_at(converted.value_bias, group),
        output_bias=converted.output_bias,
    )


CONVERTED_ALONE = {"patterns": with_source_values, "values": with_source_patterns}
"""Of each half, the heads in which only it is converted. What has become of one half was fitted to the other: output
projections are to be fitted again before anything is measured."""


def _places(partition: Partition, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the source's heads: the query head and the key/value head it went into, and how many share the first;
    (H,) each."""
    found = {
        head: (query, query * len(partition.groups) // len(partition.clusters), len(cluster))
        for query, cluster in enumerate(partition.clusters)
        for head in cluster
    }
    cluster, group, sizes = torch.tensor([found[head] for head in range(partition.heads)], device=device).T
    return cluster, group, sizes


def _at(bias: Tensor | None, places: Tensor) -> Tensor | None:
    return None if bias is None else bias[places]
