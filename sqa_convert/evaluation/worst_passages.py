"""Where a model differs most from its source: the worst passage of a document, of the documents where that is worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.companions import has_tokenizer
from ..text.tokenizers import load_tokenizer

LENGTH = 48
"""tokens of a passage; of a shorter document all"""

LEAST = 12
"""tokens that a document must have to be looked at, unless none has"""

SHOWN = 3
"""passages"""

_UNFINISHED = "\ufffd"  # what an incomplete character is decoded as


def worst_passages(kl: Tensor, labels: Tensor, documents: Tensor) -> list[dict[str, Any]]:
    """Passages of the largest mean KL, one a document, the worst first.

    Args:
        kl: (N,) of tokens, document by document, nats.
        labels: (N,) the tokens.
        documents: (N,) each one's document.

    Returns:
        Of each {"document" and "from" (which of its tokens; both count from 1), "kl" (the mean), "ids", "each"}.
    """
    sizes = documents.unique_consecutive(return_counts=True)[1].tolist()
    found, start = [], 0
    for number, size in enumerate(sizes):
        means = kl[start : start + size].unfold(0, min(LENGTH, size), 1).mean(1)
        found.append((float(means.max()), size >= LEAST, start + int(means.argmax()), number, start))
        start += size
    found = [one for one in found if one[1]] or found
    result = []
    for mean, _, first, number, begin in sorted(found, key=lambda one: (-one[0], one[2]))[:SHOWN]:
        part = slice(first, min(first + LENGTH, begin + sizes[number]))
        result.append(
            {
                "document": number + 1,
                "from": first - begin + 1,
                "kl": round(mean, 5),
                "ids": labels[part].tolist(),
                "each": [round(value, 4) for value in kl[part].tolist()],
            }
        )
    return result


def spelled(passages: list[dict[str, Any]], folder: Path, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """The same with "tokens", [[text, KL]], in place of "ids" and "each"; none where nothing makes words of the tokens.

    Args:
        folder: with the tokenizer.
    """
    if not has_tokenizer(folder):
        return []
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        return [
            {key: passage[key] for key in ("document", "from", "kl")}
            | {"tokens": _pieces(tokenizer, passage["ids"], passage["each"])}
            for passage in passages
        ]
    except Exception:  # tokenizers fail in ways of their own: all else of the measurement is done
        return []


def _pieces(tokenizer: Any, ids: list[int], each: list[float]) -> list[list[Any]]:
    """Texts that together are that of the tokens; what is only whole with the next token stands with it."""
    pieces: list[list[Any]] = []
    shown, most = "", 0.0
    for last, value in enumerate(each, 1):
        text, most = str(tokenizer.decode(ids[:last])), max(most, value)
        if text.endswith(_UNFINISHED) and last < len(ids):
            continue
        new = text[len(shown) :] if text.startswith(shown) else str(tokenizer.decode(ids[last - 1 : last]))
        pieces.append([new, most])
        shown, most = text, 0.0
    return pieces
