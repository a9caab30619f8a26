"""Rows of tokens as training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from .pretokenized import NOT_PREDICTED
from .spans import Denoising

IGNORED = NOT_PREDICTED
"""label of a position that is not predicted: padding, or the first of a sequence"""


class Rows(torch.utils.data.Dataset):
    """A number of rows: what there is, from the beginning again when that is fewer, each with a number of its own."""

    def __init__(self, rows: Sequence[Any], length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    """Numbered rows in the order they come, from the first again after the last; for more than memory holds."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(chain.from_iterable(self.begin() for _ in count()))


@dataclass(frozen=True)
class CausalCollator:
    """Blocks to a batch for a decoder-only model; labels are the inputs, a model shifts them."""

    end_of_text: int | None = None
    """where given, no document is attended to from the next one in a block, positions start again with each, and what
    it begins with is not predicted from the end of the one before"""

    def __call__(self, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([block for _, block in rows]).long()  # (B, T)
        labels = tokens.clone()
        labels[:, 0] = IGNORED
        batch = {"input_ids": tokens, "labels": labels}
        if self.end_of_text is not None:
            position = torch.arange(tokens.shape[1]).expand_as(tokens)
            begins = nn.functional.pad(tokens[:, :-1] == self.end_of_text, (1, 0))
            labels[begins] = IGNORED
            batch["position_ids"] = position - (position * begins).cummax(1).values
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Blocks of whole rows to a batch for a decoder-only model: no row is attended to from another."""

    length: int
    """tokens of a block"""
    padding: int

    def __call__(self, blocks: Sequence[tuple[int, Sequence[Tensor]]]) -> dict[str, Tensor]:
        ids = torch.full((len(blocks), self.length), self.padding)
        labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, (_, block) in enumerate(blocks):
            start = 0
            for row in block:
                end = start + len(row)
                ids[i, start:end] = row
                labels[i, start + 1 : end] = row[1:]
                positions[i, start:end] = torch.arange(len(row))
                start = end
            positions[i, start:] = torch.arange(self.length - start)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


@dataclass(frozen=True)
class SpanCollator:
    """Blocks to a batch for an encoder-decoder, by span corruption; what happens to a row depends on its number."""

    corrupt: Denoising
    seed: int

    def __call__(self, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
        own = [torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number, _ in rows]
        inputs, labels = self.corrupt(torch.stack([block for _, block in rows]).long(), own)
        return {"input_ids": inputs, "labels": labels}


@dataclass(frozen=True)
class PairCollator:
    """Pairs of source and target tokens to a padded batch; padding is neither attended to nor predicted."""

    padding: int

    def __call__(self, rows: Sequence[tuple[int, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
        pairs = [pair for _, pair in rows]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([source for source, _ in pairs], batch_first=True, padding_value=self.padding),
            "attention_mask": pad([torch.ones_like(source) for source, _ in pairs], batch_first=True),
            "labels": pad([target for _, target in pairs], batch_first=True, padding_value=IGNORED),
        }
