"""Documents as tokens: one way for calibration, measurement and training."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DataError, one_line
from ..families.special_tokens import end_of_text
from .formats import pieces
from .splits import Document

_PIECE = 2**16  # characters given to a tokenizer at once, about

CHARACTERS = 4
"""of a token, about"""


class Encoder:
    """Encodes documents as their tokenizer does, with its own special tokens, and closes them with its end of text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin, suffix = _around(tokenizer)
        """what the tokenizer begins every document with"""
        closed = end_of_text(tokenizer)
        self.end = suffix if closed is None or closed in suffix else [*suffix, closed]
        """what every document ends with"""

    def stream(self, text: Document, size: int = _PIECE, *, whole: bool = True) -> Iterator[int]:
        """A document's tokens, of about `size` characters at a time; special tokens that it holds are not doubled.

        A document that is tokens already is taken as it is.

        Args:
            whole: whether the text begins where its document does.

        Raises:
            CheckpointError: the tokenizer does not take it.
        """
        return chain.from_iterable(self.parts(text, size, whole=whole))

    def parts(self, text: Document, size: int = _PIECE, *, whole: bool = True) -> Iterator[array[int]]:
        """The same as several arrays."""
        if not isinstance(text, str):
            try:
                yield from (array("i", text[i : i + size].tolist()) for i in range(0, len(text), size))
            except OverflowError as error:
                raise DataError(f"the text holds token {int(text.max())}, which no model knows") from error
            return
        tokens = array("i")
        try:
            begin, end = array("i", self.begin if whole else []), array("i", self.end)
            for piece in pieces(text, size):
                tokens = array("i", self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
                if begin and tokens[: len(begin)] != begin:
                    yield begin
                begin = array("i")
                yield tokens
        except Exception as error:  # a tokenizer that loads can still lack what a text asks for
            raise CheckpointError(f"the tokenizer does not take the text: {one_line(error)}") from error
        if tokens[len(tokens) - len(end) :] != end:
            yield end

    def whole(self, text: Document, most: int) -> list[int] | None:
        """A document's tokens, or None where there are more than `most`."""
        tokens = list(islice(self.stream(text, 4 * CHARACTERS * most), most + 1))
        return tokens if len(tokens) <= most else None

    def beginning(self, text: str) -> list[int]:
        """The tokens of a text that is to be gone on from."""
        tokens = list(self.stream(text))
        return tokens[: len(tokens) - len(self.end)] if self.end else tokens


def control_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """Special tokens that a document may begin with: those that do not end, fill or mask one, nor stand for a word."""
    named = ("eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id", "sep_token_id")
    others = {getattr(tokenizer, name, None) for name in named}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = [*getattr(tokenizer, "all_special_ids", []), *(id_ for id_, token in added.items() if token.special)]
    return sorted({id_ for id_ in special if id_ not in others and id_ < vocabulary})


def encoded_pair(tokenizer: Any, source: Document, target: Document, length: int) -> tuple[Tensor, Tensor]:
    """What an encoder-decoder reads and answers, each (T,), cut to `length`, as its tokenizer encodes them."""
    if not (isinstance(source, str) and isinstance(target, str)):
        return tensor_of(source[:length]), tensor_of(target[:length])
    limit = {"truncation": True, "max_length": length}
    inputs, labels = tokenizer(source, **limit), tokenizer(text_target=target, **limit)
    return torch.tensor(inputs["input_ids"]), torch.tensor(labels["input_ids"])


def tensor_of(ids: Any) -> Tensor:
    """Token ids of any integer type as a tensor of its own, int64."""
    return torch.tensor(ids.tolist())


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    try:
        bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        full = list(tokenizer("a", verbose=False)["input_ids"])
    except Exception:  # what it does not take is told of where text is read
        return [], []
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
