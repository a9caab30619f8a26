"""A copy of a source for where float32 is too large: linear layers in bfloat16, read one tensor at a time"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.find import read_generation_config
from ..checkpoints.source import Source
from ..conversion.convert_site import read_tensor
from ..conversion.plan import Plan
from ..errors import CheckpointError, one_line
from ..evaluation.load import load_config
from ..progress import no_bars_of_others
from ..text.plain_generation import settle
from ..text.quick_twin import RoundedLinear, multiplies_bfloat16


def lean_copy(plan: Plan, source: Source, trust_remote_code: bool = False) -> Any:
    """The source as a model in eval mode, as `quick_twin.twin_of` makes it of one in float32, which never exists.

    Norms and embeddings are in float32, linear layers in bfloat16. Raises CheckpointError.
    """
    assert source.folder is not None
    architecture = getattr(transformers, plan.family.source_architecture(plan.source_config))
    try:
        with no_bars_of_others(), init_empty_weights(include_buffers=False):
            model = architecture(load_config(source.folder, trust_remote_code))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source.name} cannot be loaded: {one_line(error)}") from error
    _fill(model, _Weights(plan, source))
    return settle(model.eval().requires_grad_(False), read_generation_config(source.folder))


class _Weights:
    """The tensors of a source by the names that the parameters of its model have."""

    def __init__(self, plan: Plan, source: Source) -> None:
        self.plan, self.source = plan, source
        self.tied = plan.family.tied(plan.source_config)
        self.shared: dict[str, nn.Parameter] = {}
        """those that stand in several places"""

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(read_tensor(self.plan, self.source, self.stored(name))).float()

    def parameter(self, name: str) -> nn.Parameter:
        stored = self.stored(name)
        if stored not in self.shared:
            parameter = nn.Parameter(self.read(name), requires_grad=False)
            if stored not in {*self.tied, *self.tied.values()}:
                return parameter
            self.shared[stored] = parameter
        return self.shared[stored]

    def stored(self, name: str) -> str:
        """The canonical name that the source has it under."""
        canonical = self.plan.family.canonical(name) or name
        known = canonical in self.plan.source_names or canonical in self.plan.zeros
        return canonical if known else self.tied.get(canonical, canonical)


def _fill(model: Any, weights: _Weights) -> None:
    """Puts weights in the place of those on the meta device, one after the other."""
    quick, head = multiplies_bfloat16(), model.get_output_embeddings()
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                where = f"{prefix}.{name}" if prefix else name
                weight = weights.read(f"{where}.weight")
                bias = None if child.bias is None else weights.parameter(f"{where}.bias")
                weight = weight.T if isinstance(child, Conv1D) else weight
                setattr(parent, name, RoundedLinear(weight, bias, child is head, quick))
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, weights.parameter(f"{prefix}.{name}" if prefix else name))
