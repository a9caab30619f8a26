"""How well a model predicts held-out text: loss, perplexity, KL divergence, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import QualityError
from ..progress import step_done
from ..text.collate import IGNORED
from ..text.suitability import misfits
from .held_out_batches import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_LOGITS = 2**25  # logits held at once


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text."""

    loss: float
    """nats a token"""
    perplexity: float
    kl: float | None = None
    """KL(source || this), nats a token"""
    top1: float | None = None
    """share of the predictions whose most likely token is the source's"""


@dataclass(frozen=True)
class Predictions:
    """All that is kept of a model's run over a text: with the logits' two factors nothing of size (N, V) is stored."""

    hidden: Tensor
    """(N, D), input of the language model head"""
    head: Tensor
    """(V, D)"""
    labels: Tensor
    """(N,)"""


def model_inputs(model: Any, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What a model is called with: only an encoder-decoder needs the labels, to make its decoder's inputs of."""
    wanted = model.config.is_encoder_decoder
    return {name: tensor.to(device) for name, tensor in batch.items() if wanted or name != "labels"}


@torch.no_grad()
def predict(model: PreTrainedModel, held_out: HeldOut, step: Callable[[], None] = step_done) -> Predictions:
    """Runs a model over held-out text. `step` is called after each batch."""
    device = held_out.device
    model.to(device).eval()
    head = model.get_output_embeddings()
    caught: list[Tensor] = []
    weight: list[Tensor] = []

    def catch(module: Any, inputs: tuple[Tensor]) -> None:
        caught.append(inputs[0])
        if not weight:  # here it is whole, also when its storage is shared out among processes
            weight.append(module.weight.detach().float().clone())

    hook = head.register_forward_pre_hook(catch)
    hidden, labels = [], []
    shift = not model.config.is_encoder_decoder
    try:
        for batch in held_out.batches:
            model(**model_inputs(model, batch, device), use_cache=False)
            states, targets = caught.pop(), batch["labels"]
            if shift:
                states, targets = states[:, :-1], targets[:, 1:]
            predicted = (targets != IGNORED).flatten().to(device)
            hidden.append(states.flatten(0, 1)[predicted].float())
            labels.append(targets.flatten().to(device)[predicted])
            step()
    finally:
        hook.remove()
    return Predictions(torch.cat(hidden), weight[0], torch.cat(labels))


@torch.no_grad()
def measure(model: Predictions, source: Predictions | None = None) -> Quality:
    """Quality of a model's predictions, against the source's when given. float32; the chunks' sums add in float64."""
    loss = kl = 0.0
    agree, count = 0, len(model.labels)
    chunk = max(1, _CHUNK_LOGITS // len(model.head))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        log_p = (model.hidden[part] @ model.head.T).log_softmax(-1)  # (n, V)
        loss -= log_p.gather(1, model.labels[part, None]).sum().item()
        if source is not None:
            log_q = (source.hidden[part] @ source.head.T).log_softmax(-1)
            kl += (log_q.exp() * (log_q - log_p)).sum().item()
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    loss /= count
    if not math.isfinite(loss + kl):
        raise QualityError("the loss is not finite: the weights overflow in their dtype; try --dtype, or --no-evaluate")
    perplexity = math.exp(min(loss, 700.0))
    if source is None:
        return Quality(loss, perplexity)
    return Quality(loss, perplexity, kl / count, agree / count)


def made_for(model: Any, held_out: HeldOut) -> bool:
    """Whether a model was made for text of this kind, by what it makes of a batch of it."""
    first = replace(held_out, batches=held_out.batches[:1])
    try:
        loss = measure(predict(model, first)).loss
    except QualityError:
        return True  # told of where it is measured
    return not misfits(first.fit(model, loss), "--data")
