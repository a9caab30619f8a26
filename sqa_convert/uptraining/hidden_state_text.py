"""Texts that a model without a language model head is trained on: several in a sequence, none read from another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.hidden_states import held_out_rows
from ..evaluation.load import Measured
from ..families.special_tokens import SpecialTokens
from ..text.collate import IGNORED
from ..text.documents import AUTO_TEXT, BUILT_IN, documents, peeked
from ..text.one_text_a_line import column_read, read_as
from ..text.python_data import called
from ..text.splits import Document, Skipped
from ..text.suitability import looked_at
from ..text.tokenized_rows import document_rows, packed
from ..text.tokenizers import check_vocabulary
from .recipe import Recipe


def only_encodes(config: Any) -> bool:
    """Whether a model is an encoder alone, which attends both ways and has no last position."""
    return bool(config.architectures) and str(config.architectures[0]).endswith("EncoderModel")


@dataclass(frozen=True)
class TextsCollator:
    """Blocks of whole texts to a batch: no text is attended to from another, and positions start again with each.

    Its "labels" are the tokens that are read, for all to be counted; what is padding is IGNORED there.
    """

    length: int
    """tokens of a block"""
    padding: int
    causal: bool
    """of a decoder-only model, which is told of the texts by their positions"""

    def __call__(self, blocks: Sequence[tuple[int, Sequence[Tensor]]]) -> dict[str, Tensor]:
        ids = torch.full((len(blocks), self.length), self.padding)
        labels, text = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        positions = torch.zeros_like(ids)
        for i, (_, block) in enumerate(blocks):
            start = 0
            for number, row in enumerate(block):
                here = slice(start, start + len(row))
                ids[i, here], labels[i, here], text[i, here] = row, row, number
                positions[i, here] = torch.arange(len(row))
                start += len(row)
            positions[i, start:] = torch.arange(self.length - start)
        if self.causal:
            return {"input_ids": ids, "position_ids": positions, "labels": labels}
        together = text[:, None, :, None] == text[:, None, None, :]  # (B, 1, T, T)
        return {"input_ids": ids, "attention_mask": together, "labels": labels}


class TextBlocks:
    """Texts of a recipe's data as the rows of a training, and the held-out ones."""

    def __init__(self, measured: Measured, data: Any, settings: Recipe) -> None:
        self.measured, self.settings, self.skipped = measured, settings, Skipped()
        self.data = BUILT_IN if isinstance(data, str) and data == AUTO_TEXT else data
        self.column = column_read(self.data, settings.text_column, "--data")

    def collator(self) -> TextsCollator:
        config = self.measured.config
        padding = SpecialTokens.of(config).padding
        return TextsCollator(self.settings.sequence_length, padding, causal=not only_encodes(config))

    def first(self, tokens: int) -> list[list[Tensor]]:
        """As many blocks as hold so many tokens. Raises DataError where there is none, or a token is unknown."""
        length = self.settings.sequence_length
        blocks = list(islice(self.blocks(), max(1, tokens // length)))
        if not blocks:
            raise DataError(f"{called(self.data)} holds no text of two tokens: give more with --data")
        return blocks

    def blocks(self) -> Iterator[list[Tensor]]:
        """Texts in an order of no meaning, as many together as a sequence holds; of long ones a part."""
        texts = documents(self.data, "train", column=self.column, shuffled=True, skipped=self.skipped)
        texts, are_tokens = peeked(texts)
        tokenizer = None if are_tokens else self.measured.tokenizer
        if tokenizer is not None:
            texts, _ = looked_at(texts, tokenizer, f"{read_as(self.data, self.column)}, training part", "--data")
        length = self.settings.sequence_length
        yield from packed(self._checked(texts, tokenizer), length)

    def _checked(self, texts: Iterator[Document], tokenizer: Any) -> Iterator[Tensor]:
        for row in document_rows(texts, tokenizer, self.settings.sequence_length):
            check_vocabulary(row, self.measured.config.vocab_size)
            yield row

    def held_out(self, device: torch.device) -> HeldOut:
        """Of the same data, each as it is."""
        return held_out_rows(self.measured, self.data, self.settings.text_column, self.settings.held_out_tokens, device)
