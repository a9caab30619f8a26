"""Held-out text as the inputs that models are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..amounts import amount, check_seed
from ..devices import choose_device
from ..errors import RecipeError, shown
from ..families.special_tokens import end_of_text
from ..text.blocks import token_blocks
from ..text.collate import IGNORED, CausalCollator
from ..text.documents import BUILT_IN, Skipped, documents
from ..text.formats import TEXT_COLUMN
from ..text.self_generated import own_loss
from ..text.spans import denoising
from ..text.suitability import Fit, looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer
from .load import load_config

DEFAULT_TOKENS = 16_384
"""tokens of held-out text"""

LONGEST = 1024
"""tokens in one sequence, at most"""

_BATCH_TOKENS = 4096

_FEW_COUNTED = 256  # predictions


@dataclass(frozen=True)
class HeldOut:
    """Batches of held-out text, the same for every model measured, and where they are measured."""

    batches: list[dict[str, Tensor]]
    name: str
    """what the text is"""
    tokens: int
    """predicted"""
    device: torch.device
    unknown: float = 0.0
    """share of the text's characters that the tokenizer does not know"""
    chosen: bool = True
    """whether it is another text than the built-in one"""

    def fit(self, model: Any, loss: float | None, own: float | None = None, who: str = "source") -> Fit:
        """What tells whether a model was made for this text.

        Args:
            model: on the text's device.
            loss: the model's on this text.
            own: its loss on what it writes itself; None finds out, where there is a loss to hold it against.
            who: what the model is called.
        """
        if own is None and loss is not None:
            own = own_loss(model, self.batches[0], self.device, torch.Generator().manual_seed(0))
        first = 0 if model.config.is_encoder_decoder else 1
        labels = torch.cat([batch["labels"][:, first:].flatten() for batch in self.batches])
        predicted = labels[labels != IGNORED]
        return Fit(
            loss,
            model.config.vocab_size,
            own,
            _token_entropy(predicted),
            self.unknown,
            self.chosen,
            who,
            len(predicted),
        )


def _token_entropy(tokens: Tensor) -> float | None:
    """As if each token stood alone, nats; None of too few to tell (Miller, 1955)."""
    if len(tokens) < _FEW_COUNTED:
        return None
    counts = tokens.unique(return_counts=True)[1].double()
    share = counts / len(tokens)
    return float(-(share * share.log()).sum() + (len(counts) - 1) / (2 * len(tokens)))


def prepare(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    text_column: str = TEXT_COLUMN,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    without: str = "copy the source's there",
) -> HeldOut:
    """Held-out text as inputs of the model in `folder`, and of every model with its tokenizer.

    It is drawn across documents, a block of each at most while there are others. A decoder-only model reads it as it
    is trained: no document sees another in its block, and positions start again with each.

    Args:
        data: as `sqa_convert.text.documents.documents` takes it; its held-out part is used.
        text_column: of a table, the one that holds the text.
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption.
        without: what to do where there is no tokenizer, for messages.

    Raises:
        CheckpointError: config or tokenizer do not load.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: there is no such device, seed or number of tokens.
    """
    chosen, tokens = choose_device(device), amount(tokens, "--tokens")
    if tokens < 2:
        raise RecipeError(f"--tokens {tokens}: of one nothing is predicted; give 2 or more")
    check_seed(seed)
    data = None if data is None else str(data)
    config = load_config(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code, without)
    name = f"{shown(data or BUILT_IN)}, held-out part"
    longest = getattr(config, "n_positions", None) or 512
    length = min(longest, LONGEST, tokens)
    skipped = Skipped()
    texts = documents(data, "heldout", column=text_column, shuffled=True, skipped=skipped)
    texts, unknown = looked_at(texts, tokenizer, name, "--data")
    blocks = token_blocks(texts, tokenizer, length, tokens, name, drawn=True)
    name = f"{name}{skipped}"
    named = data not in (None, BUILT_IN)
    corrupt = denoising(tokenizer, config.vocab_size) if config.is_encoder_decoder else None
    check_vocabulary(blocks, config.vocab_size)
    parts = blocks.split(max(1, _BATCH_TOKENS // length))
    if corrupt is None:
        collate = CausalCollator(end_of_text(tokenizer))
        batches = [collate(list(enumerate(part))) for part in parts]
        return HeldOut(batches, name, blocks.numel() - len(blocks), chosen, unknown, named)
    generator = torch.Generator().manual_seed(seed)
    pairs = [corrupt(part, generator) for part in parts]
    batches = [{"input_ids": inputs, "labels": labels} for inputs, labels in pairs]
    count = sum(labels.numel() for _, labels in pairs)
    return HeldOut(batches, f"{name}, {corrupt.name}", count, chosen, unknown, named)
