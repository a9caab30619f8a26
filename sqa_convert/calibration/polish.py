"""End-to-end training of a converted model towards its source, on calibration text: few steps at a small rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.fitting import POLISH_TOKENS
from ..progress import Progress, silent
from .activations import Batch
from .distillation_loss import Targets, forward_with_loss, hidden_states, inputs_and_labels

RATE = 3e-3
"""of each array of converted attention, in units of its root mean square"""
REST = 0.1
"""of that rate for the other arrays of the blocks"""
WARM_UP = 10
"""steps"""
MEMORY = 4e9
"""bytes of gradients, moments and a second copy of what is trained, at most, on a CPU"""
KEPT = 1e9
"""bytes of what the source makes of the text, at most, that are not computed again"""

_PIECES = 4  # of a batch, each of sequences of one length
_LEAST_RMS = 1e-3  # of an array whose numbers are all but zero
_COPIES = 16  # bytes for a number that is trained: itself, its gradient, two moments


def trainable(model: Any, attention: AbstractSet[str], device: torch.device) -> dict[str, nn.Parameter]:
    """The arrays of a converted model that are trained: converted attention and, where memory allows, all else in its
    blocks. Embeddings and the head stay the source's, and so do key biases, which softmax ignores.

    Args:
        attention: names of the converted arrays.

    Returns:
        Arrays by name; none where memory does not allow it.
    """
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside.add(id(model.get_output_embeddings().weight))
    inside = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name in attention or id(parameter) not in outside) and not name.endswith("k_proj.bias")
    }
    free = _free_on_gpu(device) / 2 if device.type == "cuda" else MEMORY
    for chosen in (inside, {name: parameter for name, parameter in inside.items() if name in attention}):
        if sum(parameter.numel() for parameter in chosen.values()) * _COPIES <= free:
            return chosen
    return {}


def _free_on_gpu(device: torch.device) -> int:
    """Bytes, with those that torch holds and does not use."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def polish(
    student: Any,
    teacher: Any,
    batches: Sequence[Batch],
    attention: AbstractSet[str],
    steps: int,
    device: torch.device,
    generator: torch.Generator,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Adam on KL(teacher || student) at every prediction, cosine to zero.

    Rates are relative to each array's size: a rate that suits one model's weights tears another's. They are small:
    larger ones lower the KL on calibration text further and raise it on the model's true documents.

    Args:
        student: the converted model in float32; it is trained in place.
        teacher: its source, likewise.
        batches: calibration text.
        attention: names of the arrays of converted attention.
        steps: of about `POLISH_TOKENS` positions.
        device: of both models.
        generator: draws the batches.

    Returns:
        The arrays that were trained, by name, on the CPU; none where memory does not allow it.

    Source: distillation on the source's predictions as in Minitron, arXiv 2407.14679; a smaller rate for what was not
    converted as in RADLADS, arXiv 2505.03005.
    """
    student.requires_grad_(False)
    trained = trainable(student, attention, device)
    if not trained:
        return {}
    groups = [
        {"params": [p.requires_grad_()], "lr": RATE * (1.0 if name in attention else REST) * _size(p)}
        for name, p in trained.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))

    def rate(done: int) -> float:
        return min(1.0, (done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    taught = _Taught(teacher, batches, device)
    pieces = _pieces(batches, generator)
    for step in range(steps):
        progress("polish", step, steps)
        some = [taught(*piece) for piece in next(pieces)]
        count = sum(int((targets.labels >= 0).sum()) for _, targets in some)
        for inputs, targets in some:
            (forward_with_loss(student, student, inputs, targets, 0.0).loss / max(count, 1)).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    progress("polish", steps, steps)
    student.requires_grad_(False)
    return {name: parameter.detach().cpu() for name, parameter in trained.items()}


def _size(weights: Tensor) -> float:
    """Root mean square, which rates are relative to."""
    return max(weights.detach().square().mean().sqrt().item(), _LEAST_RMS)


class _Taught:
    """Sequences of calibration text with what the source makes of them, which is computed once where it can be kept."""

    def __init__(self, teacher: Any, batches: Sequence[Batch], device: torch.device) -> None:
        self.teacher, self.batches, self.device = teacher, batches, device
        self.head = teacher.get_output_embeddings().weight
        positions = sum(batch.get("labels", batch["input_ids"]).numel() for batch in batches)
        self.keeps = positions * self.head.shape[1] * 4 <= KEPT
        self.known: dict[int, Tensor] = {}

    def __call__(self, number: int, rows: Tensor) -> tuple[dict[str, Any], Targets]:
        """Inputs and targets of some sequences of a batch."""
        inputs, labels = self._inputs(number, rows)
        if not self.keeps:
            return inputs, Targets(labels, self._states(inputs), self.head)
        if number not in self.known:
            self.known[number] = self._states(self._inputs(number)[0]).cpu()
        return inputs, Targets(labels, self.known[number][rows].to(self.device), self.head)

    def _inputs(self, number: int, rows: Tensor | slice = slice(None)) -> tuple[dict[str, Any], Tensor]:
        batch = {name: part[rows].to(self.device) for name, part in self.batches[number].items()}
        return inputs_and_labels(self.teacher, batch)

    @torch.no_grad()
    def _states(self, inputs: dict[str, Any]) -> Tensor:
        return hidden_states(self.teacher, inputs)


def _pieces(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[list[tuple[int, Tensor]]]:
    """All sequences in pieces of one length, a batch's number and rows, some pieces at a time, in another order each
    time round; without end."""
    while True:
        pieces: list[tuple[int, Tensor, int]] = []
        for number, batch in enumerate(batches):
            length = max(part.shape[1] for part in batch.values())
            order = torch.randperm(len(batch["input_ids"]), generator=generator)
            for rows in order.split(max(1, POLISH_TOKENS // _PIECES // length)):
                pieces.append((number, rows, len(rows) * length))
        step: list[tuple[int, Tensor]] = []
        room = POLISH_TOKENS
        for number, rows, positions in (pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()):
            step.append((number, rows))
            room -= positions
            if room <= 0:
                yield step
                step, room = [], POLISH_TOKENS
        if step:
            yield step
