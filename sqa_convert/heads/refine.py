"""Layer-wise training of one attention site to reproduce the source's outputs: no labels, nothing but this site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..progress import step_done
from .attend import Attention
from .site_inputs import Inputs
from .weights import AttentionHeads

LEARNING_RATE = 3e-2
"""of each array, in units of its root mean square"""
BATCH_TOKENS = 4096
"""positions a step, of the longer side"""
PIECES = 4
"""of a batch, each of sequences of one length"""
WARM_UP = 10
"""steps"""

Part = tuple[Inputs, Tensor]
"""inputs of sequences of one length, and wanted outputs (N, T, D)"""

_TRAINED = ("query", "key", "value", "output", "query_bias", "output_bias", "position_bias")


def refine(
    heads: AttentionHeads,
    attention: Attention,
    parts: Sequence[Part],
    steps: int,
    generator: torch.Generator,
    bfloat16: bool = False,
) -> AttentionHeads:
    """Adam on all weights of a converted site, cosine to zero, on the squared error of its output.

    Biases of keys and values stay: softmax ignores the first, and the output bias can hold the second.

    Args:
        heads: converted.
        attention: how the site attends.
        parts: inputs of sequences of one length each, and wanted outputs (N, T, D); padding counts in nothing.
        steps: of about `BATCH_TOKENS` positions.
        generator: draws the batches.
        bfloat16: whether to multiply in it, weights and their steps in float32 all the same.

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
    batches = _shuffled(parts, generator)
    energy = _variation(parts) / len(batches)  # of an average batch
    for step in range(steps):
        step_done(step / steps)
        optimizer.zero_grad(set_to_none=True)
        for part, rows in batches.pop():
            inputs, wanted = parts[part][0][rows], parts[part][1][rows]
            with torch.autocast(wanted.device.type, torch.bfloat16, enabled=bfloat16):
                made = attention.layer(current, *inputs.arguments)
            missing = made - wanted
            (inputs.count(missing).square().sum() / energy).backward()
        optimizer.step()
        schedule.step()
        batches = batches or _shuffled(parts, generator)
    return dataclasses.replace(heads, **{name: weights.detach() for name, weights in trained.items()})


def _variation(parts: Sequence[Part]) -> float:
    """Sum of the squares of the wanted outputs about their mean."""
    targets = [inputs.count(wanted) for inputs, wanted in parts]
    mean = torch.cat([target.sum(0, keepdim=True) for target in targets]).sum(0) / sum(map(len, targets))
    return max(sum((target - mean).square().sum().item() for target in targets), 1e-30)


def _shuffled(parts: Sequence[Part], generator: torch.Generator) -> list[list[tuple[int, list[int]]]]:
    """All sequences once, in batches of `BATCH_TOKENS` positions: pieces of one length, the part's number and rows."""
    pieces: list[tuple[int, list[int]]] = []
    for number, (inputs, _) in enumerate(parts):
        order = torch.randperm(len(inputs), generator=generator)
        size = max(1, BATCH_TOKENS // PIECES // inputs.length)
        pieces += [(number, rows.tolist()) for rows in order.split(size)]
    batches: list[list[tuple[int, list[int]]]] = []
    room = 0
    for piece in (pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()):
        positions = len(piece[1]) * parts[piece[0]][0].length
        if room <= 0:
            batches.append([])
            room = BATCH_TOKENS
        batches[-1].append(piece)
        room -= positions
    return batches
