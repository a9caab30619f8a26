"""The output projection by least squares, after any method; work on pruning calls it reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .attend import Attention
from .site_inputs import Inputs
from .weights import AttentionHeads

RIDGE = 1e-3
"""of the mean squared feature: how strongly the fit is drawn to the unrefitted projection"""

Batches = Iterable[tuple[Inputs, Tensor]]
"""inputs and wanted outputs (B, T, D); padding counts in nothing"""


@torch.no_grad()
def refit(heads: AttentionHeads, attention: Attention, batches: Batches) -> AttentionHeads:
    """Output projection, and bias where there is one, that reproduce the wanted outputs best.

    Ridge regression on what the heads read, shrunk towards the projection they have, so that few tokens do no harm and
    features that never vary keep their weights. Gram matrices of a few thousand rows add in float64.

    Args:
        heads: converted; all but their output projection and bias are kept.
        attention: how the site attends.
        batches: inputs and wanted outputs.

    Returns:
        The heads with another output projection, and bias where there is one.

    Source: least-squares reconstruction as in He et al., arXiv 1707.06168, and ZipLM, arXiv 2302.04089.
    """
    count, d, _ = heads.query.shape
    has_bias = heads.output_bias is not None
    gram: Any = 0.0
    moment: Any = 0.0
    tokens = 0
    for inputs, wanted in batches:
        read = attention.outputs(heads, *inputs.arguments)
        features = inputs.count(read.flatten(-2))  # (n, Hq d)
        made = features @ heads.output.flatten(0, 1)
        made = made if heads.output_bias is None else made + heads.output_bias
        missing = inputs.count(wanted) - made  # (n, D)
        features = _with_one(features) if has_bias else features
        gram = gram + (features.T @ features).double()
        moment = moment + (features.T @ missing).double()
        tokens += len(features)
    gram, moment = gram / tokens, moment / tokens
    penalty = torch.full_like(gram.diagonal(), RIDGE * gram.diagonal()[: count * d].mean().item() + 1e-30)
    if has_bias:
        penalty[-1] = 0  # the intercept is free
    change = torch.linalg.solve(gram + torch.diag(penalty), moment)  # (Hq d [+ 1], D)
    output = heads.output + change[: count * d].view(count, d, -1).to(heads.output)
    if heads.output_bias is None:
        return dataclasses.replace(heads, output=output)
    return dataclasses.replace(heads, output=output, output_bias=heads.output_bias + change[-1].to(heads.output))


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def output_error(heads: AttentionHeads, attention: Attention, batches: Batches) -> float:
    """Squared error of the outputs as a share of the wanted outputs' variance (with no bias slot: of their energy)."""
    lost = energy = 0.0
    total: Any = 0.0
    count = 0
    for inputs, wanted in batches:
        target = inputs.count(wanted).double()
        output = inputs.count(attention.layer(heads, *inputs.arguments))
        lost += (output.double() - target).square().sum().item()
        energy += target.square().sum().item()
        total = total + target.sum(0)
        count += len(target)
    if heads.output_bias is not None:
        energy -= total.square().sum().item() / count
    return lost / max(energy, 1e-30)
