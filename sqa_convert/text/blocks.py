"""Documents as token blocks of one length."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DataError, one_line
from ..families.special_tokens import end_of_text
from .formats import pieces

_ENCODED = 2**16  # characters given to a tokenizer at once, about

_CHARACTERS = 4  # of a token, about

_WAITING = 2**24  # characters of the documents held to go on with


def token_stream(
    texts: Iterable[str], tokenizer: Any, length: int, dtype: torch.dtype = torch.long
) -> Iterator[Tensor]:
    """Documents, each closed by the end-of-text token, packed into blocks (length,); a rest is dropped."""
    tokens = array("i")
    for text in texts:
        for part in _encoded(text, tokenizer, _ENCODED):
            tokens.extend(part)
            whole = len(tokens) // length * length
            if whole:
                yield from torch.frombuffer(tokens[:whole], dtype=torch.int32).to(dtype).view(-1, length)
                tokens = tokens[whole:]


def drawn_stream(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Blocks as of `token_stream`, but of each document one block at most, while there are others.

    It is taken from a line somewhere in the document. When all have had their turn they go on where they stopped. What
    a block cuts off is never followed by another document within the block: an end-of-text token is between any two.
    """
    chance = random.Random(0)
    turn: Iterator[tuple[str, Iterator[int]]]
    turn = ((text, _from_a_line(text, tokenizer, length, chance)) for text in texts)
    block: list[int] = []
    while True:
        waiting: list[tuple[str, Iterator[int]]] = []
        room = _WAITING
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


def _from_a_line(text: str, tokenizer: Any, length: int, chance: random.Random) -> Iterator[int]:
    """The tokens of a document from a line on that a block or so follows; last what comes before that line."""
    before = max(0, len(text) - _CHARACTERS * length)
    start = text.find("\n", chance.randrange(before)) + 1 if before else 0
    for part in (text[start:], text[:start]):
        if part:
            yield from chain.from_iterable(_encoded(part, tokenizer, 4 * _CHARACTERS * length))


def _encoded(text: str, tokenizer: Any, size: int) -> Iterator[array[int]]:
    """A document's tokens, of about `size` characters at a time, and the end-of-text token."""
    try:
        for piece in pieces(text, size):
            yield array("i", tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if (end := end_of_text(tokenizer)) is not None:
            yield array("i", [end])
    except Exception as error:  # a tokenizer that loads can still lack what a text asks for
        raise CheckpointError(f"the tokenizer does not take the text: {one_line(error)}") from error


def token_blocks(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    max_tokens: int | None = None,
    name: str = "the data",
    flag: str = "--data",
    drawn: bool = False,
    dtype: torch.dtype = torch.long,
) -> Tensor:
    """The blocks of `token_stream` as (n, length), of at most `max_tokens`; of `drawn_stream` where they are `drawn`.

    Many of them are held in half the memory with dtype int32.

    Raises:
        DataError: the documents do not fill one block.
    """
    most = None if max_tokens is None else max(1, max_tokens // length)
    stream = drawn_stream(texts, tokenizer, length) if drawn else token_stream(texts, tokenizer, length, dtype)
    blocks = list(islice(stream, most))
    if not blocks:
        raise DataError(f"{name} holds less than one block of {length} tokens: give more with {flag}")
    return torch.stack(blocks)
