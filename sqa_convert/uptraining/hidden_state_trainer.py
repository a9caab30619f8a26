"""The Trainer of models without a language model head: towards the source's last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..evaluation.hidden_states import last_hidden_states, nearness
from ..text.collate import IGNORED
from . import processes
from .trainer import UptrainingTrainer

EXAMPLES = 16
"""sequences that tell how much hidden states vary"""

_NO_NEARER = 1.0
"""error of the mean vector in the place of every hidden state"""


class HiddenStateTrainer(UptrainingTrainer):
    """Trains towards a frozen teacher's last hidden state; `evaluate` measures how near it is on held-out text.

    The loss is the squared error over the positions that are read, as a share of the variance of what the teacher puts
    out: of one reading of the first texts, so that it is the same number for every batch.
    """

    def __init__(self, *args: Any, example: dict[str, Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inputs, read = _read({name: tensor.to(self.args.device) for name, tensor in example.items()})
        with torch.no_grad():
            states = self.teacher(**inputs).last_hidden_state[read].float()
        self.energy = (states - states.mean(0)).square().sum(-1).mean()
        """of a position"""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, scaled so that those of a step add up to the mean over all its positions."""
        inputs, read = _read(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**inputs).last_hidden_state
        found = model(**inputs).last_hidden_state
        lost = (found[read].float() - wanted[read].float()).square().sum()
        count = read.sum() if num_items_in_batch is None else num_items_in_batch
        loss = lost / (self.energy * count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, ModelOutput(loss=loss)) if return_outputs else loss

    def measured(self) -> dict[str, float]:
        assert self.held_out is not None and self.expected is not None
        self.model.eval()
        states = last_hidden_states(self.model, self.held_out)
        with processes.together():
            near = nearness(states, self.expected, self.held_out)
        assert near.error is not None and near.cosine is not None
        return {"error": near.error, "cosine": near.cosine}

    def told(self, metrics: Mapping[str, float]) -> list[str]:
        return [f"error {metrics['error']:.3%}", f"cosine {metrics['cosine']:.4f}"]

    def astray(self, start: Mapping[str, float], later: list[dict[str, float]]) -> str:
        last, best = later[-1]["error"], min(point["error"] for point in later)
        if last <= max(_NO_NEARER, 2 * start["error"]) or best <= start["error"]:
            return ""
        return f"held-out error {start['error']:.2%} at the start, {last:.2%}"


def _read(batch: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a forward pass, and which positions are read, (B, T)."""
    inputs: dict[str, Any] = dict(batch)
    read = inputs.pop("labels") != IGNORED
    if "position_ids" in inputs:
        inputs["use_cache"] = False
    return inputs, read
