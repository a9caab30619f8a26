"""The source as a model that is fitted to."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import Source
from ..conversion.plan import Plan
from ..errors import CheckpointError, one_line
from ..evaluation.load import load_model
from ..progress import no_bars_of_others
from ..text.plain_generation import settle
from .lean_copy import lean_copy


def load_source(plan: Plan, source: Source, trust_remote_code: bool = False, lean: bool = False) -> Any:
    """The source as a float32 model in eval mode; of one in memory a copy.

    Args:
        plan: of a conversion of it.
        source: its weights.
        trust_remote_code: for a model that brings code along.
        lean: whether to make a copy in bfloat16 instead, where a `MemoryBudget` says so; of a folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if lean:
        return lean_copy(plan, source, trust_remote_code)
    if isinstance(source, ModelSource):
        return settle(copy.deepcopy(source.model).float().eval())
    assert source.folder is not None
    if plan.has_language_model_head:
        return load_model(source.folder, dtype="float32", trust_remote_code=trust_remote_code)
    import transformers

    architecture = getattr(transformers, plan.family.source_architecture(plan.source_config))
    try:
        with no_bars_of_others():
            return settle(architecture.from_pretrained(source.folder, dtype="float32").eval())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{source.name} cannot be loaded: {one_line(error)}") from error
