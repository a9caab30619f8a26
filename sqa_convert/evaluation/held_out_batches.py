"""Held-out text as the inputs that models are measured on, and how it fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..text.collate import IGNORED
from ..text.own_loss import own_loss
from ..text.suitability import Fit, Warning_

_FEW_COUNTED = 256  # predictions


@dataclass(frozen=True)
class HeldOut:
    """Batches of held-out text, the same for every model measured, and where they are measured."""

    batches: list[dict[str, Tensor]]
    name: str
    """what the text is"""
    tokens: int
    """predicted"""
    device: torch.device
    unknown: float = 0.0
    """share of the text's characters that the tokenizer does not know"""
    doubts: Sequence[Warning_] = ()
    """why it was taken"""

    def fit(self, model: Any, loss: float | None, own: float | None = None, who: str = "source") -> Fit:
        """What tells whether a model was made for this text.

        Args:
            model: on the text's device.
            loss: the model's on this text.
            own: its loss on what it writes itself; None finds out, where there is a loss to hold it against.
            who: what the model is called.
        """
        if own is None and loss is not None:
            own = own_loss(model, self.batches[0], self.device, torch.Generator().manual_seed(0))
        first = 0 if model.config.is_encoder_decoder else 1
        told = [batch["labels"][:, first:] if "labels" in batch else _read(batch) for batch in self.batches]
        labels = torch.cat([tokens.flatten() for tokens in told])
        predicted = labels[labels != IGNORED]
        return Fit(
            loss,
            model.config.vocab_size,
            own,
            _token_entropy(predicted),
            self.unknown,
            who,
            len(predicted),
        )


def _read(batch: dict[str, Tensor]) -> Tensor:
    """What a model that predicts nothing reads."""
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"][mask.bool()]


def _token_entropy(tokens: Tensor) -> float | None:
    """As if each token stood alone, nats; None of too few to tell (Miller, 1955)."""
    if len(tokens) < _FEW_COUNTED:
        return None
    counts = tokens.unique(return_counts=True)[1].double()
    share = counts / len(tokens)
    return float(-(share * share.log()).sum() + (len(counts) - 1) / (2 * len(tokens)))
