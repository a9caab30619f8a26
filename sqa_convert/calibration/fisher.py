"""How much each direction of a site's output matters to what the model predicts or puts out: Fisher matrices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.measure import model_inputs
from ..families import Site
from ..progress import Progress, silent
from ..text.self_generated import draw
from .activations import Batch, module_at, positions
from .blocks_computed_again import KeptForGradients, computed_again
from .distillation_loss import hidden_states, inputs_and_labels

SENSITIVITY_TOKENS = 16_384
"""predictions whose gradients are looked at"""

_LOGITS = 2**26  # of the sequences that run at once
_CHUNK_LOGITS = 2**24  # held at once


def _rows(batch: Batch, vocabulary: int, share: float, most: float) -> Iterator[Batch]:
    """A share of a batch, some sequences at a time, of at most so many positions; one at least."""
    ids = batch.get("labels", batch["input_ids"])
    size = int(max(1, min(_LOGITS // (ids.shape[1] * vocabulary), most / _length(batch))))
    count = math.ceil(share * len(ids))
    for start in range(0, count, size):
        size = min(size, count - start)
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def _length(batch: Batch) -> int:
    """Positions of the longest sequence, of what a model reads or answers."""
    return max(tensor.shape[1] for tensor in batch.values())


def sensitivity(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    device: torch.device,
    generator: torch.Generator,
    progress: Progress = silent,
    memory: float = math.inf,
) -> dict[Site, Tensor]:
    """How much each direction of a site's output matters to the model's predictions: (D, D), float64, a Fisher matrix.

    To second order the KL divergence that an error e of a site's output causes is e F e^T / 2, with F the mean of g^T
    g over positions, g the gradient of the log-likelihood of tokens drawn from the model's own prediction. Of a model
    without a language model head g is the gradient of a random projection of what it puts out, and e F e^T the squared
    error of that.

    Where what is kept for gradients is more than `memory` bytes, blocks are computed again on the way back.

    Source: Fisher information as in K-FAC, Martens and Grosse, arXiv 1503.05671.
    """
    found: dict[Site, Tensor] = {}

    def watch(site: Site) -> Callable[..., None]:
        def accumulate(gradient: Tensor) -> None:
            rows = gradient.flatten(0, 1)
            square = (rows.T @ rows).cpu().double()
            if site in found:
                found[site] += square
            else:
                found[site] = square

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output[0].register_hook(accumulate)

        return hook

    hooks = [module_at(model, site.prefix).register_forward_hook(watch(site)) for site in sites]
    # Weights are frozen, so that gradients flow to activations alone; they start at the embeddings.
    width = model.get_input_embeddings().embedding_dim
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    hooks += [module.register_forward_hook(lambda m, args, output: output.requires_grad_()) for module in embeddings]
    tokens = 0
    kept = KeptForGradients.of(model)
    most = memory / kept.by_block  # positions that run at a time
    try:
        share = min(1.0, SENSITIVITY_TOKENS / sum(b.get("labels", b["input_ids"]).numel() for b in batches))
        predicts = model.get_output_embeddings() is not None
        backward = _through_predictions if predicts else _through_states
        for row in (row for batch in batches for row in _rows(batch, model.config.vocab_size, share, most)):
            progress("measure sensitivity", min(tokens, SENSITIVITY_TOKENS), SENSITIVITY_TOKENS)
            too_much = kept.whole * _length(row) * len(row["input_ids"]) > memory
            with computed_again(model) if too_much else contextlib.nullcontext():
                tokens += backward(model, row, device, generator)
    finally:
        for handle in hooks:
            handle.remove()
    progress("measure sensitivity", SENSITIVITY_TOKENS, SENSITIVITY_TOKENS)
    for matrix in found.values():  # in place: of a large model they take a gigabyte
        matrix /= matrix.diagonal().mean().clamp(min=1e-30)
    return found


def _through_predictions(model: Any, batch: Batch, device: torch.device, generator: torch.Generator) -> int:
    """From tokens drawn from each prediction; how many there are. Logits are computed for some positions at a time."""
    labels = batch.get("labels", batch["input_ids"])
    inputs, _ = inputs_and_labels(model, {name: part.to(device) for name, part in (batch | {"labels": labels}).items()})
    read, states = positions(model, batch)["decoder"], hidden_states(model, inputs)  # (B, T, D)
    states = states.flatten(0, 1) if read is None else states[read.to(device)]  # (n, D)
    head, below = model.get_output_embeddings(), states.detach().requires_grad_()
    for part in below.split(max(1, _CHUNK_LOGITS // model.config.vocab_size)):
        logits = head(part)  # (n, V)
        drawn = draw(logits.detach(), generator).to(device)
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    states.backward(below.grad)
    return len(states)


def _through_states(model: Any, batch: Batch, device: torch.device, generator: torch.Generator) -> int:
    """From a random projection of the first thing that a model puts out; of how many positions."""
    states = model(**model_inputs(model, batch, device), use_cache=False)[0]
    drawn = torch.randn(states.shape, generator=generator).to(states)
    for read in positions(model, batch).values():
        if read is not None and read.shape == states.shape[:2]:
            drawn = drawn * read.to(drawn)[..., None]
            break
    states.backward(drawn)
    return states.shape[0] * states.shape[1]
