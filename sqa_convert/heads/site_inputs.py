"""What an attention site reads while a model runs over text, padding told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Inputs of a site on B sequences of one length: T query positions, S key positions, D model width."""

    x: Tensor
    """(B, T, D)"""
    memory: Tensor | None = None
    """(B, S, D), what cross-attention makes keys of; None: `x`"""
    counted: Tensor | None = None
    """(B, T), bool, the positions of `x` that count; None: all"""
    attended: Tensor | None = None
    """(B, S), bool, the keys that may be attended to; None: all. Causal attention needs none where padding is last."""
    values: Tensor | None = None
    """(B, S, D), what values are made of; None: what keys are made of"""
    mask: Tensor | None = None
    """(B, T, S), added to the scores of all heads; None: nothing is"""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | list[int]) -> Inputs:
        return Inputs(*(None if t is None else t[rows] for t in self._tensors()))

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(None if t is None else t.to(device) for t in self._tensors()))

    def float(self) -> Inputs:
        """In float32: what is read may be kept in less."""
        return Inputs(*(t.float() if t is not None and t.is_floating_point() else t for t in self._tensors()))

    def split(self, tokens: int) -> Iterator[slice]:
        """Some sequences at a time, of about so many positions of the longer side together."""
        size = max(1, tokens // self.length)
        return (slice(start, start + size) for start in range(0, len(self), size))

    @property
    def length(self) -> int:
        """Positions of the longer side."""
        return max(self.x.shape[1], self.keys.shape[1])

    @property
    def keys(self) -> Tensor:
        """(B, S, D)"""
        return self.x if self.memory is None else self.memory

    @property
    def positions(self) -> int:
        """How many count."""
        return self.x.shape[0] * self.x.shape[1] if self.counted is None else int(self.counted.sum())

    @property
    def read(self) -> Tensor:
        """(B, S, D), what values are made of."""
        return self.keys if self.values is None else self.values

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """As `Attention` takes them after the heads."""
        return self.x, self.memory, self.attended, self.values, self.mask

    @property
    def held(self) -> list[Tensor]:
        """All tensors there are."""
        return [tensor for tensor in self._tensors() if tensor is not None]

    def count(self, rows: Tensor) -> Tensor:
        """Of (B, T, ...) what is at positions that count: (n, ...)."""
        return rows.flatten(0, 1) if self.counted is None else rows[self.counted]

    def key_rows(self) -> Tensor:
        """(n, D), what keys are made of."""
        seen = self.counted if self.memory is None and self.attended is None else self.attended
        return self.keys.flatten(0, 1) if seen is None else self.keys[seen]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.memory, self.counted, self.attended, self.values, self.mask


def concatenated(batches: Iterable[Inputs]) -> list[Inputs]:
    """Batches of the same lengths and padding as one, in the order these first come."""
    alike: dict[tuple[object, ...], list[Inputs]] = {}
    for batch in batches:
        kind = (batch.x.shape[1], batch.keys.shape[1], *(tensor is None for tensor in batch._tensors()))
        alike.setdefault(kind, []).append(batch)
    return [Inputs(*map(_cat, zip(*(b._tensors() for b in group), strict=True))) for group in alike.values()]


def _cat(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)
