"""A user's batches run through a user's model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError, SQAError, one_line, shown

Run = Callable[[Any, Any], Any]
"""(model, batch) -> output"""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def run_plainly(model: Any, batch: Any) -> Any:
    """What a batch most likely means: a mapping is arguments by name, of which the model gets those that it takes; of a
    list or tuple, such as images and labels, it gets as many as it requires; all else is its one argument."""
    parameters = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, Mapping):
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        return model(**{name: value for name, value in batch.items() if takes_any or name in names})
    if isinstance(batch, list | tuple):
        required = sum(p.kind in _POSITIONAL and p.default is inspect.Parameter.empty for p in parameters)
        return model(*batch[: max(1, required)])
    return model(batch)


class Runner:
    """A model on its device, and how batches are given to it."""

    def __init__(self, model: nn.Module, run: Run | None, device: torch.device) -> None:
        self.model, self.device = model, device
        self._run = run or run_plainly
        self._names_run = run is not None

    def __call__(self, batch: Any, model: nn.Module | None = None) -> list[Tensor]:
        """The floating tensors of what the model, or another, makes of a batch. Raises DataError where it fails."""
        plain = dict(batch) if isinstance(batch, Mapping) else batch  # pytree does not look into all mappings
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device), plain)
        try:
            output = self._run(self.model if model is None else model, moved)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError | SQAError):
                raise
            how = "run= fails" if self._names_run else "give run=, a function of the model and a batch"
            raise DataError(
                f"calibration: the model cannot be run on a batch of {_kind(batch)}: "
                f"{type(error).__name__}: {one_line(error)}; {how}"
            ) from error
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _kind(batch: Any) -> str:
    """What a batch is, in a few words."""
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    inside = f" with tensors of shapes {shown(', '.join(map(str, shapes)))}" if shapes else ""
    return f"{type(batch).__name__}{inside}"


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, its weights frozen, without the fused kernels that pass attention by; then as it was."""
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval().requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in training.items():
            module.training = mode
        for parameter, wanted in trained.items():
            parameter.requires_grad_(wanted)
