"""The converted model polished, and kept so where it is nearer to the source on every kind of held-out sequence."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..conversion.build_model import build_model
from ..conversion.convert_site import ConvertedSite
from ..conversion.plan import Plan
from ..evaluation.fused_gelu import fused_gelu
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import kl_to, predict
from ..families import Site
from ..progress import Progress, silent
from .activations import Batch
from .polish import polish

USUAL = 0.02
"""share of the texts that begin with a token which is no accident"""


def polished(
    plan: Plan,
    source: Source,
    teacher: Any,
    choice: Mapping[Site, ConvertedSite],
    batches: list[Batch],
    kinds: list[HeldOut],
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """A converted model trained as a whole; kept where the KL to the source falls on every kind of held-out sequence.

    Args:
        plan: with `plan.calibration` set, and steps of polish in it.
        source: the weights that are converted.
        teacher: the same as a model, in float32 on the device to compute on.
        choice: converted attention.
        batches: to train on.
        kinds: of held-out sequences; all stand for text the result may see.
        generator: draws the batches.
        progress: called as the work goes on.

    Returns:
        The tensors of the result that were trained, by name, none where nothing is kept; and what is told of it:
        "steps", "kept", "kl" of each kind before and after.
    """
    device = kinds[0].device
    asked, settings = plan.calibration, plan.fitting_on(device.type)
    assert asked is not None
    steps = settings.polish_within(sum(batch["input_ids"].numel() for batch in batches))
    told: dict[str, Any] = {"steps": steps, "kept": False}
    if not steps:
        anyway = f"--polish-steps {asked.polish_steps} does it anyway"
        return {}, told | {"why": f"a CPU takes too long for a model of this size; {anyway}"}
    student = build_model(plan, source, choice)[0].float().to(device)
    converted = set(plan.converted_sites)
    attention = {tensor.name for tensor in plan.tensors if tensor.origin in converted}
    expected = [predict(teacher, kind) for kind in kinds]
    told["kl_before"] = [kl_to(wanted, kind, student) for wanted, kind in zip(expected, kinds, strict=True)]
    trained: Mapping[str, Tensor] = {}
    with contextlib.suppress(torch.OutOfMemoryError), fused_gelu(student, teacher):  # what was fitted stays
        trained = polish(student, teacher, batches, attention, steps, device, generator, progress)
    if not trained:
        return {}, told | {"steps": 0, "why": "there is too little memory for it"}
    student = build_model(plan, source, choice, trained=trained)[0].float()
    told["kl"] = [kl_to(wanted, kind, student) for wanted, kind in zip(expected, kinds, strict=True)]
    pairs = zip(told["kl_before"], told["kl"], strict=True)
    told["kept"] = all(b is not None and a is not None and a < b for b, a in pairs)
    return trained if told["kept"] else {}, told


def kinds_of(held_out: HeldOut, batches: list[Batch]) -> list[HeldOut]:
    """Held-out sequences that a model has written: those that begin with a usual token, and those that begin with any.

    Its documents may be like the one kind or the other.

    Args:
        held_out: sequences.
        batches: more of them, which tell what is usual.
    """
    counts = Counter(int(row[0]) for batch in batches for row in batch["input_ids"])
    usual = torch.tensor([token for token, count in counts.items() if count >= USUAL * counts.total()])
    kinds: list[list[Batch]] = [[], []]
    for batch in held_out.batches:
        begun = torch.isin(batch["input_ids"][:, 0], usual)
        for kind, rows in zip(kinds, (begun, ~begun), strict=True):
            if bool(rows.any()):
                kind.append({name: part[rows] for name, part in batch.items()})
    return [replace(held_out, batches=kind) for kind in kinds if kind]
