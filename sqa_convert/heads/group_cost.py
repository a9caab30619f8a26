"""What heads lose when they share a key and a value: the cost of a group, exactly and estimated from pairs.

The cost of a group is the energy lost to its shared key, to its shared value, and to the patterns its heads give up,
all three in the unit of the output's energy.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import combinations, islice

import torch

from .attend import query_with_bias
from .cheapest_sets import Cost, Group, Groups, arrange, even_partitions
from .statistics import Statistics, with_ridge
from .weights import AttentionHeads

MOST_SPLITS = 12  # of one group into clusters, that are compared by their whole cost; more are compared by patterns


class CircuitGrams:
    """Products of the circuits of every two heads of a site, which all costs are made of: each (H, H, d, d)."""

    def __init__(self, heads: AttentionHeads, statistics: Statistics) -> None:
        self.statistics = statistics
        self.d = heads.key.shape[1]
        query = query_with_bias(heads)
        weight_root = _psd_root(query @ statistics.query @ query.mT)  # (H, d, d)
        key = weight_root.mT @ heads.key.double() @ torch.linalg.cholesky(with_ridge(statistics.key))
        self.key = _gram(key)
        metric = with_ridge(statistics.value.mean(0))
        self.value = _gram(heads.value.double() @ torch.linalg.cholesky(metric))
        self.output = _gram(heads.output.double())
        self._roots: dict[Group, torch.Tensor] = {}
        self._representatives: dict[Group, tuple[int, float]] = {}

    def root(self, cluster: Group) -> torch.Tensor:
        """A root of the Gram matrix of a cluster's output projections."""
        if cluster not in self._roots:
            self._roots[cluster] = _psd_root(_blocks(self.output, cluster))
        return self._roots[cluster]

    def representative(self, cluster: Group) -> tuple[int, float]:
        """As of the statistics."""
        if cluster not in self._representatives:
            self._representatives[cluster] = self.statistics.representative(cluster)
        return self._representatives[cluster]

    @cached_property
    def pair_losses(self) -> tuple[list[list[float]], list[list[float]]]:
        """Energy that every two heads lose to a shared key, and to a shared value: (H, H) each."""
        count = len(self.key)
        rows, columns = torch.triu_indices(count, count, 1)
        energy = self.statistics.attention_energy.sqrt()
        roots = _psd_root(torch.stack([self.output[h, h] for h in range(count)]))
        key = self.key * (energy[:, None] * energy)[..., None, None]
        value = roots.mT[:, None] @ self.value @ roots[None]
        return _pair_losses(key, rows, columns), _pair_losses(value, rows, columns)


class GroupCost:
    """Energy lost by a group of heads that share a key and a value, in its best split into clusters."""

    def __init__(
        self, grams: CircuitGrams, clusters: int, generator: torch.Generator, most_compared: int = MOST_SPLITS
    ) -> None:
        self.grams, self.clusters, self.most_compared = grams, clusters, most_compared
        self.generator = generator
        self.statistics = grams.statistics
        self.d = grams.d
        self._known: dict[Group, tuple[float, Groups]] = {}  # no functools.cache: its cycle would outlive the site

    def __call__(self, group: Group) -> float:
        return self._cheapest(group)[0]

    def split(self, group: Group) -> Groups:
        return self._cheapest(group)[1]

    def _cheapest(self, group: Group) -> tuple[float, Groups]:
        if group not in self._known:
            splits = _splits(group, self.clusters, self.pattern_cost, self.generator)
            if len(splits) > self.most_compared:
                splits.sort(key=lambda split: sum(map(self.pattern_cost, split)))
            self._known[group] = min((self.cost(split), split) for split in splits[: self.most_compared])
        return self._known[group]

    def pattern_cost(self, cluster: Group) -> float:
        return self.grams.representative(cluster)[1]

    def cost(self, clusters: Groups) -> float:
        """Energy lost by one split: to the shared key, the shared value, and the patterns that heads give up."""
        if len(clusters) == 1 and len(clusters[0]) == 1:
            return 0.0
        chosen, lost = zip(*map(self.grams.representative, clusters), strict=True)
        scale = torch.stack([self.statistics.attention_energy[list(c)].sum().sqrt() for c in clusters])
        scale = scale.repeat_interleave(self.d)
        key = _blocks(self.grams.key, chosen) * scale * scale[:, None]
        members = [h for cluster in clusters for h in cluster]
        root = torch.block_diag(*map(self.grams.root, clusters))
        value = root.T @ _blocks(self.grams.value, members) @ root
        return sum(lost) + _beyond(key, self.d) + _beyond(value, self.d)


class PairCost:
    """An estimate of `GroupCost` from what every two heads lose together.

    Where heads have nothing in common, a group of t loses t - 1 times what a pair loses to a shared value, and r - 1
    times what it loses to a shared key, since r clusters bring one pattern each.
    """

    def __init__(self, exact: GroupCost) -> None:
        self.key, self.value = exact.grams.pair_losses
        self.pattern = exact.statistics.pattern_cost.tolist()
        self.clusters, self.generator = exact.clusters, exact.generator

    def __call__(self, group: Group) -> float:
        if len(group) == 1:
            return 0.0
        pairs = list(combinations(group, 2))
        shares = (self.clusters - 1, self.key), (len(group) - 1, self.value)
        lost = sum(times * sum(loss[i][j] for i, j in pairs) / len(pairs) for times, loss in shares)
        return lost + sum(map(self.pattern_cost, self.split(group)))

    def split(self, group: Group) -> Groups:
        splits = _splits(group, self.clusters, self.pattern_cost, self.generator)
        return min(splits, key=lambda split: sum(map(self.pattern_cost, split)))

    def pattern_cost(self, cluster: Group) -> float:
        """Energy lost when all take the pattern of one of them, the one that costs the least."""
        return min(sum(self.pattern[i][j] for i in cluster) for j in cluster)


def _splits(group: Group, clusters: int, pattern_cost: Cost, generator: torch.Generator) -> list[Groups]:
    """The ways to split a group into clusters; where they are many, the one whose patterns cost the least."""
    splits = list(islice(even_partitions(group, clusters), MOST_SPLITS + 1))
    return splits if len(splits) <= MOST_SPLITS else [arrange(group, clusters, pattern_cost, generator)]


def _pair_losses(gram: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> list[list[float]]:
    """Energy of every two heads beyond their first d directions, from a Gram matrix (H, H, d, d): (H, H), symmetric."""
    count, d = len(gram), gram.shape[2]
    upper = torch.cat([gram[rows, rows], gram[rows, columns]], -1)
    lower = torch.cat([gram[columns, rows], gram[columns, columns]], -1)
    lost = torch.linalg.eigvalsh(torch.cat([upper, lower], -2))[:, :d].clamp(min=0).sum(-1)
    losses = torch.zeros(count, count, dtype=lost.dtype)
    losses[rows, columns] = losses[columns, rows] = lost.cpu()
    return losses.tolist()


def _gram(weights: torch.Tensor) -> torch.Tensor:
    """(H, d, D) -> (H, H, d, d), products of the rows of every two heads."""
    count, d, _ = weights.shape
    flat = weights.flatten(0, 1)
    return (flat @ flat.T).view(count, d, count, d).transpose(1, 2)


def _blocks(gram: torch.Tensor, members: Iterable[int]) -> torch.Tensor:
    """(H, H, d, d) -> (t d, t d) of some heads."""
    index = list(members)
    part = gram[index][:, index]
    return part.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _psd_root(matrices: torch.Tensor) -> torch.Tensor:
    """C with C C^T = W, also for singular W: (..., n, n)."""
    energies, vectors = torch.linalg.eigh(matrices)
    return vectors * energies.clamp(min=0).sqrt()[..., None, :]


def _beyond(matrix: torch.Tensor, rank: int) -> float:
    """Sum of the eigenvalues that do not fit into `rank` directions."""
    return torch.linalg.eigvalsh(matrix)[:-rank].clamp(min=0).sum().item() if len(matrix) > rank else 0.0
