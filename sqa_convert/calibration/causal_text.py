"""Calibration text of decoder-only models: documents from position 0, of several lengths."""

from __future__ import annotations

import torch

from ..errors import shown
from ..text.find_files import beginnings_of
from ..text.self_generated import own_rows
from ..text.splits import Skipped
from ..text.tokenize_documents import Encoder
from ..text.tokenized_rows import document_rows, up_to
from ..text.tokenizers import check_vocabulary
from .text_context import Content, Reading


def causal_text(reading: Reading) -> Content:
    """Of the text that is named, else of the model's own. Raises DataError, CheckpointError."""
    settings = reading.settings
    if settings.text_named is not None:
        return _named(reading)
    if not reading.plan.has_language_model_head:
        return Content([(row,) for row in reading.random_tokens()], "random tokens")
    begin: list[list[int]] = []
    name = "sampled from the model"
    if settings.prompts is not None:
        begin = _beginnings(reading, settings.prompts)
        name = f"{name}, begun with {shown(settings.prompts)}"
    # Without a tokenizer nobody knows of control tokens.
    how = (reading.device, reading.generator, reading.tokenizer_or_none, begin, reading.progress, reading.cache)
    rows = own_rows(reading.model, reading.tokens, reading.length, *how)
    return Content([(row,) for row in rows], name, sampled=True)


def _named(reading: Reading) -> Content:
    skipped = Skipped()
    texts, name, unknown = reading.texts(skipped)
    tokenizer = None if unknown is None else reading.tokenizer
    rows = up_to(document_rows(texts, tokenizer, reading.length), reading.tokens, len)
    name = f"{name}{skipped}"
    reading.check([(row,) for row in rows], name)
    return Content([(row,) for row in rows], name, unknown)


def _beginnings(reading: Reading, path: str) -> list[list[int]]:
    """The beginnings in a file. Raises DataError where there is none."""
    encoder = Encoder(reading.tokenizer)
    tokens = [encoder.beginning(line)[: reading.length - 1] for line in beginnings_of(path)]
    check_vocabulary(torch.tensor([id_ for begin in tokens for id_ in begin]), reading.vocabulary)
    return [begin for begin in tokens if begin]
