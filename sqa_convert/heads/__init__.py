"""The mathematics: pure functions on the weights of one attention site, no files, no models.

May import: errors.
Exports: the register of methods, partitions, the layout of heads; a method is one file.
"""

from . import svd, procrustes, mean, first, select  # noqa: F401, I001 - registers the methods, the best first
from .weights import AttentionHeads
from .methods import AUTO, METHODS, Convert, Method, get_method, register_method
from .partition import VARIANTS, Partition, check_head_counts, variant_heads

__all__ = [
    "AUTO",
    "METHODS",
    "VARIANTS",
    "AttentionHeads",
    "Convert",
    "Method",
    "Partition",
    "check_head_counts",
    "get_method",
    "register_method",
    "variant_heads",
]
