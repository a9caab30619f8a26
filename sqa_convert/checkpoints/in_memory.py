"""A model in memory as a source, taken out of what runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .dtypes import tensor_bytes
from .source import IN_MEMORY, Source, cut, described, indexed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelSource(Source):
    """A model in memory."""

    def __init__(self, model: Any) -> None:
        self.model = model = unwrapped(model)
        self.name = model.config.name_or_path or type(model).__name__
        own, known = type(model).__name__, _known_class(model)
        self.config = model.config.to_dict() | {"architectures": [known]}
        if own != known:
            self.notes = (f"{own} is none of transformers' classes: taken for the {known} that it is derived from",)
        self.generation_config = getattr(model, "generation_config", None)
        self._tensors = model.state_dict()
        # Who moves a model to another dtype leaves its config as it was.
        self.config["dtype"] = str(model.dtype).removeprefix("torch.")
        self.twins = twins = dict[str, str]()
        self.index = indexed(described(self._tensors, IN_MEMORY, self.name, twins), self.name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        yield from cut(tensor_bytes(self._tensors[name].detach().cpu()))


def _known_class(model: PreTrainedModel) -> str:
    """The class of transformers that a model's is derived from; its own where that is none of them."""
    classes = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    return next((name for name in classes if not name.endswith("PreTrainedModel")), type(model).__name__)


def unwrapped(model: Any) -> PreTrainedModel:
    """A model of transformers without what was put around it to run it: `torch.compile`, `DataParallel` and the like.

    Raises:
        UnsupportedModelError: it is none, or its weights are not all here as they are used.
    """
    import torch
    from transformers import PreTrainedModel

    class_name, way_out = type(model).__name__, "save it, and give the folder"
    while isinstance(model, torch.nn.Module):
        class_name = type(model).__name__
        if class_name.startswith(("FullyShardedDataParallel", "FSDP")):
            raise UnsupportedModelError(f"{class_name}: the model's weights are shared out among processes; {way_out}")
        if class_name.startswith("Peft") or getattr(model, "_hf_peft_config_loaded", False):
            raise UnsupportedModelError(
                f"{class_name}: the model has an adapter; merge it first, with the merge_and_unload() of peft's model"
            )
        inside = model._modules.get("_orig_mod", model._modules.get("module"))  # attributes would be passed on to it
        if inside is None:
            break
        model = inside
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{class_name} is no model of transformers; give one, a folder or a hub id")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UnsupportedModelError(f"{class_name}: {name} is not in memory; load the model without offloading")
        if hasattr(tensor, "to_local"):
            raise UnsupportedModelError(f"{class_name}: {name} is shared out among processes; {way_out}")
    return model
