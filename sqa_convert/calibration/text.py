"""Text to calibrate on, as model inputs: the user's, the model's own samples, or random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.source import Source
from ..conversion.plan import Plan
from ..progress import Progress, silent
from ..text.collate import IGNORED
from ..text.plain_generation import own_tokens
from ..text.self_generated import CACHE
from ..text.tokenized_rows import causal_batches, pair_batches
from .activations import Batch
from .causal_text import causal_text
from .pair_text import pair_text
from .text_context import Reading, Row

HELD_OUT = 0.1
"""of the sequences, for the choices"""

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Text:
    """Calibration text as model inputs, whole sequences held out for the choices."""

    batches: list[Batch]
    held_out: list[Batch]
    name: str
    tokens: int
    """that are fitted to; padding counts in nothing"""
    held_out_tokens: int
    """that fits are chosen on"""
    answered: int | None = None
    """of `tokens` what is answered, of an encoder-decoder"""
    unknown: float | None = None
    """share of the characters that the tokenizer does not know; None of what the model wrote or nobody did"""
    sampled: bool = False
    """whether the model wrote it"""


def calibration_text(
    model: Any,
    plan: Plan,
    source: Source,
    device: torch.device,
    generator: torch.Generator,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    cache: float = CACHE,
) -> Text:
    """Text to calibrate on: what the user names; else a causal model's own samples, and the built-in corpus for T5.

    A T5 whose tokenizer is missing or cannot read that corpus reads random tokens and answers with its own samples;
    other models without a language model head read random tokens.

    Args:
        cache: bytes of keys and values held while the model writes.

    Raises:
        DataError: the text named is too short or does not fit the model.
    """
    reading = Reading(model, plan, source, device, generator, trust_remote_code, progress, cache)
    content = pair_text(reading) if "encoder" in plan.kinds else causal_text(reading)
    rows = [content.rows[i] for i in torch.randperm(len(content.rows), generator=generator).tolist()]
    count = max(1, round(HELD_OUT * len(rows)))
    fitted, held_out = rows[count:], rows[:count]
    answered = sum(len(row[1]) for row in fitted) if len(rows[0]) > 1 else None
    return Text(
        _batches(model, plan, fitted),
        _batches(model, plan, held_out),
        content.name,
        sum(len(row[0]) for row in fitted),
        sum(len(row[0]) for row in held_out),
        answered,
        content.unknown,
        content.sampled,
    )


def _batches(model: Any, plan: Plan, rows: Sequence[Row]) -> list[Batch]:
    padding = own_tokens(model).padding
    if "encoder" not in plan.kinds:
        return causal_batches([row[0] for row in rows], padding, _BATCH_TOKENS)
    batches = pair_batches(rows, padding, _BATCH_TOKENS)
    if plan.has_language_model_head:
        return batches
    return [_without_labels(model, batch) for batch in batches]


def _without_labels(model: Any, batch: Batch) -> Batch:
    """Inputs of a T5 that predicts nothing: its decoder, where it has one, reads what it would have to predict."""
    labels = batch.pop("labels", None)
    if labels is None or not model.config.is_encoder_decoder:
        return batch
    return batch | {
        "decoder_input_ids": model._shift_right(labels),
        "decoder_attention_mask": (labels != IGNORED).long(),
    }
