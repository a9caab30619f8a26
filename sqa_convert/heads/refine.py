"""Layer-wise training of one attention site to reproduce the source's outputs: no labels, nothing but this site."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .attend import Attention
from .weights import AttentionHeads

LEARNING_RATE = 3e-2
"""of each array, in units of its root mean square"""
BATCH_TOKENS = 4096
"""positions a step, of the longer side"""
WARM_UP = 10
"""steps"""

_TRAINED = ("query", "key", "value", "output", "query_bias", "output_bias", "position_bias")


def refine(
    heads: AttentionHeads,
    attention: Attention,
    x: Tensor,
    memory: Tensor | None,
    wanted: Tensor,
    steps: int,
    generator: torch.Generator,
) -> AttentionHeads:
    """Adam on all weights of a converted site, cosine to zero, on the squared error of its output.

    Biases of keys and values stay: softmax ignores the first, and the output bias can hold the second.

    Args:
        heads: converted.
        attention: how the site attends.
        x: inputs (N, T, D).
        memory: (N, S, D) of cross-attention, else None.
        wanted: outputs (N, T, D).
        steps: of about `BATCH_TOKENS` positions.
        generator: draws the batches.

    Returns:
        The heads with trained weights.

    Source: layer-wise reconstruction before distillation, as in LoLCATs, arXiv 2410.10254.
    """
    trained = {
        name: weights.detach().clone().requires_grad_()
        for name in _TRAINED
        if (weights := getattr(heads, name)) is not None
    }
    current = dataclasses.replace(heads, **trained)
    sizes = [weights.detach().square().mean().sqrt().clamp(min=1e-3).item() for weights in trained.values()]
    groups = [{"params": [p], "lr": LEARNING_RATE * s} for p, s in zip(trained.values(), sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def rate(done: int) -> float:
        return min(1.0, (done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    per_step = max(1, min(len(x), BATCH_TOKENS // (x if memory is None else memory).shape[1]))
    variance = (wanted - wanted.mean((0, 1))).square().mean().clamp(min=1e-30)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < per_step:
            order = torch.randperm(len(x), generator=generator).tolist()
        rows, order = order[:per_step], order[per_step:]
        made = attention.layer(current, x[rows], None if memory is None else memory[rows])
        loss = (made - wanted[rows]).square().mean() / variance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return dataclasses.replace(heads, **{name: weights.detach() for name, weights in trained.items()})
