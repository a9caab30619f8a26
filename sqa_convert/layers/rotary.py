"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(heads: Tensor, base: float, start: int = 0) -> Tensor:
    """Queries or keys (B, H, T, d), d even, turned by their positions `start`, `start` + 1, …

    Component i is paired with i + d / 2, as Llama's checkpoints have it.

    Source: Su et al., arXiv 2104.09864.
    """
    half = heads.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=heads.device, dtype=torch.float32) / half)
    positions = torch.arange(start, start + heads.shape[-2], device=heads.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # (T, d / 2)
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
