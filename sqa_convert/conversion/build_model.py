"""The converted model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..checkpoints.dtypes import torch_dtype
from ..checkpoints.source import Source
from ..families import Site
from ..progress import Progress, no_bars_of_others, silent
from .convert_site import SiteRecord, Sites
from .execute import convert_all
from .plan import OutputTensor, Plan
from .result_model_class import config_class, model_class

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def build_model(
    plan: Plan,
    source: Source,
    calibrated: Sites,
    progress: Progress = silent,
    trained: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[PreTrainedModel, dict[Site, SiteRecord]]:
    """The converted model in memory, in eval mode, and a record of each site; arguments as `convert_all`."""
    import torch

    stored: dict[str, Tensor] = {}

    def store(tensor: OutputTensor, pieces: Iterable[memoryview]) -> None:
        data, at = torch.empty(tensor.nbytes, dtype=torch.uint8), 0
        for piece in pieces:
            data.numpy()[at : at + len(piece)] = piece
            at += len(piece)
        stored[tensor.name] = data.view(torch_dtype(tensor.dtype)).view(tensor.shape)

    records = convert_all(plan, source, calibrated, store, progress, trained)
    tensors = {tensor.name: stored[tensor.name] for tensor in plan.tensors}  # "auto" takes the dtype of the first
    config = config_class(plan).from_dict(copy.deepcopy(plan.config))
    with no_bars_of_others():
        model = model_class(plan).from_pretrained(None, config=config, state_dict=tensors, dtype="auto")
    return model.eval(), records
