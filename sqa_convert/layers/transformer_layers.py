"""torch's Transformer layers with `SparseQueryAttention` in the place of their attention; all else is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .sparse_query_attention import SparseQueryAttention


class _WithFewerHeads(nn.Module):
    """One of torch's Transformer modules, which is the next base class, with its attention replaced."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *args: Any,
        q_groups: int | None = None,
        kv_groups: int | None = None,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As torch's module, and the heads kept, as `SparseQueryAttention` takes them."""
        super().__init__(d_model, nhead, *args, **kwargs)
        replace_attention(self, lambda module: fresh(module, q_groups, kv_groups, variant))


class SparseQueryTransformerEncoderLayer(_WithFewerHeads, nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with fewer heads; `nn.TransformerEncoder` takes it."""


class SparseQueryTransformerDecoderLayer(_WithFewerHeads, nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with fewer heads in both attentions; `nn.TransformerDecoder` takes it."""


class SparseQueryTransformer(_WithFewerHeads, nn.Transformer):
    """`nn.Transformer` with fewer heads in all its attentions."""

    def __init__(self, d_model: int = 512, nhead: int = 8, *args: Any, **kwargs: Any) -> None:
        """As `nn.Transformer`, and the heads kept, as `SparseQueryAttention` takes them."""
        super().__init__(d_model, nhead, *args, **kwargs)
        self._reset_parameters()


def fresh(
    module: nn.MultiheadAttention, q_groups: int | None, kv_groups: int | None, variant: str | None
) -> SparseQueryAttention:
    """A layer of a module's shapes and settings with fewer heads, its weights drawn anew. Raises RecipeError."""
    like = module.out_proj.weight
    return SparseQueryAttention(
        module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None, module.bias_k is not None,
        module.add_zero_attn, module.kdim, module.vdim, module.batch_first, like.device, like.dtype,
        q_groups=q_groups, kv_groups=kv_groups, variant=variant,
    )  # fmt: skip


def replace_attention(model: nn.Module, make: Callable[[nn.MultiheadAttention], nn.Module]) -> nn.Module:
    """Puts what `make` returns in the place of every `nn.MultiheadAttention` of a model; returns it."""
    attentions = {module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return put_modules(model, {module: make(module) for module in attentions})


def put_modules(model: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts modules in the place of others, wherever a model holds these; returns it, or what takes its own place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out what comes twice
            if child is not None and child in pairs:
                parent._modules[name] = pairs[child]
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(part, SparseQueryAttention) for part in encoder.modules()
        ):
            encoder.use_nested_tensor = False  # of the fused kernel, which knows one kind of attention
    return pairs.get(model, model)
