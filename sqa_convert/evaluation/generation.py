"""What models write: side by side for reading, and against wanted answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.companions import has_tokenizer
from ..text.collate import IGNORED
from ..text.plain_generation import generate
from ..text.tokenizers import load_tokenizer
from .held_out_batches import HeldOut
from .load import load_model

GIVEN = 32
"""tokens a decoder-only model goes on from"""

WRITTEN = 48
"""tokens of an answer"""

SHOWN = 2
"""texts, for the report"""


@torch.no_grad()
def continuations(
    models: Mapping[str, Any], held_out: HeldOut, count: int = SHOWN, *, trust_remote_code: bool = False
) -> list[dict[str, str]]:
    """Greedy continuations of held-out text; of an encoder-decoder, its answers to gaps or sources.

    Args:
        models: folders, the newest result last, or models.

    Returns:
        For each of `count` texts {"given": the text, and per model its answer}; none where a model cannot write, or
        nothing makes words of its tokens.
    """
    rows = list(islice(_inputs(held_out), count))
    texts: list[dict[str, str]] = [{} for _ in rows]
    # A source may have its tokenizer elsewhere; the last, which is the newest result, has it with it.
    newest = Path(list(models.values())[-1])
    if not has_tokenizer(newest):
        return []
    tokenizer: Any = load_tokenizer(newest, trust_remote_code)
    for name, folder in models.items():
        loaded = not isinstance(folder, torch.nn.Module)
        model: Any = load_model(folder, trust_remote_code=trust_remote_code) if loaded else folder
        model.to(held_out.device)
        try:
            for text, row in zip(texts, rows, strict=True):
                text.update(_continued(name, model, tokenizer, row, held_out.device))
        except Exception:  # one that stock generation does not know how to run: all else of it is done
            return []
    return texts


def _continued(name: str, model: Any, tokenizer: Any, row: torch.Tensor, device: torch.device) -> dict[str, str]:
    whole = model.config.is_encoder_decoder
    begin, room = GIVEN, WRITTEN
    if not whole:
        begin = min(GIVEN, model.config.n_positions // 2)
        room = min(WRITTEN, model.config.n_positions - begin)
    given = (row if whole else row[:begin])[None].to(device)
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    written = generate(model, inputs, max_new_tokens=room)[0]
    return {
        "given": tokenizer.decode(given[0]),
        name: tokenizer.decode(written if whole else written[given.shape[1] :]),
    }


def _inputs(held_out: HeldOut) -> Iterator[torch.Tensor]:
    """Token ids (T,) without padding."""
    for batch in held_out.batches:
        ids = batch["input_ids"]
        for row, mask in zip(ids, batch.get("attention_mask", torch.ones_like(ids)), strict=True):
            yield row[mask.bool()]


@torch.no_grad()
def answer_scores(model: Any, tokenizer: Any, held_out: HeldOut) -> dict[str, float]:
    """Greedy answers to the sources of pairs against their targets, as shares from 0 to 1.

    Returns:
        "exact_match", of stripped texts; and where the package rouge-score is installed the F-measures "rouge1",
        "rouge2", "rougeL".
    """
    wanted, given = [], []
    for batch in held_out.batches:
        inputs = {name: tensor.to(held_out.device) for name, tensor in batch.items() if name != "labels"}
        written = generate(model, inputs, max_new_tokens=batch["labels"].shape[1])
        given += tokenizer.batch_decode(written, skip_special_tokens=True)
        targets = [row[row != IGNORED] for row in batch["labels"]]
        wanted += tokenizer.batch_decode(targets, skip_special_tokens=True)
    pairs = [(want.strip(), answer.strip()) for want, answer in zip(wanted, given, strict=True)]
    scores = {"exact_match": sum(want == answer for want, answer in pairs) / len(pairs)}
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return scores
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    rouge = [scorer.score(want, answer) for want, answer in pairs]
    return scores | {name: sum(score[name].fmeasure for score in rouge) / len(rouge) for name in names}
