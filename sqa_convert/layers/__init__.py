"""Layers for any torch model: attention with fewer heads in the place of `nn.MultiheadAttention`. Needs torch alone.

May import: heads, flags_as_arguments, errors.
Exports: the attention function, SparseQueryAttention, its cache, and torch's Transformer layers with it.
"""

from .decoding_cache import KeyValueCache
from .grouped_attention import grouped_attention
from .sparse_query_attention import SparseQueryAttention
from .transformer_layers import (
    SparseQueryTransformer,
    SparseQueryTransformerDecoderLayer,
    SparseQueryTransformerEncoderLayer,
)

__all__ = [
    "KeyValueCache",
    "SparseQueryAttention",
    "SparseQueryTransformer",
    "SparseQueryTransformerDecoderLayer",
    "SparseQueryTransformerEncoderLayer",
    "grouped_attention",
]
