"""Text to calibrate on, as model inputs: the user's, the model's own samples, or random tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import Batch
from .checkpoint import Source
from .data import SpanCorruption, documents, token_blocks
from .errors import DataError
from .evaluation import check_vocabulary, load_tokenizer
from .execution import Progress, silent
from .plan import Plan

LONGEST = 1024
"""tokens in one sequence, at most"""
HELD_OUT = 0.1
"""of the sequences, for the choices"""
_BATCH_TOKENS = 4096
_SAMPLED_SEQUENCES = 128
_DROPPED = 0.25  # of a sampled text's end, at most


@dataclass(frozen=True)
class Text:
    """Calibration text as model inputs, whole sequences held out for the choices."""

    batches: list[Batch]
    held_out: list[Batch]
    name: str

    @property
    def fitted(self) -> int:
        """Sequences that are not held out."""
        return sum(len(batch["input_ids"]) for batch in self.batches)


def calibration_text(
    model: Any,
    plan: Plan,
    source: Source,
    device: torch.device,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Text:
    """Text to calibrate on: what the user names; else a causal model's own samples, span-corrupted text for T5.

    A T5 without a tokenizer reads random tokens and answers with its own samples; other models without a language model
    head read random tokens.

    Raises:
        DataError: the text named is too short or does not fit the model.
    """
    settings = plan.calibration
    assert settings is not None
    length = min(plan.dimensions.context, LONGEST)
    tokens = settings.tokens
    count = max(2, tokens // length)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    rows: list[Batch]
    if settings.text is not None or (encoder_decoder and _has_tokenizer(source)):
        rows, name = _from_documents(plan, source, settings.text, length, tokens, encoder_decoder, generator)
    elif encoder_decoder:
        rows, name = (
            _random_and_answer(model, count, length, device, generator),
            "random tokens and the model's answers",
        )
    elif plan.has_language_model_head:
        ids = sample(model, count, length, device, generator, progress)
        rows, name = [{"input_ids": row[None]} for row in ids], "sampled from the model"
    else:
        ids = torch.randint(model.config.vocab_size, (count, length), generator=generator)
        rows, name = [{"input_ids": row[None]} for row in ids], "random tokens"
    held = max(1, round(HELD_OUT * len(rows)))
    size = max(1, _BATCH_TOKENS // length)
    return Text(_stacked(rows[:-held], size), _stacked(rows[-held:], size), name)


def _has_tokenizer(source: Source) -> bool:
    if source.folder is None:
        return False
    try:
        SpanCorruption.of(load_tokenizer(source.folder))
    except Exception:  # whatever keeps it from loading, there is another way
        return False
    return True


def _stacked(rows: list[Batch], size: int) -> list[Batch]:
    return [
        {name: torch.cat([row[name] for row in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, len(rows), size)
    ]


def _from_documents(
    plan: Plan,
    source: Source,
    text: str | None,
    length: int,
    tokens: int,
    encoder_decoder: bool,
    generator: torch.Generator,
) -> tuple[list[Batch], str]:
    if source.folder is None:
        raise DataError("calibration text needs a tokenizer: give a folder or a hub id, not a model in memory")
    tokenizer = load_tokenizer(source.folder)
    name = f"{text or 'stdlib'}, training part"
    blocks = token_blocks(documents(text, "train"), tokenizer, length, max(tokens, 2 * length), name)
    if len(blocks) < 2:
        raise DataError(f"{name} holds fewer than two blocks of {length} tokens: give more with --calibration")
    corrupt = SpanCorruption.of(tokenizer) if encoder_decoder else None
    check_vocabulary(blocks, plan.source_config["vocab_size"], corrupt)
    if corrupt is None:
        return [{"input_ids": row[None]} for row in blocks], name
    inputs, labels = corrupt(blocks, generator)
    rows = [{"input_ids": i[None], "labels": t[None]} for i, t in zip(inputs, labels, strict=True)]
    return rows, f"{name}, span corruption"


@torch.no_grad()
def sample(
    model: Any, count: int, length: int, device: torch.device, generator: torch.Generator, progress: Progress = silent
) -> Tensor:
    """A causal model's own text, from its first token at temperature 1, packed as training data are: (count, length).

    Of each text a random part of the end is dropped and the rest put one after the other, so that a sequence starts
    anywhere in a text. (Where all start with the first token, fits rely on what heads read there.)
    """
    from transformers import GenerationConfig

    start = next((t for t in (model.config.bos_token_id, model.config.eos_token_id) if t is not None), 0)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, min_length=length,
        bos_token_id=start, pad_token_id=start, eos_token_id=None,
    )  # fmt: skip
    rows: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        kept = 0
        while kept < count * length:
            progress("sample text", kept, count * length)
            missing = math.ceil((count * length - kept) / (length * (1 - _DROPPED / 2)))
            begin = torch.full((min(_SAMPLED_SEQUENCES, missing), 1), start, device=device)
            ids = model.generate(begin, attention_mask=torch.ones_like(begin), generation_config=settings).cpu()
            ends = torch.randint(length - int(_DROPPED * length), length + 1, (len(ids),), generator=generator)
            rows += [row[:end] for row, end in zip(ids, ends.tolist(), strict=True)]
            kept += int(ends.sum())
    progress("sample text", count * length, count * length)
    return torch.cat(rows)[: count * length].view(count, length)


@torch.no_grad()
def _random_and_answer(
    model: Any, count: int, length: int, device: torch.device, generator: torch.Generator
) -> list[Batch]:
    """Random encoder inputs, and what the model samples for them a token at a time."""
    inputs = torch.randint(model.config.vocab_size, (count, length), generator=generator)
    answer_length = max(2, length // 4)
    rows: list[Batch] = []
    for part in inputs.split(_SAMPLED_SEQUENCES):
        encoded = model.get_encoder()(part.to(device)).last_hidden_state if hasattr(model, "get_encoder") else None
        labels = torch.full((len(part), 1), model.config.decoder_start_token_id or 0)
        for _ in range(answer_length):
            logits = model(encoder_outputs=(encoded,), decoder_input_ids=labels.to(device), use_cache=False).logits[
                :, -1
            ]
            labels = torch.cat([labels, torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)], 1)
        rows += [{"input_ids": i[None], "labels": t[None, 1:]} for i, t in zip(part, labels, strict=True)]
    return rows
