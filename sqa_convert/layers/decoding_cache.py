"""Keys and values of the positions that were decoded, for one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """What a layer has seen while it decodes: `key` and `value` (B, Hkv, S, d), None before the first position."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        """Positions, S."""
        return 0 if self.key is None else self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(held.nbytes for held in (self.key, self.value) if held is not None)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds positions (B, Hkv, T, d) and returns all."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: Tensor) -> None:
        """Takes sequences by their numbers (n,), as beam search does."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]
