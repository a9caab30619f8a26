"""The weights of `nn.MultiheadAttention` as heads, and heads as the weights of `SparseQueryAttention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError, shown
from ..heads import AttentionHeads, Convert, Method, Partition, get_method
from ..heads.attend import Attention
from ..heads.search import search
from ..heads.statistics import Statistics, from_norms

if TYPE_CHECKING:
    from .sparse_query_attention import SparseQueryAttention


@torch.no_grad()
def heads_of(module: nn.MultiheadAttention) -> AttentionHeads:
    """The heads of a module, float32 on the CPU. Keys and values may be of other widths than queries."""
    d = module.head_dim
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    query, key, value = (_plain(weight).unflatten(0, (-1, d)) for weight in weights)
    query_bias, key_bias, value_bias = (None if bias is None else _plain(bias).view(-1, d) for bias in biases)
    output = _plain(module.out_proj.weight).T.unflatten(0, (-1, d))  # of a Linear (E, H d)
    output_bias = None if module.out_proj.bias is None else _plain(module.out_proj.bias)
    return AttentionHeads(query, key, value, output, query_bias, key_bias, value_bias, output_bias)


def attention_of(module: nn.MultiheadAttention, causal: bool = False) -> Attention:
    """How a module attends, its masks apart."""
    return Attention(module.head_dim**-0.5, causal)


@torch.no_grad()
def put_heads(layer: SparseQueryAttention, heads: AttentionHeads) -> None:
    """Sets a layer's projections."""
    for linear, weight, bias in (
        (layer.q_proj, heads.query.flatten(0, 1), heads.query_bias),
        (layer.k_proj, heads.key.flatten(0, 1), heads.key_bias),
        (layer.v_proj, heads.value.flatten(0, 1), heads.value_bias),
        (layer.out_proj, heads.output.flatten(0, 1).T, heads.output_bias),
    ):
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias.flatten())


def merged_heads(
    module: nn.MultiheadAttention,
    counts: tuple[int, int],
    method: str | Method | Convert,
    statistics: Statistics | None,
    partition: Partition | None,
) -> AttentionHeads:
    """The heads of a module, fewer of them; arguments as those of `SparseQueryAttention.from_multihead`."""
    chosen, heads, count = get_method(method), heads_of(module), module.num_heads
    if counts == (count, count):
        return heads
    if why := extra_keys(module):
        raise RecipeError(f"from_multihead: a module with {why} keeps all its heads: no one key is right for several")
    statistics = statistics or white(heads)
    if partition is None and chosen.needs_statistics:
        partition = search(heads, statistics, *counts, torch.Generator().manual_seed(0))
    return chosen.merged(heads, partition or Partition.contiguous(count, *counts), statistics)


def white(heads: AttentionHeads) -> Statistics:
    """Statistics of a site of whose inputs nothing is known."""
    norms = ((torch.ones(weights.shape[-1]), None) for weights in (heads.query, heads.key, heads.value))
    return from_norms(heads, Attention(heads.query.shape[1] ** -0.5, False), *norms)


def why_not(module: Any) -> str:
    """Why a module is none whose heads can be read, or nothing."""
    if not isinstance(module, nn.MultiheadAttention):
        return f"give an nn.MultiheadAttention, not {shown(type(module).__name__)}"
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{shown(type(module).__name__)} computes attention in a way of its own"
    return ""


def extra_keys(module: nn.MultiheadAttention) -> str:
    """The setting by which a module has a key that comes from no input, or nothing."""
    if module.bias_k is not None:
        return "add_bias_kv=True"
    return "add_zero_attn=True" if module.add_zero_attn else ""


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
