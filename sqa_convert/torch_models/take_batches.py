"""As many batches as a fit needs, and a tenth of them held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import DataError, shown
from ..heads import Partition
from .find_attention import Attentions
from .run_batches import Runner

LEAST_POSITIONS = 65_536
"""query positions that batches are taken for"""

ENOUGH_FOR_ANY = 4
"""times as many positions as are wanted: when one attention has read that, no others are waited for"""

HELD_OUT = 10
"""one in so many batches, or sequences"""


@dataclass(frozen=True)
class Batches:
    """What a user gave, as far as it is needed."""

    fitted: list[Any]
    held_out: list[Any]
    """of a single batch, that batch itself: some of its sequences are held out"""
    sizes: dict[str, float]
    """bytes, about, of what each attention reads on all of them; 0 for one that is not called"""
    single: bool


@torch.no_grad()
def take_batches(
    runner: Runner,
    attentions: Attentions,
    batches: Iterable[Any],
    positions: int | None,
    planned: Mapping[str, Partition],
) -> Batches:
    """Batches, until every attention that they reach has read enough positions, or one far more: some read one query of
    each sequence.

    Raises:
        DataError: there is none, or the model cannot be run on one, or none reaches an attention.
    """
    wanted = {
        name: positions or max(LEAST_POSITIONS, TOKENS_PER_UNKNOWN * (len(planned[name].clusters) * m.head_dim + 1))
        for name, m in attentions.items()
    }
    read, sizes = dict.fromkeys(attentions, 0), dict.fromkeys(attentions, 0.0)

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            made = output[0]
            read[name] += made.numel() // made.shape[-1]
            inputs = [*args[:3], *(kwargs[key] for key in ("query", "key", "value", "attn_mask") if key in kwargs)]
            sizes[name] += 4.0 * sum(tensor.numel() for tensor in inputs if tensor is not None)

        return hook

    hooks = [m.register_forward_hook(count(name), with_kwargs=True) for name, m in attentions.items()]
    taken: list[Any] = []
    try:
        for batch in _iterated(batches):
            runner(batch)
            taken.append(batch)
            shares = [read[name] / wanted[name] for name in attentions if read[name]]
            if shares and (min(shares) >= 1 or max(shares) >= ENOUGH_FOR_ANY):
                break
    finally:
        for handle in hooks:
            handle.remove()
    if not taken:
        raise DataError("--calibration: there is no batch in it")
    if not any(read.values()):
        raise DataError(f"--calibration: no batch reaches {shown(', '.join(attentions), 200)}")
    held = max(1, round(len(taken) / HELD_OUT))
    single = len(taken) == 1
    return Batches(taken if single else taken[:-held], taken[-held:], sizes, single)


def _iterated(batches: Any) -> Iterable[Any]:
    """Raises DataError for what is no collection of batches."""
    if isinstance(batches, torch.Tensor | dict | str) or not isinstance(batches, Iterable):
        raise DataError(f"--calibration: give batches in a list or a loader, not one {shown(type(batches).__name__)}")
    return batches
