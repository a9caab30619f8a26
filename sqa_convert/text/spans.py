"""What an encoder-decoder is asked about a text: T5's span corruption, or the second half from the first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import DataError
from ..families.special_tokens import end_of_text

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0  # T5's span corruption (Raffel et al., arXiv 1910.10683, section 3.3.4)

BYTE_SPAN = 20.0  # ByT5's, in bytes (Xue et al., arXiv 2105.13626, section 3.1)

MOST_SENTINELS = 100

_SENTINEL = re.compile(r"▁?[<\[]?(?:extra|sentinel)(?:[_ ]?(?:id|token))?[_ ]?(\d{1,3})[>\]]?")


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
