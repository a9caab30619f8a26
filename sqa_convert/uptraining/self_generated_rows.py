"""Training rows that the source writes itself, kept in the run's folder: what is finished is not written again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.load import load_model
from ..progress import Progress
from ..random_generators import generator_for
from ..text.self_generated import own_pairs, own_rows
from ..text.tokenized_rows import packed
from .run_folder import Run

FOLDER = "text"
"""in the run's folder"""

PART = 65_536
"""tokens that are written at a time"""


def write_own_text(
    run: Run, tokenizer: Any, device: torch.device, progress: Progress, trust_remote_code: bool = False
) -> None:
    """Lets the source write the texts of a run's recipe, in parts, each seeded by its number."""
    recipe, length = run.recipe, run.recipe.sequence_length
    parts = _parts(run)
    missing = [number for number, path in enumerate(parts) if not path.is_file()]
    if not missing:
        return
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    model: Any = load_model(run.source, dtype="float32", trust_remote_code=trust_remote_code).to(device)
    for number in missing:
        progress("sample text", number * PART, len(parts) * PART)
        generator = generator_for(f"own text {number}", recipe.seed)
        if model.config.is_encoder_decoder:
            rows = [t for pair in own_pairs(model, tokenizer, PART, length, device, generator, "train") for t in pair]
        else:
            rows = own_rows(model, PART, length, device, generator, tokenizer)
        _save(rows, parts[number])
    progress("sample text", len(parts) * PART, len(parts) * PART)


def read_own_text(run: Run, pairs: bool) -> list[Any]:
    """Rows (T,), several of which are a block of at most `sequence_length` tokens; or pairs."""
    rows: list[Tensor] = []
    for path in _parts(run):
        stored = load_file(path)
        rows += stored["tokens"].split(stored["lengths"].tolist())
    if pairs:
        return list(zip(rows[::2], rows[1::2], strict=True))
    return list(packed(rows, run.recipe.sequence_length))


def _parts(run: Run) -> list[Path]:
    count = -(-run.recipe.tokens // PART)
    return [run.checkpoints / FOLDER / f"{number:05d}.safetensors" for number in range(count)]


def _save(rows: Sequence[Tensor], path: Path) -> None:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    unfinished = path.with_suffix(".part")
    save_file({"tokens": torch.cat(list(rows)), "lengths": lengths}, unfinished)
    unfinished.replace(path)
