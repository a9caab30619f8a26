"""How much each direction of an attention's output matters to what the model puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .find_attention import Attentions
from .run_batches import Runner


def output_sensitivity(
    runner: Runner, attentions: Attentions, batches: Sequence[Any], generator: torch.Generator
) -> dict[str, Tensor]:
    """(E, E), float64, of each attention, its mean diagonal one; none where the output does not depend on it.

    To second order the squared error that an error e of an attention's output leaves in the model's is e G e^T, with G
    the mean of g^T g over positions, g the gradient of a random projection of the model's output: the Gauss-Newton
    matrix, estimated as Hutchinson does.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Any]:
        def accumulate(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).cpu().double()
            square = rows.T @ rows
            found[name] = found[name] + square if name in found else square

        def hook(module: Any, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            made = output[0] if output[0].requires_grad else output[0].detach().requires_grad_().clone()
            made.register_hook(accumulate)
            return made, *output[1:]

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in attentions.items()]
    try:
        for batch in batches:
            outputs = [output for output in runner(batch) if output.requires_grad]
            drawn = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            if outputs:
                torch.autograd.backward(outputs, drawn)
    except RuntimeError as error:  # some models have no gradients; fits go without what they would tell
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return {}
    finally:
        for handle in hooks:
            handle.remove()
    means = {name: matrix.diagonal().mean() for name, matrix in found.items()}
    return {name: matrix / means[name] for name, matrix in found.items() if 0 < means[name] < torch.inf}
