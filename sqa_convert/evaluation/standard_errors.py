"""How sure a mean over tokens is, where the tokens of one document go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the predictions of each document, float64."""

    counts: Tensor
    """(documents,)"""
    loss: Tensor
    """(documents,)"""
    kl: Tensor | None = None
    """(documents,)"""


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
