"""What all calibration text is made with: the source, how long its texts are, how many are wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..conversion.fitting import Fitting
from ..conversion.plan import Plan
from ..errors import DataError, SQAError
from ..progress import Progress
from ..text.documents import documents, peeked
from ..text.formats import TEXT_COLUMN
from ..text.one_text_a_line import column_read, read_as
from ..text.splits import Document, Skipped
from ..text.suitability import looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer, tokenizer_in_memory

LONGEST = 1024
"""tokens in one sequence, at most"""

Row = tuple[Tensor, ...]
"""what a decoder-only model or an encoder reads, (T,); of an encoder-decoder also its answer"""


@dataclass(frozen=True)
class Content:
    """Rows of calibration text."""

    rows: Sequence[Row]
    name: str
    unknown: float | None = None
    """share of the characters that the tokenizer does not know; None of what the model wrote or nobody did"""
    sampled: bool = False
    """whether the model wrote it"""


@dataclass(frozen=True)
class Reading:
    """A source that is to be calibrated."""

    model: Any
    plan: Plan
    source: Source
    device: torch.device
    generator: torch.Generator
    trust_remote_code: bool
    progress: Progress
    cache: float
    """bytes of keys and values held while the model writes"""

    @property
    def settings(self) -> Fitting:
        return self.plan.fitting_on(self.device.type)

    @property
    def vocabulary(self) -> int:
        return int(self.plan.source_config["vocab_size"])

    @cached_property
    def length(self) -> int:
        """Tokens of the longest row."""
        return min(self.settings.length or LONGEST, self.plan.dimensions.context)

    @cached_property
    def tokens(self) -> int:
        """Wanted of all rows together."""
        return max(self.settings.tokens, 2 * self.length)

    @cached_property
    def tokenizer(self) -> Any:
        """Raises CheckpointError where there is none."""
        if self.source.folder is None:
            return tokenizer_in_memory(self.model, self.trust_remote_code)
        return load_tokenizer(self.source.folder, self.trust_remote_code, without="leave out --calibration")

    def texts(self, skipped: Skipped) -> tuple[Iterator[Document], str, float | None]:
        """Documents of the text that was named, or of the built-in corpus; its name, and the share it is unknown by.

        What is tokens already needs no tokenizer.
        """
        settings, flag = self.settings, "--calibration"
        named = settings.text_named
        column = TEXT_COLUMN if named is None else settings.text_column
        if not self.plan.has_language_model_head:
            column = column_read(named, column, flag)
        texts = documents(named, "train", column=column, shuffled=True, skipped=skipped, flag=flag)
        name = f"{read_as(named, column)}, training part"
        texts, are_tokens = peeked(texts)
        if are_tokens:
            return texts, name, None
        texts, unknown = looked_at(texts, self.tokenizer, name, flag)
        return texts, name, unknown

    @property
    def tokenizer_or_none(self) -> Any:
        """None where there is none."""
        with contextlib.suppress(SQAError):
            return self.tokenizer
        return None

    def check(self, rows: Sequence[Row], name: str) -> None:
        """Raises DataError where rows are too few or do not fit the model."""
        if len(rows) < 2:
            raise DataError(f"{name} holds fewer than two texts of two tokens: give more with --calibration")
        check_vocabulary(torch.cat([part for row in rows for part in row]), self.vocabulary)

    def random_tokens(self) -> list[Tensor]:
        """Rows (T,) that nobody wrote."""
        count = max(2, self.tokens // self.length)
        return list(torch.randint(self.vocabulary, (count, self.length), generator=self.generator))
