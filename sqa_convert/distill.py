"""The losses of uptraining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all positions of KL(teacher || student), in nats; logits (..., V), computed in float32.

    Source: Minitron, arXiv 2407.14679.
    """
    log_p = student.float().log_softmax(-1).flatten(0, -2)
    log_q = teacher.float().log_softmax(-1).flatten(0, -2)
    return nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the divergence from a frozen teacher; without teacher it is the model's own."""

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        if teacher is not None:
            self.model_accepts_loss_kwargs = False  # our loss is a mean over the micro-batch: divide by the steps

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        loss = kl_divergence(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss
