"""Calibration text of encoder-decoders and encoders: what they read, and what they answer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor

from ..errors import SQAError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import made_for
from ..text.documents import TOKEN_PAIRS, Columns, is_own, pair_columns, pairs
from ..text.plain_generation import own_tokens
from ..text.python_data import called
from ..text.self_generated import SHORT, answers
from ..text.spans import Denoising, PrefixSplit, denoising
from ..text.splits import Skipped
from ..text.suitability import looked_at
from ..text.tokenize_documents import encoded_pair
from ..text.tokenized_rows import document_rows, pair_batches, up_to
from .text_context import LONGEST, Content, Reading, Row

_LOOKED_AT = 16  # texts that tell whether a model was made for span corruption

_BATCH_TOKENS = 4096

_CHARACTERS = 64  # of text for each token wanted: rows are drawn across documents


def pair_text(reading: Reading) -> Content:
    """Of the text or pairs that are named, else of the built-in corpus; random tokens where that is not readable.

    A text is read as the model was trained, by span corruption; one that a model was not made for is read as it is, and
    answered by the model.

    Raises:
        DataError, CheckpointError: the text named is too short or does not fit the model.
    """
    settings = reading.settings
    columns = pair_columns(settings.text_named, settings.columns, settings.text_column, "--calibration")
    if columns is not None:
        return _pairs(reading, columns)
    if settings.text_named is not None:
        return _from_documents(reading)
    with contextlib.suppress(SQAError):  # whatever keeps it from the built-in corpus, there is another way
        return _from_documents(reading)
    rows = reading.random_tokens()
    if reading.plan.has_language_model_head:
        return Content(_answered(reading, rows), "random tokens and the model's answers")
    return Content(_unanswered(reading, rows), "random tokens")


def _from_documents(reading: Reading) -> Content:
    """Drawn across documents, as what is measured on."""
    skipped = Skipped()
    texts, name, unknown = reading.texts(skipped)
    tokenizer, length = reading.tokenizer_or_none if unknown is None else reading.tokenizer, reading.length
    first = up_to(texts, _CHARACTERS * reading.tokens, len)
    rows = up_to(document_rows(first, tokenizer, length), reading.tokens, len)
    name = f"{name}{skipped}"
    reading.check([(row,) for row in rows], name)
    if not reading.plan.has_language_model_head and "decoder" not in reading.plan.kinds:
        return Content(_unanswered(reading, rows), name, unknown)
    corrupt = denoising(tokenizer, reading.vocabulary) if tokenizer is not None else PrefixSplit()
    if not reading.plan.has_language_model_head or _made_for(reading, corrupt, rows):
        return Content(_denoised(reading, corrupt, rows), f"{name}, {corrupt.name}", unknown)
    short = up_to(document_rows(first, tokenizer, length, SHORT), reading.tokens, len)
    return Content(_answered(reading, short), f"{name}, and the model's answers", None, sampled=True)


def _made_for(reading: Reading, corrupt: Denoising, rows: Sequence[Tensor]) -> bool:
    """Whether the model was trained to restore what is missing: it predicts that about as well as its own answers."""
    if is_own(reading.settings.text):
        return False
    batches = pair_batches(_denoised(reading, corrupt, rows[:_LOOKED_AT]), 0, _BATCH_TOKENS)
    return made_for(reading.model, HeldOut(batches, "", 0, reading.device))


def _denoised(reading: Reading, corrupt: Denoising, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    end, pairs = own_tokens(reading.model).end, []
    for row in rows:
        whole = row[:-1] if int(row[-1]) in end else row
        if len(whole) > 1:
            inputs, labels = corrupt(whole[None], reading.generator)
            pairs.append((inputs[0], labels[0]))
    return pairs


def _answered(reading: Reading, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    longest = max(2, reading.length // 4)
    reading.progress("sample text", 0, len(rows))
    labels = answers(reading.model, rows, longest, reading.device, reading.generator)
    reading.progress("sample text", len(rows), len(rows))
    return list(zip(rows, labels, strict=True))


def _unanswered(reading: Reading, rows: Sequence[Tensor]) -> list[Row]:
    """What a model reads that predicts nothing; its decoder, where it has one, the same."""
    return [(row, row) if "decoder" in reading.plan.kinds else (row,) for row in rows]


def _pairs(reading: Reading, columns: Columns) -> Content:
    named, flag, skipped = reading.settings.text_named, "--calibration", Skipped()
    texts = pairs(named, columns, "train", skipped=skipped, flag=flag)
    name, unknown, tokenizer = f"{called(named)}, training part", None, None
    length = reading.settings.length or LONGEST  # tokens are read as they are: a T5 has no last position
    if columns != TOKEN_PAIRS:
        tokenizer, length = reading.tokenizer, reading.length
        texts, unknown = looked_at(texts, tokenizer, name, flag)
    encoded = (encoded_pair(tokenizer, *pair, length) for pair in texts)
    rows = up_to(encoded, reading.tokens, lambda pair: len(pair[0]))
    reading.check(rows, name)
    return Content(rows, f"{name}{skipped}, {len(rows):,} pairs", unknown)
