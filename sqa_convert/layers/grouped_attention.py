"""Scaled dot product attention where several query heads share a key and a value head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from ..errors import RecipeError


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    need_weights: bool = False,
    average_attn_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of Hq query heads to Hkv key/value heads; query head i reads key/value head i // (Hq / Hkv).

    Where no weights are asked for it is torch's `scaled_dot_product_attention`, so its kernels compute it.

    Args:
        query: (B, Hq, T, d).
        key: (B, Hkv, S, d), Hkv a divisor of Hq.
        value: (B, Hkv, S, e).
        attn_mask: that broadcasts to (B, Hq, T, S): bool, True where a key may be attended to, or added to the scores.
        dropout_p: share of the weights that are dropped, whether a model is in training or not, as in torch.
        is_causal: position i attends to the first i + 1 keys; without `attn_mask`.
        scale: of the scores; None: d^-0.5.
        need_weights: return the weights too, which takes B Hq T S numbers.
        average_attn_weights: their mean over the query heads.

    Returns:
        Output (B, Hq, T, e), and weights (B, Hq, T, S), or (B, T, S) averaged, after dropout; None if not asked for.

    Raises:
        RecipeError: the heads do not divide, or a mask is given beside `is_causal`.
    """
    query_heads, heads = query.shape[-3], key.shape[-3]
    if heads == 0 or query_heads % heads or value.shape[-3] != heads:
        raise RecipeError(
            f"{query_heads} query heads, {heads} key heads, {value.shape[-3]} value heads: "
            "keys and values must have as many, which divide the query heads"
        )
    if is_causal and attn_mask is not None:
        raise RecipeError("is_causal=True beside an attn_mask: give one of them")
    repeats = query_heads // heads
    if not need_weights:
        # The flash kernel of CUDA shares heads itself; with a mask torch would fall back to its slowest one.
        shares = repeats > 1 and query.is_cuda and attn_mask is None
        if not shares:
            key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
        output = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=shares
        )
        return output, None
    key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT  # (B, Hq, T, S)
    if is_causal:
        attn_mask = causal_mask(scores.shape[-2], scores.shape[-1], device=scores.device)
    if attn_mask is not None:
        masked = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        scores = masked
    weights = dropout(scores.softmax(-1), dropout_p) if dropout_p else scores.softmax(-1)
    return weights @ value, weights.mean(-3) if average_attn_weights else weights


def repeat_heads(heads: Tensor, repeats: int) -> Tensor:
    """(B, H, S, d) -> (B, H repeats, S, d), the copies of a head beside each other."""
    return heads if repeats == 1 else heads.repeat_interleave(repeats, -3)


def causal_mask(queries: int, keys: int, past: int = 0, device: torch.device | None = None) -> Tensor:
    """(T, S), True where query i, at position `past` + i, may attend to a key: to itself and those before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past)
