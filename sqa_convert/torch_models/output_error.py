"""How far a model with other attentions is from itself in what it puts out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Partition, get_method
from ..layers.multihead_weights import heads_of
from ..layers.sparse_query_attention import SparseQueryAttention
from ..layers.transformer_layers import put_modules
from .run_batches import Runner


@torch.no_grad()
def output_errors(
    runner: Runner, layers: Mapping[nn.MultiheadAttention, SparseQueryAttention], batches: Sequence[Any]
) -> dict[str, float | None]:
    """Squared error of a model's output on batches as a share of its variance, with layers in the place of its
    attentions, and with as many heads averaged; None where it puts out no numbers."""
    expected = [runner(batch) for batch in batches]
    if not layers or not any(output.numel() for outputs in expected for output in outputs):
        return {"output_error": None, "output_error_of_mean": None}
    averaged = {module: _averaged(module, layer) for module, layer in layers.items()}
    return {
        "output_error": _error(runner, layers, batches, expected),
        "output_error_of_mean": _error(runner, averaged, batches, expected),
    }


def _averaged(module: nn.MultiheadAttention, like: SparseQueryAttention) -> SparseQueryAttention:
    partition = Partition.contiguous(module.num_heads, like.q_groups, like.kv_groups)
    merged = get_method("mean").merged(heads_of(module), partition)
    return SparseQueryAttention.with_heads(module, merged)


def _error(
    runner: Runner,
    layers: Mapping[nn.MultiheadAttention, nn.Module],
    batches: Sequence[Any],
    expected: Sequence[list[Tensor]],
) -> float | None:
    changed = put_modules(runner.model, {module: layer.eval() for module, layer in layers.items()})
    try:
        lost = energy = 0.0
        for batch, wanted in zip(batches, expected, strict=True):
            for output, target in zip(runner(batch, changed), wanted, strict=True):
                target = target.double().flatten(0, -2) if target.dim() > 1 else target.double()[:, None]
                lost += (output.double().view_as(target) - target).square().sum().item()
                energy += (target - target.mean(0)).square().sum().item()
    finally:
        put_modules(changed, {layer: module for module, layer in layers.items()})
    return lost / energy if energy and math.isfinite(lost / energy) else None
