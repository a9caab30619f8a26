"""`SparseQueryAttention`: what `nn.MultiheadAttention` does, with fewer query heads and fewer key/value heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import RecipeError
from ..flags_as_arguments import names_arguments
from ..heads import AttentionHeads, Convert, Method, Partition
from .asked_heads import asked_heads
from .decoding_cache import KeyValueCache
from .grouped_attention import grouped_attention
from .multihead_masks import Masks
from .multihead_weights import merged_heads, put_heads, why_not
from .rotary import rotate

if TYPE_CHECKING:
    from ..heads.statistics import Statistics


class SparseQueryAttention(nn.Module):
    """Attention with Hq query heads and Hkv key/value heads, each as wide as one of `num_heads` in `embed_dim`.

    It is called as `nn.MultiheadAttention` is. B batch, L queries, S keys, E `embed_dim`, H `num_heads`, d = E / H.
    What is no key, value or mask of a stranger's code stays the same; the weights are in four Linear layers, `q_proj`
    (E, Hq d), `k_proj` and `v_proj` (kdim or vdim, Hkv d) and `out_proj` (Hq d, E).

    Source: Filipek, arXiv 2510.01817.
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    """by these torch's Transformer layers see that they cannot pass it by with their fused kernel"""
    _qkv_same_embed_dim = False

    @names_arguments
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        q_groups: int | None = None,
        kv_groups: int | None = None,
        variant: str | None = None,
        rotary_base: float | None = None,
    ) -> None:
        """Those of `nn.MultiheadAttention`, in its order, and

        Args:
            embed_dim: E, a multiple of `num_heads`.
            num_heads: H, the heads there would be without groups.
            dropout: share of the attention weights that are dropped in training.
            bias: of all four projections.
            add_bias_kv: one more key and value, learned.
            add_zero_attn: one more key and value, of zeros.
            kdim: width of keys; None: E.
            vdim: width of values; None: E.
            batch_first: (B, L, E) in place of (L, B, E).
            device: of the weights.
            dtype: of the weights.
            q_groups: Hq, at most H; None: H.
            kv_groups: Hkv, a divisor of Hq; None: Hq.
            variant: instead of both, a name of `sqa_convert.VARIANTS`.
            rotary_base: 10,000 or another: queries and keys carry rotary position embeddings; None: they do not.

        Raises:
            RecipeError: the heads are not possible.
        """
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise RecipeError(f"embed_dim {embed_dim}: it must be a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.q_groups, self.kv_groups = asked_heads(num_heads, q_groups, kv_groups, variant)
        if rotary_base is not None and self.head_dim % 2:
            raise RecipeError(f"rotary_base {rotary_base}: heads of {self.head_dim} have no pairs to turn")
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.rotary_base = dropout, batch_first, rotary_base
        self.add_zero_attn = add_zero_attn
        queries, keys = self.q_groups * self.head_dim, self.kv_groups * self.head_dim
        self.q_proj = nn.Linear(embed_dim, queries, bias, device, dtype)
        self.k_proj = nn.Linear(self.kdim, keys, bias, device, dtype)
        self.v_proj = nn.Linear(self.vdim, keys, bias, device, dtype)
        self.out_proj = nn.Linear(queries, embed_dim, bias, device, dtype)
        self.bias_k: nn.Parameter | None = None
        self.bias_v: nn.Parameter | None = None
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.empty(1, 1, keys, device=device, dtype=dtype))
            self.bias_v = nn.Parameter(torch.empty(1, 1, keys, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights from the distributions that `nn.MultiheadAttention` draws its own from."""
        together = self.kdim == self.vdim == self.embed_dim  # torch then draws one matrix (3 E, E)
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            if together:
                bound = (6 / (4 * self.embed_dim)) ** 0.5
                nn.init.uniform_(linear.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(linear.weight)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    @classmethod
    @names_arguments
    def from_multihead(
        cls,
        module: nn.MultiheadAttention,
        q_groups: int | None = None,
        kv_groups: int | None = None,
        *,
        variant: str | None = None,
        method: str | Method | Convert = "svd",
        statistics: Statistics | None = None,
        partition: Partition | None = None,
    ) -> SparseQueryAttention:
        """An `nn.MultiheadAttention` with fewer heads, from its weights, and what is known of its inputs.

        Args:
            module: with H heads; it stays as it is.
            q_groups: query heads kept, Hq; None: H.
            kv_groups: key/value heads kept, Hkv; None: Hq.
            variant: instead of both, a name of `sqa_convert.VARIANTS`.
            method: a name of `sqa_convert.METHODS`, a `Method`, or a function as its `convert`.
            statistics: of its inputs, as `sqa_convert.heads.statistics.collect` makes them; None: inputs are taken as
                white. `sqa_convert.convert_modules` collects them.
            partition: which heads go together; None: it is searched for where the method needs statistics, else
                neighbours.

        Returns:
            A new layer in the module's dtype, on its device, in training where it is. At H/H it is the module's equal.

        Raises:
            RecipeError: it is no such module, the heads are not possible, or the method is not known.
        """
        if why := why_not(module):
            raise RecipeError(f"from_multihead: {why}")
        counts = asked_heads(module.num_heads, q_groups, kv_groups, variant, partition)
        return cls.with_heads(module, merged_heads(module, counts, method, statistics, partition))

    @classmethod
    def with_heads(cls, module: nn.MultiheadAttention, heads: AttentionHeads) -> SparseQueryAttention:
        """A layer in the place of a module, with its settings and these heads."""
        like = module.out_proj.weight
        layer = cls(
            module.embed_dim, module.num_heads, module.dropout, heads.output_bias is not None,
            module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            like.device, like.dtype, q_groups=len(heads.query), kv_groups=len(heads.key),
        )  # fmt: skip
        put_heads(layer, heads)
        for own, extra in ((layer.bias_k, module.bias_k), (layer.bias_v, module.bias_v)):
            if own is not None and extra is not None:
                own.data.copy_(extra)
        return layer.train(module.training).requires_grad_(like.requires_grad)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries to keys and values, as `nn.MultiheadAttention` has it.

        Args:
            query: (L, B, E), with `batch_first` (B, L, E), of one sequence (L, E).
            key: (S, B, kdim), likewise.
            value: (S, B, vdim), likewise.
            key_padding_mask: (B, S), of one sequence (S,): bool, True for padding, or added to the scores.
            need_weights: return the weights; without them torch's own kernels compute, in less time and memory.
            attn_mask: (L, S), (B Hq, L, S), or (B H, L, S) as there would be without groups; also (B, L, S): bool,
                True where nothing may be attended to, or added to the scores.
            average_attn_weights: the mean of the weights over the query heads.
            is_causal: `attn_mask` is the causal mask; here also without one.
            cache: of the positions before, to which these are added; then S counts both, and `is_causal` lets a
                position attend to them all and to what was decoded with it before.

        Returns:
            Output, shaped as `query`, and weights (B, L, S), or (B, Hq, L, S) if not averaged, without B for one
            sequence; None where they are not needed.

        Raises:
            RecipeError: a shape or a mask does not fit.
        """
        batched = self._check_shapes(query, key, value)
        if not batched:
            query, key, value = (given.unsqueeze(0 if self.batch_first else 1) for given in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        queries = self._heads(self.q_proj(query))  # (B, Hq, L, d)
        keys, values = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))  # (B, Hkv, S, d)
        past = 0 if cache is None else len(cache)
        if self.rotary_base is not None:
            queries, keys = (rotate(heads, self.rotary_base, past) for heads in (queries, keys))
        if cache is not None:
            keys, values = cache.update(keys, values)
        masks = Masks(attn_mask, key_padding_mask, is_causal)
        with_kernel = not (need_weights or self.add_zero_attn or self.bias_k is not None)
        mask, causal = masks.merged(queries, keys.shape[2], self.num_heads, past, with_kernel)
        keys, values, mask = self._extra_keys(keys, values, mask)
        output, weights = grouped_attention(
            queries, keys, values, mask, self.dropout if self.training else 0.0, causal,
            need_weights=need_weights, average_attn_weights=average_attn_weights,
        )  # fmt: skip
        output = output.permute(0, 2, 1, 3) if self.batch_first else output.permute(2, 0, 1, 3)
        output = self.out_proj(output.flatten(2))
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there are several sequences. Raises RecipeError."""
        widths = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (given, width) in widths.items():
            if given.dim() not in (2, 3) or given.dim() != query.dim() or given.shape[-1] != width:
                raise RecipeError(
                    f"{name} of shape {tuple(given.shape)}: give all three with 3 dimensions, or all with 2, "
                    f"and {name} of width {width}"
                )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            raise RecipeError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: "
                "keys and values must be as many, of as many sequences as the queries"
            )
        return query.dim() == 3

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, L, h d) or (L, B, h d) -> (B, h, L, d)"""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        return heads.permute(0, 2, 1, 3) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _extra_keys(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, Hkv, S, d) with those of `add_bias_kv` and `add_zero_attn`, which all may attend to."""
        before = keys.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            learned = (
                b.view(1, self.kv_groups, 1, -1).expand(len(keys), -1, -1, -1) for b in (self.bias_k, self.bias_v)
            )
            keys, values = (torch.cat([own, more], 2) for own, more in zip((keys, values), learned, strict=True))
        if self.add_zero_attn:
            keys, values = pad(keys, (0, 0, 0, 1)), pad(values, (0, 0, 0, 1))
        return keys, values, None if mask is None else pad(mask, (0, keys.shape[2] - before))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, q_groups={self.q_groups}, "
            f"kv_groups={self.kv_groups}, dropout={self.dropout}, batch_first={self.batch_first}"
        )
