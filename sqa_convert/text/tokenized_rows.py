"""Documents as rows of tokens, each from position 0 and of its own length, and rows of like lengths as batches.

A model was trained on whole documents, on windows of longer ones, or on both: rows are all of these, of several
lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .blocks import WAITING, from_a_line
from .collate import IGNORED
from .splits import Document
from .tokenize_documents import Encoder

Item = TypeVar("Item")

SHARES = (1, 1, 2, 4)
"""of the longest length, what a row of a long document has, by lot"""

ANYWHERE = 0.85
"""share of long documents of which a row begins at a line somewhere, the others at their beginning"""

LENGTHS = 8
"""lengths that rows are padded to, at most"""


def document_rows(
    texts: Iterable[Document], tokenizer: Any, length: int, shares: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Rows (T,), T up to `length`: short documents whole, of long ones a part from their beginning or from a line.

    Of each long document one row at most, while there are others; when all have had their turn they go on.
    """
    chance, encoder = random.Random(0), Encoder(tokenizer)
    turn: Iterable[tuple[Document, Iterator[int] | None]] = ((text, None) for text in texts)
    while True:
        waiting: list[tuple[Document, Iterator[int] | None]] = []
        room = WAITING
        for text, document in turn:
            if document is None:
                whole = encoder.whole(text, length)
                if whole is not None:
                    yield torch.tensor(whole)
                    continue
                anywhere = chance.random() < ANYWHERE
                document = from_a_line(text, encoder, length, chance) if anywhere else encoder.stream(text)
            row = list(islice(document, max(2, length // chance.choice(shares or SHARES))))
            if len(row) > 1:
                yield torch.tensor(row)
                if room > 0:
                    waiting.append((text, document))
                    room -= len(text)
        if not waiting:
            return
        turn = waiting


def up_to(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> list[Item]:
    """The first items, until their sizes reach `most` together."""
    taken, total = [], 0
    for item in items:
        taken.append(item)
        total += size(item)
        if total >= most:
            break
    return taken


def packed(rows: Iterable[Tensor], length: int) -> Iterator[list[Tensor]]:
    """Rows in the order they come, as many together as `length` tokens hold."""
    block: list[Tensor] = []
    for row in rows:
        if block and sum(map(len, block)) + len(row) > length:
            yield block
            block = []
        block.append(row)
    if block:
        yield block


def causal_batches(rows: Sequence[Tensor], padding: int, tokens: int) -> list[dict[str, Tensor]]:
    """Rows for a decoder-only model, padded last; padding and first tokens are not predicted."""
    batches = []
    for (length,), some in _alike([(row,) for row in rows], tokens):
        labels = torch.stack([_padded(row, length, IGNORED) for (row,) in some])
        labels[:, 0] = IGNORED
        ids = torch.stack([_padded(row, length, padding) for (row,) in some])
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def pair_batches(rows: Sequence[tuple[Tensor, ...]], padding: int, tokens: int) -> list[dict[str, Tensor]]:
    """Inputs and answers for an encoder-decoder, or inputs for an encoder; padding is neither read nor predicted."""
    batches = []
    for lengths, some in _alike(rows, tokens):
        read = torch.stack([_padded(torch.ones_like(row[0]), lengths[0], 0) for row in some])
        batch = {"input_ids": torch.stack([_padded(row[0], lengths[0], padding) for row in some])}
        if not bool(read.all()):
            batch["attention_mask"] = read
        if len(lengths) > 1:
            batch["labels"] = torch.stack([_padded(row[1], lengths[1], IGNORED) for row in some])
        batches.append(batch)
    return batches


def _alike(
    rows: Sequence[tuple[Tensor, ...]], tokens: int
) -> Iterator[tuple[tuple[int, ...], Sequence[tuple[Tensor, ...]]]]:
    """Rows of like lengths, about so many tokens at a time, and the lengths that they are padded to."""
    longest = [max(map(len, side)) for side in zip(*rows, strict=True)]
    groups: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    for row in rows:
        lengths = tuple(_round(len(part), most) for part, most in zip(row, longest, strict=True))
        groups.setdefault(lengths, []).append(row)
    for lengths, group in groups.items():
        size = max(1, tokens // max(lengths))
        yield from ((lengths, group[start : start + size]) for start in range(0, len(group), size))


def _round(length: int, longest: int) -> int:
    """The least of `LENGTHS` lengths up to `longest` that is not shorter."""
    step = -(-longest // LENGTHS)
    return min(longest, -(-length // step) * step)


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    return nn.functional.pad(row, (0, length - len(row)), value=value)
