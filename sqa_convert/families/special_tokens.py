"""The special tokens of a model.

Under a name like `eos_token_id` a config holds a number, a list of them, or nothing, and not always of tokens that the
model knows: GPT-2s trained from scratch keep 50256 beside a vocabulary of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def token_ids(value: Any, vocabulary: int) -> tuple[int, ...]:
    """Of a number, a list of them, or None, those below `vocabulary`."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocabulary)


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids, each below the size of the model's vocabulary."""

    begin: int | None
    """what a text begins with; None where the model names no token that it knows"""
    end: tuple[int, ...]
    """each ends a text"""
    padding: int
    decoder_start: int
    """what the decoder of an encoder-decoder begins with"""

    @classmethod
    def of(cls, config: Any, generation: Mapping[str, Any] | None = None) -> SpecialTokens:
        """As a model's config names them, and its generation config where that names more."""

        def known(name: str) -> tuple[int, ...]:
            values = (getattr(config, f"{name}_token_id", None), (generation or {}).get(f"{name}_token_id"))
            return tuple(dict.fromkeys(id_ for value in values for id_ in token_ids(value, config.vocab_size)))

        begin, end, padding, start = map(known, ("bos", "eos", "pad", "decoder_start"))
        return cls(
            begin=next(iter(begin + end), None),
            end=end,
            padding=next(iter(padding + end), 0),
            decoder_start=next(iter(start + padding), 0),  # of T5 they are one
        )


def end_of_text(tokenizer: Any) -> int | None:
    """The token that a tokenizer closes a text with; BERT's, which some T5s have, has another name for it."""
    end = getattr(tokenizer, "eos_token_id", None)
    return getattr(tokenizer, "sep_token_id", None) if end is None else end
