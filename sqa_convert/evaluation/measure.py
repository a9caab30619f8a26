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
from .instead_of_logits import instead_of_logits
from .standard_errors import DocumentSums, by_position, document_numbers, standard_error
from .worst_passages import worst_passages

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
    loss_error: float | None = None
    """standard error over documents of the loss above the source's; where there is no source, of the loss"""
    kl_error: float | None = None


@dataclass(frozen=True)
class Predictions:
    """All that is kept of a model's run over a text: with the logits' two factors nothing of size (N, V) is stored."""

    hidden: Tensor
    """(N, D), input of the language model head"""
    head: Tensor
    """(V, D)"""
    labels: Tensor
    """(N,)"""
    documents: Tensor | None = None
    """(N,) number of the document that each label is of; None where that is not known"""


def model_inputs(model: Any, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What a model is called with: only an encoder-decoder needs the labels, to make its decoder's inputs of."""
    wanted = model.config.is_encoder_decoder
    return {name: tensor.to(device) for name, tensor in batch.items() if wanted or name != "labels"}


@torch.no_grad()
def predict(model: PreTrainedModel, held_out: HeldOut, step: Callable[[], None] = step_done) -> Predictions:
    """Runs a model over held-out text; its head is not computed. `step` is called after each batch."""
    device = held_out.device
    model.to(device).eval()
    caught: list[Tensor] = []
    weight: list[Tensor] = []

    def catch(states: Tensor, head: Tensor) -> Tensor:
        caught.append(states)
        if not weight:  # here it is whole, also when its storage is shared out among processes
            weight.append(head.detach().float().clone())
        return states

    hidden, labels = [], []
    documents: list[Tensor] = []
    shift = not model.config.is_encoder_decoder
    with instead_of_logits(model, catch):
        for batch in held_out.batches:
            inputs = model_inputs(model, batch, device)
            if "labels" in inputs:  # else the model computes a loss
                inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs.pop("labels"))
            model(**inputs, use_cache=False)
            states, targets = caught.pop(), batch["labels"]
            numbers = document_numbers(batch, shift, 1 + max((int(n.max()) for n in documents if len(n)), default=-1))
            if shift:
                states, targets = states[:, :-1], targets[:, 1:]
            predicted = (targets != IGNORED).flatten().to(device)
            hidden.append(states.flatten(0, 1)[predicted].float())
            labels.append(targets.flatten().to(device)[predicted])
            documents.append(numbers[predicted.cpu()])
            step()
    return Predictions(torch.cat(hidden), weight[0], torch.cat(labels), torch.cat(documents))


def measure(model: Predictions, source: Predictions | None = None) -> Quality:
    """Quality of a model's predictions, against the source's when given. float32; the chunks' sums add in float64."""
    return measured_by_document(model, source)[0]


@torch.no_grad()
def measured_by_document(
    model: Predictions, source: Predictions | None = None, source_sums: DocumentSums | None = None
) -> tuple[Quality, DocumentSums]:
    """As `measure`, with standard errors; `source_sums` is what this returned of the source."""
    loss = kl = 0.0
    agree, count = 0, len(model.labels)
    chunk = max(1, _CHUNK_LOGITS // len(model.head))
    losses, divergences = [], []
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        log_p = (model.hidden[part] @ model.head.T).log_softmax(-1)  # (n, V)
        likely = log_p.gather(1, model.labels[part, None])
        loss -= likely.sum().item()
        losses.append(-likely[:, 0].double().cpu())
        if source is not None:
            log_q = (source.hidden[part] @ source.head.T).log_softmax(-1)
            away = log_q.exp() * (log_q - log_p)
            kl += away.sum().item()
            divergences.append(away.sum(-1).double().cpu())
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    loss /= count
    if not math.isfinite(loss + kl):
        raise QualityError("the loss is not finite: the weights overflow in their dtype; try --dtype, or --no-evaluate")
    sums = _by_document(model, losses, divergences)
    perplexity = math.exp(min(loss, 700.0))
    if source is None:
        return Quality(loss, perplexity, loss_error=standard_error(sums.loss, sums.counts)), sums
    above = None if source_sums is None else standard_error(sums.loss - source_sums.loss, sums.counts)
    off = None if sums.kl is None else standard_error(sums.kl, sums.counts)
    return Quality(loss, perplexity, kl / count, agree / count, above, off), sums


def finite_quality(model: PreTrainedModel, held_out: HeldOut, source: Predictions) -> Quality | None:
    """Quality of a model on a text, against the source's predictions of it; None where it is not finite."""
    try:
        return measure(predict(model, held_out), source)
    except QualityError:
        return None


def kl_to(expected: Predictions, held_out: HeldOut, model: Any) -> float | None:
    """KL of a model to the source's predictions of a text, nats a token; None where it is not finite."""
    quality = finite_quality(model, held_out, expected)
    return None if quality is None else quality.kl


def _by_document(model: Predictions, losses: list[Tensor], divergences: list[Tensor]) -> DocumentSums:
    loss = torch.cat(losses)
    numbers = torch.zeros(len(loss), dtype=torch.long) if model.documents is None else model.documents

    def of(values: Tensor) -> Tensor:
        return torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add(0, numbers, values)

    if not divergences:
        return DocumentSums(of(torch.ones_like(loss)), of(loss))
    kl = torch.cat(divergences)
    worst = worst_passages(kl, model.labels.cpu(), numbers)
    return DocumentSums(of(torch.ones_like(loss)), of(loss), of(kl), by_position(kl, numbers), worst)


def made_for(model: Any, held_out: HeldOut) -> bool:
    """Whether a model was made for text of this kind, by what it makes of a batch of it."""
    first = replace(held_out, batches=held_out.batches[:1])
    try:
        loss = measure(predict(model, first)).loss
    except QualityError:
        return True  # told of where it is measured
    return not misfits(first.fit(model, loss), "--data")
