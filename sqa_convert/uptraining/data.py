"""What a recipe trains on and is measured on: rows, how they become batches, and held-out text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, RecipeError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.held_out_text import built_in_text, encoded_pairs, held_out_pairs, prepare
from ..evaluation.load import Measured
from ..families.special_tokens import SpecialTokens, end_of_text
from ..text.blocks import token_blocks, token_stream
from ..text.collate import CausalCollator, PackedCollator, PairCollator, Rows, SpanCollator, Stream
from ..text.documents import (
    AUTO_TEXT,
    BUILT_IN,
    GIVEN,
    SELF,
    Columns,
    check_data,
    documents,
    is_own,
    pair_columns,
    peeked,
)
from ..text.python_data import called
from ..text.spans import denoising
from ..text.splits import Document, Skipped
from ..text.suitability import looked_at
from ..text.tokenize_documents import tensor_of
from ..text.tokenized_rows import packed
from ..text.tokenizers import check_vocabulary
from .hidden_state_text import TextBlocks, only_encodes
from .recipe import Recipe

MOST_HELD = 200_000_000
"""tokens of text kept in memory and shuffled; of more, blocks come as they are read"""


@dataclass(frozen=True)
class TrainingData:
    """Rows of a recipe's data, and what makes batches of them."""

    measured: Measured
    """the model they are for"""
    content: Sequence[Any]
    """token blocks (n, T), blocks of rows (T,), or pairs of source and target tokens"""
    collate: Callable[[Sequence[tuple[int, Any]]], dict[str, Tensor]]
    held_out: Callable[[torch.device], HeldOut]
    """the held-out part of the same data, on a device; the same whatever the recipe's seed"""
    skipped: Skipped
    """rows of the data that hold no text, as far as they were read"""
    stream: Callable[[], Iterator[Any]] | None = None
    """all of the rows, where `content` holds only the first"""

    def rows(self, count: int) -> Rows | Stream:
        """`count` rows or more, from the first again when there are fewer."""
        return Rows(self.content, count) if self.stream is None else Stream(self.stream)

    def example(self, rows: int = 1) -> dict[str, Tensor]:
        """The first rows as a batch."""
        return self.collate([Rows(self.content, rows)[i] for i in range(rows)])


def training_data(
    folder: str | Path,
    settings: Recipe,
    *,
    data: Any = None,
    tokens: int | None = None,
    trust_remote_code: bool = False,
    source: str | Path | None = None,
) -> TrainingData:
    """The data of a recipe. Text that the source writes itself is not there yet: `with_own_text` puts it there.

    Args:
        folder: source or result; they share tokenizer and vocabulary.
        data: what was given from Python, where the recipe says so.
        source: the unconverted model, where its own text is measured on.
        tokens: read no more than this, to see whether a recipe can be run at all.

    Raises:
        CheckpointError, DataError: the tokenizer does not load, there is too little data, or they do not fit the model.
    """
    measured = Measured(folder, None, trust_remote_code, "training needs one")
    config = measured.config
    encodes = config.is_encoder_decoder or only_encodes(config)
    settings.check_fits(None if encodes else config.n_positions)
    if settings.data != GIVEN:
        data = settings.data
    elif data is None:
        raise RecipeError("this run trains on data that were given from Python: give them again")
    if settings.loss == "hidden":
        return _texts(measured, data, settings, tokens)
    columns = settings.columns
    if config.is_encoder_decoder:
        columns = pair_columns(data, columns, settings.text_column)
    if columns is not None:
        return _pairs(measured, data, settings, columns, tokens)
    if is_own(data):
        return _own(measured, settings, source or folder)
    return _documents(measured, data, settings, tokens)


def _documents(measured: Measured, data: Any, settings: Recipe, tokens: int | None) -> TrainingData:
    """Of texts, packed into blocks; of what is tokens already, rows of which several are a block."""
    config, length, wanted = measured.config, settings.sequence_length, tokens or settings.tokens
    streamed = wanted > MOST_HELD
    skipped = Skipped()

    def texts() -> Iterator[Document]:
        return documents(data, "train", column=settings.text_column, shuffled=True, skipped=skipped)

    def held_out(device: torch.device) -> HeldOut:
        return prepare(
            str(measured.given),
            data,
            text_column=settings.text_column,
            tokens=settings.held_out_tokens,
            device=str(device),
            trust_remote_code=measured.trust_remote_code,
        )

    name = called(data)
    read, are_tokens = peeked(texts())
    if are_tokens and not config.is_encoder_decoder:
        padding = SpecialTokens.of(config).padding

        def blocks_of_rows() -> Iterator[list[Tensor]]:
            return packed((row.int() for row in _checked(_cut(texts(), length), config.vocab_size)), length)

        rows = list(islice(blocks_of_rows(), max(1, (length if streamed else wanted) // length)))
        if not rows:
            raise DataError(f"{name} holds no two tokens: give more with --data")
        collate: Any = PackedCollator(length, padding)
        return TrainingData(measured, rows, collate, held_out, skipped, blocks_of_rows if streamed else None)
    tokenizer = measured.tokenizer
    read, _ = looked_at(read, tokenizer, name, "--data")
    if streamed:
        blocks = token_blocks(read, tokenizer, length, length, name, dtype=torch.int32)
    else:
        blocks = _spread(read, texts, tokenizer, length, wanted, name)
    corrupt = denoising(tokenizer, config.vocab_size) if config.is_encoder_decoder else None
    check_vocabulary(blocks, config.vocab_size)

    def stream() -> Iterator[Tensor]:
        return _checked(token_stream(texts(), tokenizer, length), config.vocab_size)

    end = end_of_text(tokenizer) if settings.separate_documents else None
    collate = SpanCollator(corrupt, settings.seed) if corrupt else CausalCollator(end)
    return TrainingData(measured, blocks, collate, held_out, skipped, stream if streamed else None)


def _cut(documents: Iterable[Document], length: int) -> Iterator[Tensor]:
    """All of each document of tokens in rows of at most `length`, but for a last one of a single token."""
    for document in documents:
        rows = tensor_of(document).split(length)
        yield from (row for row in rows if len(row) > 1)


def _checked(rows: Iterable[Tensor], vocabulary: int) -> Iterator[Tensor]:
    for row in rows:
        check_vocabulary(row, vocabulary)
        yield row


def _spread(
    read: Iterable[Document],
    again: Callable[[], Iterable[Document]],
    tokenizer: Any,
    length: int,
    wanted: int,
    name: str,
) -> Tensor:
    """Blocks (n, T) of as many documents as there are, one of each in turn; of all text where those are too few.

    A few long documents in a row teach a model these documents.
    """
    with contextlib.suppress(DataError):
        blocks = token_blocks(read, tokenizer, length, wanted, name, drawn=True, dtype=torch.int32)
        if len(blocks) >= wanted // length:
            return blocks
    return token_blocks(again(), tokenizer, length, wanted, name, dtype=torch.int32)


def _texts(measured: Measured, data: Any, settings: Recipe, tokens: int | None) -> TrainingData:
    """For a model without a language model head."""
    texts, wanted = TextBlocks(measured, data, settings), tokens or settings.tokens
    streamed = wanted > MOST_HELD
    content = texts.first(settings.sequence_length if streamed else wanted)
    stream = texts.blocks if streamed else None
    return TrainingData(measured, content, texts.collator(), texts.held_out, texts.skipped, stream)


def _own(measured: Measured, settings: Recipe, source: str | Path) -> TrainingData:
    trust = measured.trust_remote_code
    how: dict[str, Any] = {"tokens": settings.held_out_tokens, "trust_remote_code": trust}
    config, _ = measured.config, measured.tokenizer  # without which it is not known what texts begin with
    tokens = SpecialTokens.of(config)
    if config.is_encoder_decoder:
        collate: Any = PairCollator(tokens.padding)
    else:
        collate = PackedCollator(settings.sequence_length, tokens.padding)
    data = SELF if settings.data == SELF else None
    return TrainingData(
        measured, [], collate, lambda device: prepare(source, data, device=str(device), **how), Skipped()
    )


def with_text_named(settings: Recipe, source: str | Path, trust_remote_code: bool) -> Recipe:
    """A recipe whose data are not "auto" any more."""
    if settings.data != AUTO_TEXT:
        return settings
    if settings.loss == "hidden":
        return dataclasses.replace(settings, data=BUILT_IN)
    measured = Measured(source, None, trust_remote_code)
    built_in, _ = built_in_text(measured, settings.held_out_tokens, torch.device("cpu"), 0)
    return dataclasses.replace(settings, data=SELF if built_in is None else BUILT_IN)


def _pairs(measured: Measured, data: Any, settings: Recipe, columns: Columns, tokens: int | None) -> TrainingData:
    skipped = Skipped()
    most = max(1, (tokens or settings.tokens) // settings.sequence_length)
    length = settings.sequence_length

    def held_out(device: torch.device) -> HeldOut:
        return held_out_pairs(measured, data, columns, device, length=length)

    content, _ = encoded_pairs(measured, data, columns, "train", most, length, skipped)
    if not content:
        raise DataError(f"--data {called(data)}: no pairs in its train part")
    collate = PairCollator(SpecialTokens.of(measured.config).padding)
    return TrainingData(measured, content, collate, held_out, skipped)


def check_text(settings: Recipe, data: Any = None) -> None:
    """Raises DataError where there is no text to train on, as far as can be told without a tokenizer.

    Args:
        data: what was given from Python, where the recipe says so.
    """
    check_data(data if settings.data == GIVEN else settings.data, column=settings.text_column, columns=settings.columns)
