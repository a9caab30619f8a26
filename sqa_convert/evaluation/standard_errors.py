"""How sure a mean over tokens is, where the tokens of one document go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST_POSITIONS = 8
"""of a document that are taken together; each later range is as long as all before it"""


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the predictions of each document, float64."""

    counts: Tensor
    """(documents,)"""
    loss: Tensor
    """(documents,)"""
    kl: Tensor | None = None
    """(documents,)"""
    kl_by_position: list[dict[str, float]] | None = None
    """as of `by_position`"""
    worst: list[dict[str, Any]] | None = None
    """as of `worst_passages`"""


def standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Of the mean over all tokens, which documents were drawn for; None of fewer than two documents.

    Args:
        sums: (documents,) of what was measured, of each document's tokens; of a difference that of two models.
        counts: (documents,) tokens.

    Source: the linearised variance of a ratio of two sums over clusters, Cochran, Sampling Techniques, 1977, 6.4.
    """
    present = counts > 0
    sums, counts = sums[present].double(), counts[present].double()
    documents = len(counts)
    if documents < 2:
        return None
    residual = sums - sums.sum() / counts.sum() * counts
    return math.sqrt(float(residual.square().sum()) * documents / (documents - 1)) / float(counts.sum())


def by_position(values: Tensor, documents: Tensor) -> list[dict[str, float]]:
    """The mean of what was measured by how far into its document: [{"from", "to" (both count from 1), "mean"}].

    Args:
        values: (N,) of tokens, document by document.
        documents: (N,) each one's document.
    """
    places = torch.arange(len(documents))
    first = torch.full((int(documents.max()) + 1,), len(documents)).scatter_reduce(0, documents, places, "amin")
    position = places - first[documents] + 1
    result, start = [], 1
    while start <= int(position.max()):
        end = max(FIRST_POSITIONS, 2 * (start - 1))
        inside = (position >= start) & (position <= end)
        if bool(inside.any()):
            result.append({"from": start, "to": end, "mean": round(float(values[inside].mean()), 6)})
        start = end + 1
    return result


def gain(before: DocumentSums, after: DocumentSums) -> dict[str, float | None]:
    """How much better one model predicts than another, nats a token: "loss" and "kl", each with its "_error"."""
    result: dict[str, float | None] = {}
    for key in ("loss", "kl"):
        old, new = getattr(before, key), getattr(after, key)
        if old is not None and new is not None:
            better = old - new
            result[key] = float(better.sum() / before.counts.sum())
            result[f"{key}_error"] = standard_error(better, before.counts)
    return result


def document_numbers(batch: dict[str, Tensor], shift: bool, first: int) -> Tensor:
    """The document of each label of a batch, flat, numbered from `first`.

    Args:
        batch: of rows that are one document each, or of several where "position_ids" begin again.
        shift: whether a position predicts the next one's label.
    """
    labels = batch["labels"]
    begins = torch.zeros(labels.shape, dtype=torch.long)
    if shift and "position_ids" in batch:
        begins = (batch["position_ids"] == 0).long().cpu()
    begins[:, 0] = 1
    numbers = begins.flatten().cumsum(0).view(labels.shape) - 1 + first
    return (numbers[:, 1:] if shift else numbers).flatten()
