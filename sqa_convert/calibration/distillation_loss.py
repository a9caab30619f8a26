"""The losses of polish and uptraining, from hidden states: no array of size (B, T, V) ever exists.

A language model's head stands last and has no bias in the families we know, so the logits of a few positions at a
time are enough for the loss and for its gradient: both are computed in the forward pass, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..evaluation.instead_of_logits import instead_of_logits
from ..text.collate import IGNORED

_CHUNK_LOGITS = (2**23, 2**26)  # at a time: elsewhere, and on CUDA, where small products are slow


@dataclass(frozen=True)
class Targets:
    """What a model's predictions are compared with."""

    labels: Tensor
    """(B, T), the token each position predicts, or IGNORED"""
    hidden: Tensor | None = None
    """(B, T, D'), the teacher's hidden states before its head"""
    head: Tensor | None = None
    """(V, D'), the weight of the teacher's head"""


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, wanted: Tensor | None, teacher: Tensor | None, ce: float
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        for_hidden, for_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide) if for_head else None
        size = max(1, _CHUNK_LOGITS[device == "cuda"] // len(head))
        with torch.autocast(device, enabled=False):
            weight, wanted_weight = head.to(dtype), None if teacher is None else teacher.to(dtype)
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                states, picked = hidden[rows].to(dtype), labels[rows, None]
                counts = (picked != IGNORED).to(wide)  # (n, 1), no branch on it: a GPU would have to be waited for
                log_p = (states @ weight.T).to(wide).log_softmax(-1)  # (n, V)
                gradient = log_p.exp()
                if ce > 0:
                    picked = picked.clamp(min=0)
                    total -= ce * (counts * log_p.gather(1, picked)).sum()
                    gradient.scatter_add_(1, picked, torch.full_like(counts, -ce))
                if ce < 1:
                    assert wanted is not None and wanted_weight is not None
                    log_q = (wanted[rows].to(dtype) @ wanted_weight.T).to(wide).log_softmax(-1)
                    q = log_q.exp()
                    total += (1 - ce) * (counts * q * (log_q - log_p)).sum()
                    gradient.sub_(q, alpha=1 - ce)
                gradient = gradient.mul_(counts).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (gradient @ weight).to(grad_hidden.dtype)
                if grad_head is not None and dtype == wide:
                    grad_head.addmm_(gradient.T, states)  # no second array of its size
                elif grad_head is not None:
                    grad_head += gradient.T @ states
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale = outputs[0]
        grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None)


def distillation_loss(hidden: Tensor, head: Tensor, targets: Targets, ce: float = 0.0) -> Tensor:
    """Sum over the predicted positions of (1 - ce) KL(teacher || student) + ce * cross-entropy, in nats.

    Logits are computed in the dtype of `hidden`, or the autocast's; the rest is computed in float32 or wider.

    Args:
        hidden: (B, T, D), the student's hidden states before its head.
        head: (V, D), the weight of the student's head.
        targets: labels, and for ce < 1 the teacher's hidden states and head.
        ce: weight of the cross-entropy, 0 … 1.

    Not for torch.compile, which would unroll its chunks: wrap it in `torch.compiler.disable`.

    Source: Minitron, arXiv 2407.14679; gradients within the forward pass as in Liger Kernel, arXiv 2410.10989.
    """
    wanted = None if targets.hidden is None else targets.hidden.flatten(0, 1)
    return _DistillationLoss.apply(hidden.flatten(0, 1), head, targets.labels.flatten(), wanted, targets.head, ce)


def aligned_labels(labels: Tensor, is_encoder_decoder: bool) -> Tensor:
    """The token that each position predicts: a decoder-only model's next one, (B, T)."""
    return labels if is_encoder_decoder else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def inputs_and_labels(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a forward pass of either model, without labels, and the token that each position predicts, (B, T).

    Args:
        batch: as a collator makes it, with "labels"; on the model's device.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    encodes = model.config.is_encoder_decoder
    if encodes:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    return inputs | {"use_cache": False}, aligned_labels(labels, encodes)


@dataclass
class LossOutput(ModelOutput):
    """What a forward pass returns whose head computes the loss, and no logits."""

    loss: Tensor
    """(), summed over the predictions, in nats"""


def forward_with_loss(wrapped: Any, model: Any, inputs: dict[str, Any], targets: Targets, ce: float) -> LossOutput:
    """A forward pass that ends in `distillation_loss`.

    Args:
        wrapped: what is called: the model, or what DDP, FSDP, DeepSpeed or torch.compile made of it.
        model: the model inside of it.
        inputs: of its forward pass, without labels.
        targets: as of `distillation_loss`.
        ce: likewise.
    """
    compute = torch.compiler.disable(distillation_loss)
    with instead_of_logits(model, lambda hidden, weight: compute(hidden, weight, targets, ce)):
        return LossOutput(loss=wrapped(**inputs).logits)


def hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(B, T, D), what a model's head is given in a forward pass."""
    with instead_of_logits(model, lambda hidden, weight: hidden):
        return model(**inputs).logits
