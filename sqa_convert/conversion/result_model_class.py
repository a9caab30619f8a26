"""The config and the model class of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError, one_line
from ..families import Site
from .plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_loads(plan: Plan) -> None:
    """Checks that the result's config is accepted, and its model calls for the planned shapes. Builds no weights.

    Raises:
        CheckpointError: it is not, or does not, because of what the source's config.json holds.
    """
    import torch

    try:
        config = config_class(plan).from_dict(plan.config)
        if config.dtype is not None and not config.dtype.is_floating_point:
            raise ValueError(f"weights of {config.dtype}")
        with torch.device("meta"):
            model = model_class(plan)(config)
    except Exception as error:  # validation, look-ups of activations and dtypes: each fails in its own way
        raise CheckpointError(f"config.json is not accepted by the model class: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "" if model.base_model_prefix in dict(model.named_children()) else f"{model.base_model_prefix}."
    for tensor in plan.tensors:
        shape = expected.get(tensor.name, expected.get(tensor.name.removeprefix(prefix)))
        if shape != tensor.shape and (shape is not None or isinstance(tensor.origin, Site)):
            raise CheckpointError(f"{tensor.name} has shape {tensor.shape}, the model class calls for {shape}")


def config_class(plan: Plan) -> type[PreTrainedConfig]:
    from .. import models

    return getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2])


def model_class(plan: Plan) -> type[PreTrainedModel]:
    from .. import models

    return getattr(models, plan.config["architectures"][0])
