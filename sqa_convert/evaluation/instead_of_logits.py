"""A language model's head that is replaced while the model runs: what it was given, or a loss, in place of logits"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def instead_of_logits(model: Any, compute: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the block the model returns, under the name `logits`, what `compute` makes of hidden states and the head.

    That happens inside of the model's forward pass, where DDP, FSDP and DeepSpeed expect its parameters to be used.

    Args:
        compute: is given the hidden states (B, T, D) and the head's weight (V, D).
    """
    head = model.get_output_embeddings()
    own = vars(head).get("forward")  # where accelerate has put a hook around it
    head.forward = lambda hidden: compute(hidden, head.weight)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
