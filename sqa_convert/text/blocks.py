"""Documents as token blocks of one length."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .splits import Document
from .tokenize_documents import CHARACTERS, Encoder

WAITING = 2**24  # characters of the documents held to go on with


def token_stream(
    texts: Iterable[Document], tokenizer: Any, length: int, dtype: torch.dtype = torch.long
) -> Iterator[Tensor]:
    """Documents, each closed by the end-of-text token, packed into blocks (length,); a rest is dropped."""
    encoder, tokens = Encoder(tokenizer), array("i")
    for text in texts:
        for part in encoder.parts(text):
            tokens.extend(part)
            whole = len(tokens) // length * length
            if whole:
                yield from torch.frombuffer(tokens[:whole], dtype=torch.int32).to(dtype).view(-1, length)
                tokens = tokens[whole:]


def drawn_stream(texts: Iterable[Document], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Blocks as of `token_stream`, but of each document one block at most, while there are others.

    It is taken from a line somewhere in the document. When all have had their turn they go on where they stopped. What
    a block cuts off is never followed by another document within the block: an end-of-text token is between any two.
    """
    chance, encoder = random.Random(0), Encoder(tokenizer)
    turn: Iterator[tuple[Document, Iterator[int]]]
    turn = ((text, from_a_line(text, encoder, length, chance)) for text in texts)
    block: list[int] = []
    while True:
        waiting: list[tuple[Document, Iterator[int]]] = []
        room = WAITING
        for text, document in turn:
            block += islice(document, length - len(block))
            if len(block) == length:
                yield torch.tensor(block)
                block = []
                if room > 0:
                    waiting.append((text, document))
                    room -= len(text)
        if not waiting:
            return
        turn = iter(waiting)


def from_a_line(text: Document, encoder: Encoder, length: int, chance: random.Random) -> Iterator[int]:
    """The tokens of a document from a line on that a block or so follows; last what comes before that line."""
    start, size = line_within(text, length, chance), 4 * CHARACTERS * length
    yield from encoder.stream(text[start:], size, whole=start == 0)
    if start:
        yield from encoder.stream(text[:start], size)


def line_within(text: Document, length: int, chance: random.Random) -> int:
    """Where a line begins, anywhere in a text, that about `length` tokens follow; of tokens it is anywhere."""
    if not isinstance(text, str):
        return chance.randrange(max(0, len(text) - length) + 1)
    before = max(0, len(text) - CHARACTERS * length)
    return text.find("\n", chance.randrange(before)) + 1 if before else 0


def token_blocks(
    texts: Iterable[Document],
    tokenizer: Any,
    length: int,
    max_tokens: int | None = None,
    name: str = "the data",
    flag: str = "--data",
    drawn: bool = False,
    dtype: torch.dtype = torch.long,
) -> Tensor:
    """The blocks of `token_stream` as (n, length), of at most `max_tokens`; of `drawn_stream` where they are `drawn`.

    Drawn blocks are of many documents, and leave out much of what long ones go on with. Many blocks are held in half
    the memory with dtype int32.

    Raises:
        DataError: the documents do not fill one block.
    """
    most = None if max_tokens is None else max(1, max_tokens // length)
    stream = drawn_stream(texts, tokenizer, length) if drawn else token_stream(texts, tokenizer, length, dtype)
    blocks = [block.to(dtype) for block in islice(stream, most)]
    if not blocks:
        raise DataError(f"{name} holds less than one block of {length} tokens: give more with {flag}")
    return torch.stack(blocks)
