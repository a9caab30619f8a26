"""Generators of random numbers, one for each purpose: what one draws does not shift what another does."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """A generator on the CPU, the same for a seed and a purpose whenever it is made."""
    import torch

    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))
