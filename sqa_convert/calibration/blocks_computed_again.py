"""Gradients in little memory: the blocks of a model computed again on the way back, in place of all that they made"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_COPIES = 3
"""of what linear layers put out, that are kept beside it for gradients, about"""


@dataclass(frozen=True)
class KeptForGradients:
    """Bytes that are kept for the gradients of one position, about."""

    whole: float
    by_block: float
    """where blocks are computed again"""

    @classmethod
    def of(cls, model: Any) -> KeptForGradients:
        """Of a model, by the sizes of its layers."""
        blocks = _blocks(model)
        width = model.get_input_embeddings().embedding_dim
        made = [4.0 * _COPIES * sum(p.numel() for p in block.parameters()) / width for block in blocks]
        return cls(sum(made) + 1, max(made, default=0) + 4.0 * width * len(blocks) + 1)


def _blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def computed_again(model: nn.Module) -> Iterator[None]:
    """Within the block a backward pass computes each block of the model a second time. The model may be in eval mode,
    and the gradients are the same, bit for bit."""
    blocks = _blocks(model)
    before = [block.training for block in blocks]
    try:
        for block in blocks:
            # transformers looks at the block's own flag; what is inside of it stays in eval mode
            block.training = block.gradient_checkpointing = True
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            block._gradient_checkpointing_func = again
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training, block.gradient_checkpointing = training, False
            del block._gradient_checkpointing_func
