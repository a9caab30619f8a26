"""What a recipe trains on and is measured on: rows, how they become batches, and held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, shown
from ..evaluation.held_out import HeldOut, prepare
from ..evaluation.load import load_config
from ..families.special_tokens import end_of_text
from ..text.blocks import token_blocks, token_stream
from ..text.collate import CausalCollator, PairCollator, Rows, SpanCollator, Stream
from ..text.documents import Skipped, Split, check_data, documents, pairs
from ..text.spans import denoising
from ..text.suitability import looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer
from .recipe import Recipe

MOST_HELD = 200_000_000
"""tokens of text kept in memory and shuffled; of more, blocks come as they are read"""

HELD_OUT_PAIRS = 256

_BATCH = 32  # pairs measured at a time


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
    folder: str | Path, settings: Recipe, *, tokens: int | None = None, trust_remote_code: bool = False
) -> TrainingData:
    """The data of a recipe.

    Args:
        folder: source or result; they share tokenizer and vocabulary.
        tokens: read no more than this, to see whether a recipe can be run at all.

    Raises:
        CheckpointError, DataError: the tokenizer does not load, there is too little data, or they do not fit the model.
    """
    config = load_config(folder, trust_remote_code)
    settings.check_fits(None if config.is_encoder_decoder else config.n_positions)
    tokenizer = load_tokenizer(folder, trust_remote_code, without="training needs one")
    if settings.pairs:
        return _pairs(config, tokenizer, settings, tokens)
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


def _pairs(config: Any, tokenizer: Any, settings: Recipe, tokens: int | None) -> TrainingData:
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token, which pairs need")
    collate = PairCollator(tokenizer.pad_token_id)
    limit = {"truncation": True, "max_length": settings.sequence_length}

    name, skipped = shown(settings.data), Skipped()

    def read(split: Split, most: int) -> tuple[list[tuple[Tensor, Tensor]], float]:
        found = pairs(settings.data, settings.source_column, settings.target_column, split, skipped=skipped)
        found, unknown = looked_at(found, tokenizer, name, "--data")
        rows = [
            (
                torch.tensor(tokenizer(settings.prefix + source, **limit)["input_ids"]),
                torch.tensor(tokenizer(text_target=target, **limit)["input_ids"]),
            )
            for source, target in islice(found, most)
        ]
        if not rows:
            raise DataError(f"--data {name}: no pairs in its {split} part")
        check_vocabulary(torch.cat([ids for pair in rows for ids in pair]), config.vocab_size)
        return rows, unknown

    def held_out(device: torch.device) -> HeldOut:
        content, unknown = read("heldout", HELD_OUT_PAIRS)
        rows = list(enumerate(content))
        batches = [collate(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
        count = sum(len(target) for _, (_, target) in rows)
        return HeldOut(batches, f"{name}, held-out part, {len(rows)} pairs", count, device, unknown)

    content, _ = read("train", max(1, (tokens or settings.tokens) // settings.sequence_length))
    return TrainingData(tokenizer, content, collate, held_out, skipped)


def check_text(settings: Recipe) -> None:
    """Raises DataError where there is no text to train on, as far as can be told without a tokenizer."""
    if not settings.pairs:
        check_data(settings.data, column=settings.text_column)
    elif next(pairs(settings.data, settings.source_column, settings.target_column, "train"), None) is None:
        raise DataError(f"--data {shown(settings.data)}: no pairs in its train part")
