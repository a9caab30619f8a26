"""`load_modules`: weights of a converted model put back into the model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..caller_settings import undisturbed
from ..errors import CheckpointError, one_line, shown
from ..layers.sparse_query_attention import SparseQueryAttention
from ..layers.transformer_layers import put_modules
from .find_attention import bare


@undisturbed
def load_modules(model: nn.Module, state: Mapping[str, Tensor] | str | Path) -> nn.Module:
    """Gives a model the converted attentions that a `state_dict` holds, and loads it.

    Args:
        model: built as the one that was converted was, with `nn.MultiheadAttention`; it is changed.
        state: the `state_dict()` of `convert_modules(…).model`, or a file of it: .safetensors, or written by
            `torch.save`.

    Returns:
        The model, or what takes its place where it is an `nn.MultiheadAttention` itself.

    Raises:
        CheckpointError: the file cannot be read, or it is of another model, which then stays as it is.
    """
    inside = bare(model)
    tensors = _tensors(state)
    pairs: dict[nn.Module, nn.Module] = {}
    for name, module in inside.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention) and f"{prefix}q_proj.weight" in tensors:
            pairs[module] = _layer(prefix, module, tensors)
    result = put_modules(inside, pairs)
    try:
        _check_shapes(result, tensors)
        result.load_state_dict(tensors)
    except RuntimeError as error:
        put_modules(result, {layer: module for module, layer in pairs.items()})
        raise CheckpointError(f"state: the weights are of another model: {one_line(error)}") from error
    return result


def _tensors(state: Any) -> Mapping[str, Any]:
    """Raises CheckpointError."""
    if isinstance(state, str | Path):
        return _read(Path(state).expanduser())
    if isinstance(state, Mapping):
        return state
    raise CheckpointError(f"state is a {shown(type(state).__name__)}: give a state_dict, or a file of one")


def _check_shapes(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Raises RuntimeError before a weight is changed where `load_state_dict` would while it changes them."""
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in own.items():
        if name not in tensors:
            raise RuntimeError(f"there is no {name}")
        if getattr(tensors[name], "shape", None) != tensor.shape:
            raise RuntimeError(f"{name} is not of shape {tuple(tensor.shape)}")
    if more := next((name for name in tensors if name not in own and not name.endswith("_extra_state")), None):
        raise RuntimeError(f"it has no {shown(more)}")


def _layer(prefix: str, module: nn.MultiheadAttention, tensors: Mapping[str, Tensor]) -> SparseQueryAttention:
    """A layer of the shapes that are stored. Raises CheckpointError."""
    like, d = module.out_proj.weight, module.head_dim
    try:
        rows = [tensors[f"{prefix}{part}.weight"].shape[0] for part in ("q_proj", "k_proj")]
        layer = SparseQueryAttention(
            module.embed_dim, module.num_heads, module.dropout, f"{prefix}q_proj.bias" in tensors,
            module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            like.device, like.dtype, q_groups=rows[0] // d, kv_groups=rows[1] // d,
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(f"state: {prefix}q_proj and what is beside it are of another model") from error
    return layer.train(module.training)


def _read(path: Path) -> dict[str, Any]:
    """Raises CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any library that reads it
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds a {type(held).__name__}: it must be a state_dict")
    return dict(held)
