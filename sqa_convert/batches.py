"""Token blocks and training batches: packing, T5's span corruption, pairs of source and target."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .distill import IGNORED
from .errors import CheckpointError, DataError, one_line
from .special_tokens import end_of_text
from .text_formats import pieces

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0  # T5's span corruption (Raffel et al., arXiv 1910.10683, section 3.3.4)
BYTE_SPAN = 20.0  # ByT5's, in bytes (Xue et al., arXiv 2105.13626, section 3.1)
MOST_SENTINELS = 100
_SENTINEL = re.compile(r"▁?[<\[]?(?:extra|sentinel)(?:[_ ]?(?:id|token))?[_ ]?(\d{1,3})[>\]]?")
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


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective: spans of tokens replaced by sentinels, the target being the spans (arXiv 1910.10683, 3.1.4).

    All rows of one call have equal length, so nothing is ever padded.
    """

    sentinels: tuple[int, ...]
    eos: int | None
    noise_density: float = NOISE_DENSITY
    mean_span: float = MEAN_SPAN
    name: ClassVar[str] = "span corruption"

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int | None = None) -> SpanCorruption:
        """With the sentinels of a tokenizer, those of them below `vocabulary`. Raises DataError when there are none."""
        from transformers import ByT5Tokenizer

        span = MEAN_SPAN
        if isinstance(tokenizer, ByT5Tokenizer):
            # Its added <extra_id_0> … were never trained: bytes are, the last ones (Xue et al., arXiv 2105.13626).
            last, span = tokenizer.vocab_size + tokenizer.offset - 1, BYTE_SPAN
            sentinels = list(range(last, last - MOST_SENTINELS, -1))
        else:
            sentinels = _sentinels(tokenizer.get_vocab())
        known = list(takewhile(lambda token: vocabulary is None or token < vocabulary, sentinels))
        if not known:
            raise DataError("the tokenizer has no <extra_id_0> … sentinels, which span corruption needs")
        return cls(tuple(known), end_of_text(tokenizer), mean_span=span)

    def __call__(
        self, tokens: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Corrupts (B, T) tokens; returns encoder inputs (B, T - noise + spans + 1), labels (B, noise + spans + 1).

        With a generator for each row what happens to a row does not depend on the rows beside it.
        """
        batch, length = tokens.shape
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span), 1), length - noise, len(self.sentinels))
        kept_lengths = _random_partition(batch, length - noise, spans, generator)  # (B, spans), kept before each span
        span_lengths = _random_partition(batch, noise, spans, generator)
        starts = (kept_lengths + span_lengths).cumsum(1) - span_lengths  # (B, spans), where each span begins
        position = torch.arange(length).expand(batch, -1)
        is_start = torch.zeros(batch, length, dtype=torch.long).scatter_(1, starts, 1)
        span_of = is_start.cumsum(1) - 1  # (B, T), the last span begun
        in_span = (span_of >= 0) & (position < (starts + span_lengths).gather(1, span_of.clamp(min=0)))

        sentinel = torch.tensor(self.sentinels)[:spans]
        eos = torch.empty(batch, 0, dtype=tokens.dtype) if self.eos is None else torch.full((batch, 1), self.eos)
        corrupted = torch.where(is_start.bool(), sentinel[span_of.clamp(min=0)], tokens)
        inputs = corrupted[~in_span | is_start.bool()].view(batch, -1)
        # In the target each span's tokens follow its sentinel: span s shifts its tokens right by s + 1.
        labels = torch.empty(batch, noise + spans, dtype=tokens.dtype)
        before = span_lengths.cumsum(1) - span_lengths + torch.arange(spans)
        labels.scatter_(1, before, sentinel.expand(batch, -1))
        is_token = torch.ones_like(labels, dtype=torch.bool).scatter_(1, before, False)
        labels[is_token] = tokens[in_span]
        return torch.cat([inputs, eos], 1), torch.cat([labels, eos], 1)


def _sentinels(vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>` … in whichever way a tokenizer writes them."""
    found: dict[int, int] = {}
    for word in sorted(vocabulary):
        match = _SENTINEL.fullmatch(word)
        if match:
            found.setdefault(int(match[1]), vocabulary[word])
    return [found[number] for number in takewhile(found.__contains__, range(MOST_SENTINELS))]


@dataclass(frozen=True)
class PrefixSplit:
    """What a T5 without sentinels is asked: the second half of each text from the first (arXiv 1910.10683, 3.2.1)."""

    name: ClassVar[str] = "second halves from the first, for want of sentinels"

    def __call__(self, tokens: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        """Splits (B, T) tokens; returns encoder inputs (B, T // 2) and labels (B, T - T // 2)."""
        half = tokens.shape[1] // 2
        return tokens[:, :half].contiguous(), tokens[:, half:].contiguous()  # as T5's loss wants labels


Denoising = SpanCorruption | PrefixSplit


def denoising(tokenizer: Any, vocabulary: int) -> Denoising:
    """How an encoder-decoder with this tokenizer is asked about a text."""
    try:
        return SpanCorruption.of(tokenizer, vocabulary)
    except DataError:
        return PrefixSplit()


def _random_partition(
    batch: int, total: int, parts: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """(batch, parts) positive integers, each row summing to `total`, uniform over all such rows."""
    if generator is None or isinstance(generator, torch.Generator):
        drawn = torch.rand(batch, total - 1, generator=generator)
    else:
        drawn = torch.stack([torch.rand(total - 1, generator=own) for own in generator])
    cuts = drawn.argsort(1)[:, : parts - 1].sort(1).values + 1
    edge = torch.zeros(batch, 1, dtype=torch.long)
    return torch.cat([edge, cuts, edge + total], 1).diff(dim=1)


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
    """where given, no document is attended to from the next one in a block, and positions start again with each"""

    def __call__(self, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([block for _, block in rows]).long()  # (B, T)
        labels = tokens.clone()
        labels[:, 0] = IGNORED
        batch = {"input_ids": tokens, "labels": labels}
        if self.end_of_text is not None:
            position = torch.arange(tokens.shape[1]).expand_as(tokens)
            begins = nn.functional.pad(tokens[:, :-1] == self.end_of_text, (1, 0))
            batch["position_ids"] = position - (position * begins).cummax(1).values
        return batch


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
