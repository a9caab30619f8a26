"""Text to calibrate on, as model inputs: the user's, the model's own samples, or random tokens."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..conversion.plan import Plan
from ..conversion.request import Fitting
from ..errors import DataError, SQAError, shown
from ..progress import Progress, silent
from ..text.blocks import token_blocks
from ..text.documents import BUILT_IN, Skipped, documents
from ..text.formats import TEXT_COLUMN
from ..text.self_generated import SAMPLED_SEQUENCES, answers, sample
from ..text.spans import denoising
from ..text.suitability import looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer
from .activations import Batch

LONGEST = 1024
"""tokens in one sequence, at most"""

HELD_OUT = 0.1
"""of the sequences, for the choices"""

_BATCH_TOKENS = 4096

_CACHE = 2e9  # bytes of keys and values held while sampling


@dataclass(frozen=True)
class Text:
    """Calibration text as model inputs, whole sequences held out for the choices."""

    batches: list[Batch]
    held_out: list[Batch]
    name: str
    unknown: float | None = None
    """share of the characters that the tokenizer does not know; None of what the model wrote or nobody did"""
    sampled: bool = False
    """whether the model wrote it"""

    @property
    def fitted(self) -> int:
        """Sequences that are not held out."""
        return sum(len(batch["input_ids"]) for batch in self.batches)


def calibration_text(
    model: Any,
    plan: Plan,
    source: Source,
    device: torch.device,
    generator: torch.Generator,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Text:
    """Text to calibrate on: what the user names; else a causal model's own samples, and the built-in corpus for T5.

    A T5 whose tokenizer is missing or cannot read that corpus reads random tokens and answers with its own samples;
    other models without a language model head read random tokens.

    Raises:
        DataError: the text named is too short or does not fit the model.
    """
    settings = plan.calibration
    assert settings is not None
    length = min(plan.dimensions.context, LONGEST)
    count = max(2, settings.tokens // length)
    is_t5 = "encoder" in plan.partitions
    rows: list[Batch]
    unknown, sampled = None, False

    def read() -> tuple[list[Batch], str, float]:
        tokenizer = _tokenizer(source, trust_remote_code)
        return _from_documents(plan, tokenizer, settings, length, is_t5, generator)

    text = read() if settings.text is not None else None
    if text is None and is_t5:
        with contextlib.suppress(SQAError):  # whatever keeps it from the built-in corpus, there is another way
            text = read()
    if text is not None:
        rows, name, unknown = text
    elif not is_t5 and plan.has_language_model_head:
        each = 2 * len(plan.sites) * plan.dimensions.width * 4 * length  # bytes of keys and values
        at_once = max(1, min(SAMPLED_SEQUENCES, int(_CACHE // each)))
        rows = _split(input_ids=sample(model, count, length, device, generator, at_once, progress))
        name, sampled = "sampled from the model", True
    else:
        ids = torch.randint(model.config.vocab_size, (count, length), generator=generator)
        rows, name = _split(input_ids=ids), "random tokens"
        if is_t5 and plan.has_language_model_head:
            rows = _split(input_ids=ids, labels=answers(model, ids, device, generator))
            name = "random tokens and the model's answers"
        elif "decoder" in plan.partitions and is_t5:
            rows = _split(input_ids=ids, labels=ids)
    if is_t5 and not plan.has_language_model_head:
        rows = [_without_labels(model, row) for row in rows]
    held = max(1, round(HELD_OUT * len(rows)))
    size = max(1, _BATCH_TOKENS // length)
    return Text(_stacked(rows[:-held], size), _stacked(rows[-held:], size), name, unknown, sampled)


def _split(**tensors: Tensor) -> list[Batch]:
    """A batch of one sequence for each row."""
    count = len(next(iter(tensors.values())))
    return [{name: tensor[i : i + 1] for name, tensor in tensors.items()} for i in range(count)]


def _without_labels(model: Any, row: Batch) -> Batch:
    """Inputs of a T5 that predicts nothing: its decoder, where it has one, reads what it would have to predict."""
    labels = row.pop("labels", None)
    if labels is None or not model.config.is_encoder_decoder:
        return row
    return row | {"decoder_input_ids": model._shift_right(labels)}


def _tokenizer(source: Source, trust_remote_code: bool) -> Any:
    if source.folder is None:
        raise DataError("calibration text needs a tokenizer: give a folder or a hub id, not a model in memory")
    return load_tokenizer(source.folder, trust_remote_code, without="leave out --calibration")


def _stacked(rows: list[Batch], size: int) -> list[Batch]:
    return [
        {name: torch.cat([row[name] for row in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, len(rows), size)
    ]


def _from_documents(
    plan: Plan,
    tokenizer: Any,
    settings: Fitting,
    length: int,
    spans: bool,
    generator: torch.Generator,
) -> tuple[list[Batch], str, float]:
    """Drawn across documents, as what is measured on."""
    flag, skipped = "--calibration", Skipped()
    column = TEXT_COLUMN if settings.text is None else settings.text_column
    texts = documents(settings.text, "train", column=column, shuffled=True, skipped=skipped, flag=flag)
    name = f"{shown(settings.text or BUILT_IN)}, training part"
    texts, unknown = looked_at(texts, tokenizer, name, flag)
    blocks = token_blocks(texts, tokenizer, length, max(settings.tokens, 2 * length), name, flag, drawn=True)
    name = f"{name}{skipped}"
    if len(blocks) < 2:
        raise DataError(f"{name} holds fewer than two blocks of {length} tokens: give more with --calibration")
    vocabulary = plan.source_config["vocab_size"]
    corrupt = denoising(tokenizer, vocabulary) if spans else None
    check_vocabulary(blocks, vocabulary)
    if corrupt is None:
        return _split(input_ids=blocks), name, unknown
    inputs, labels = corrupt(blocks, generator)
    return _split(input_ids=inputs, labels=labels), f"{name}, {corrupt.name}", unknown
