"""Which weights a model was made from: a few numbers of a few tensors, to know them again by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from .dtypes import FLOATING, decode
from .source import Source

_TENSORS = 16

_NUMBERS = 2**16  # of each tensor, from its beginning: little is read, however large a model is

Fingerprint = dict[str, dict[str, object]]
"""{canonical name: {"shape", "sha256" of the first numbers as float32}}"""


def fingerprint(source: Source, names: Mapping[str, str]) -> Fingerprint:
    """Tells weights from others by a few matrices of a source's layers, evenly chosen.

    The same weights have the same fingerprint, in whatever folder, files, order or wider dtype they are stored.

    Args:
        names: of the source's tensors, by canonical name.

    Raises:
        CheckpointError: the source cannot be read.
    """
    # Only of layers: embeddings, which lie outside of them, may be stored by another name.
    inside = sorted(
        canonical
        for canonical, name in names.items()
        if any(part.isdigit() for part in canonical.split("."))
        and len(source.index[name].shape) == 2
        and source.index[name].dtype in FLOATING
    )
    chosen = {inside[i * len(inside) // _TENSORS] for i in range(_TENSORS)} if inside else set()
    return {canonical: _of(source, names[canonical]) for canonical in sorted(chosen)}


def unlike(known: Fingerprint, source: Source, names: Mapping[str, str]) -> str | None:
    """The first tensor of a fingerprint that a source lacks or holds other numbers in; None where all are the same."""
    for canonical, expected in known.items():
        name = names.get(canonical)
        if name is None or source.index[name].dtype not in FLOATING or _of(source, name) != expected:
            return canonical
    return None


def _of(source: Source, name: str) -> dict[str, object]:
    import numpy as np

    info = source.index[name]
    piece = next(iter(source.pieces(name)), memoryview(b""))
    numbers = decode(piece, info.dtype)[:_NUMBERS].astype(np.float32)
    return {"shape": list(info.shape), "sha256": hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}
