"""The best shared key and value of every group in closed form, by factorising circuits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .methods import register_method
from .partition import Partition
from .weights import AttentionHeads

if TYPE_CHECKING:
    from .statistics import Statistics


@register_method(
    "svd",
    summary="factorise score forms and output maps: the best shared key and value of a group in closed form",
    source="Eckart-Young on Wq^T Wk and the summed Wv^T Wo; cf. CLOVER, arXiv 2411.17426, and A3, arXiv 2505.12942",
    needs_statistics=True,
)
def svd(heads: AttentionHeads, partition: Partition, statistics: Statistics) -> AttentionHeads:
    """One key/value head a group, such that score forms and summed output maps lose the least energy.

    A cluster's one pattern is that of its representative, the head whose pattern the others can take at the least
    cost; the output maps of the cluster's heads add. Errors are measured in the metric of the site's inputs
    (`Statistics`). Value biases move into the output bias, key biases are dropped (softmax ignores them), and where
    there is an output bias it also takes up the mean of what is lost. One Cholesky factor a group, then products of
    (t d, t d) for t heads.

    Args:
        heads: the H heads of the source.
        partition: of those H heads.
        statistics: moments of the inputs, from data or from the norms' weights.

    Returns:
        Hq query heads and Hkv key/value heads, in the dtype of the source; groups of one head verbatim.
    """
    import torch

    from .attend import query_with_bias
    from .merge_circuits import Merged, assemble, shared_factor
    from .statistics import with_ridge

    rank = heads.key.shape[1]
    query, key = query_with_bias(heads), heads.key.double()
    output = heads.output.double()
    root = torch.linalg.cholesky(with_ridge(statistics.key))
    common_root = torch.linalg.cholesky(with_ridge(statistics.value[0])) if len(statistics.value) == 1 else None
    patterns, merged = [], []
    for clusters in partition.groups:
        chosen = [statistics.representative(cluster)[0] for cluster in clusters]
        energies = [statistics.attention_energy[list(c)].sum() for c in clusters]
        weights = [e * query[h] @ statistics.query @ query[h].T for e, h in zip(energies, chosen, strict=True)]
        basis = shared_factor([key[h] for h in chosen], weights, root, rank)
        new_key = torch.linalg.solve_triangular(root, basis, upper=False, left=False)
        queries = [(key[h] @ root @ basis.T).T @ query[h] for h in chosen]

        value_root = common_root
        if value_root is None:
            value_root = torch.linalg.cholesky(with_ridge(statistics.value_metric(chosen)))
        values = [  # (t d, D) of a cluster of t heads
            torch.cat([statistics.values_for(heads, h, pattern) for h in c])
            for c, pattern in zip(clusters, chosen, strict=True)
        ]
        outputs = [output[list(c)].flatten(0, 1) for c in clusters]
        basis = shared_factor(values, [o @ o.T for o in outputs], value_root, rank)
        new_value = torch.linalg.solve_triangular(value_root, basis, upper=False, left=False)
        outputs = [(v @ value_root @ basis.T).T @ o for v, o in zip(values, outputs, strict=True)]
        merged.append(Merged(new_key, new_value, queries, outputs))
        patterns += [{h: 1.0} for h in chosen]
    return assemble(heads, partition, statistics, patterns, merged)
