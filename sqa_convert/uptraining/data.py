"""What a recipe trains on and is measured on: rows, how they become batches, and held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, shown
from ..evaluation.held_out import HeldOut
from ..evaluation.load import load_config, load_model
from ..evaluation.prepare import built_in_text, encoded_pairs, held_out_pairs, prepare
from ..families.special_tokens import SpecialTokens, end_of_text
from ..text.blocks import token_blocks, token_stream
from ..text.collate import CausalCollator, PackedCollator, PairCollator, Rows, SpanCollator, Stream
from ..text.documents import AUTO_TEXT, BUILT_IN, SELF, Columns, Skipped, check_data, documents
from ..text.spans import denoising
from ..text.suitability import looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer
from .recipe import Recipe

MOST_HELD = 200_000_000
"""tokens of text kept in memory and shuffled; of more, blocks come as they are read"""


@dataclass(frozen=True)
class TrainingData:
    """Rows of a recipe's data, and what makes batches of them."""

    tokenizer: Any
    content: Sequence[Any]
    """token blocks (n, T), or pairs of source and target tokens"""
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

    def example(self) -> dict[str, Tensor]:
        """One row as a batch."""
        return self.collate([Rows(self.content, 1)[0]])


def training_data(
    folder: str | Path,
    settings: Recipe,
    *,
    tokens: int | None = None,
    trust_remote_code: bool = False,
    source: str | Path | None = None,
) -> TrainingData:
    """The data of a recipe. Text that the source writes itself is not there yet: `with_own_text` puts it there.

    Args:
        folder: source or result; they share tokenizer and vocabulary.
        source: the unconverted model, where its own text is measured on.
        tokens: read no more than this, to see whether a recipe can be run at all.

    Raises:
        CheckpointError, DataError: the tokenizer does not load, there is too little data, or they do not fit the model.
    """
    config = load_config(folder, trust_remote_code)
    settings.check_fits(None if config.is_encoder_decoder else config.n_positions)
    tokenizer = load_tokenizer(folder, trust_remote_code, without="training needs one")
    if settings.columns is not None:
        return _pairs(config, tokenizer, settings, settings.columns, tokens)
    if settings.data in (SELF, AUTO_TEXT):
        return _own(config, tokenizer, settings, source or folder, trust_remote_code)
    length, wanted = settings.sequence_length, tokens or settings.tokens
    streamed = wanted > MOST_HELD
    skipped = Skipped()

    def texts() -> Iterator[str]:
        return documents(settings.data, "train", column=settings.text_column, shuffled=True, skipped=skipped)

    name = shown(settings.data)
    read, _ = looked_at(texts(), tokenizer, name, "--data")
    blocks = token_blocks(read, tokenizer, length, length if streamed else wanted, name, dtype=torch.int32)
    corrupt = denoising(tokenizer, config.vocab_size) if config.is_encoder_decoder else None
    check_vocabulary(blocks, config.vocab_size)

    def stream() -> Iterator[Tensor]:
        for block in token_stream(texts(), tokenizer, length):
            check_vocabulary(block, config.vocab_size)
            yield block

    end = end_of_text(tokenizer) if settings.separate_documents else None

    def held_out(device: torch.device) -> HeldOut:
        return prepare(
            folder,
            settings.data,
            text_column=settings.text_column,
            tokens=settings.held_out_tokens,
            device=str(device),
            trust_remote_code=trust_remote_code,
        )

    collate = SpanCollator(corrupt, settings.seed) if corrupt else CausalCollator(end)
    return TrainingData(tokenizer, blocks, collate, held_out, skipped, stream if streamed else None)


def _own(config: Any, tokenizer: Any, settings: Recipe, source: str | Path, trust_remote_code: bool) -> TrainingData:
    how: dict[str, Any] = {"tokens": settings.held_out_tokens, "trust_remote_code": trust_remote_code}
    tokens = SpecialTokens.of(config)
    if config.is_encoder_decoder:
        collate: Any = PairCollator(tokens.padding)
    else:
        collate = PackedCollator(settings.sequence_length, tokens.padding)
    data = SELF if settings.data == SELF else None
    return TrainingData(
        tokenizer, [], collate, lambda device: prepare(source, data, device=str(device), **how), Skipped()
    )


def with_text_named(settings: Recipe, source: str | Path, trust_remote_code: bool) -> Recipe:
    """A recipe whose data are not "auto" any more."""
    if settings.data != AUTO_TEXT:
        return settings
    load = partial(load_model, source, trust_remote_code=trust_remote_code)
    config, tokenizer = load_config(source, trust_remote_code), load_tokenizer(source, trust_remote_code)
    built_in, _ = built_in_text(load, config, tokenizer, settings.held_out_tokens, torch.device("cpu"), 0)
    return dataclasses.replace(settings, data=SELF if built_in is None else BUILT_IN)


def _pairs(config: Any, tokenizer: Any, settings: Recipe, columns: Columns, tokens: int | None) -> TrainingData:
    name, skipped = shown(settings.data), Skipped()
    most = max(1, (tokens or settings.tokens) // settings.sequence_length)
    length = settings.sequence_length

    def held_out(device: torch.device) -> HeldOut:
        return held_out_pairs(config, tokenizer, settings.data, columns, device, length=length)

    content, _ = encoded_pairs(config, tokenizer, settings.data, columns, "train", most, length, skipped)
    if not content:
        raise DataError(f"--data {name}: no pairs in its train part")
    return TrainingData(tokenizer, content, PairCollator(tokenizer.pad_token_id), held_out, skipped)


def check_text(settings: Recipe) -> None:
    """Raises DataError where there is no text to train on, as far as can be told without a tokenizer."""
    check_data(settings.data, column=settings.text_column, columns=settings.columns)
