"""What heads lose when they share a key and a value: the cost of a group, exactly and estimated from pairs.

The cost of a group is the energy lost to its shared key, to its shared value, and to the patterns its heads give up,
all three in the unit of the output's energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, combinations, islice

import torch

from ..progress import step_done
from .attend import query_with_bias
from .cheapest_sets import Cost, Group, Groups, arrange, even_partitions
from .statistics import Statistics, with_ridge
from .weights import AttentionHeads

MOST_SPLITS = 12  # of one group into clusters, that are compared by their whole cost; more are compared by patterns

_TOGETHER = 1 << 20  # numbers in the matrices whose eigenvalues are computed at once


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
        self._representatives: dict[Group, tuple[int, float]] = {}

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

    def prepare(self, groups: Iterable[Group]) -> None:
        """Computes the costs of many groups, together and so in a part of the time."""
        splits = {group: self._compared(group) for group in groups if group not in self._known}
        costs = iter(self.costs([split for of_group in splits.values() for split in of_group]))
        for group, of_group in splits.items():
            self._known[group] = min((next(costs), split) for split in of_group)

    def _cheapest(self, group: Group) -> tuple[float, Groups]:
        if group not in self._known:
            self.prepare([group])
        return self._known[group]

    def _compared(self, group: Group) -> list[Groups]:
        splits = _splits(group, self.clusters, self.pattern_cost, self.generator)
        if len(splits) > self.most_compared:
            splits.sort(key=lambda split: sum(map(self.pattern_cost, split)))
        return splits[: self.most_compared]

    def pattern_cost(self, cluster: Group) -> float:
        return self.grams.representative(cluster)[1]

    def costs(self, splits: Sequence[Groups]) -> list[float]:
        """Energy lost by each of some splits: to the shared key, the shared value, and the patterns that heads give
        up."""
        costs = [0.0] * len(splits)
        of_sizes = dict[tuple[int, ...], list[int]]()
        for place, split in enumerate(splits):
            of_sizes.setdefault(tuple(map(len, split)), []).append(place)
        for sizes, places in of_sizes.items():
            if sizes == (1,):
                continue
            for some in _parts(places, max(1, _TOGETHER // (sum(sizes) * self.d) ** 2)):
                step_done()
                for place, cost in zip(some, self._of_sizes([splits[n] for n in some], sizes), strict=True):
                    costs[place] = cost
        return costs

    def _of_sizes(self, splits: Sequence[Groups], sizes: tuple[int, ...]) -> list[float]:
        """Costs of splits whose clusters are of the same sizes."""
        device, energy = self.grams.key.device, self.statistics.attention_energy
        clusters = [torch.tensor(of_all, device=device) for of_all in zip(*splits, strict=True)]  # (splits, size) each
        chosen, lost = zip(*(zip(*map(self.grams.representative, split), strict=True) for split in splits), strict=True)
        scale = torch.stack([energy[members].sum(-1).sqrt() for members in clusters], -1)
        scale = scale.repeat_interleave(self.d, -1)  # (splits, r d)
        key = _blocks(self.grams.key, torch.tensor(chosen, device=device)) * scale[..., None] * scale[:, None]
        value = _blocks(self.grams.value, torch.cat(clusters, -1))
        ends = [self.d * end for end in accumulate(sizes)]
        for members, end in zip(clusters, ends, strict=True):
            root, rows = _some_roots(_blocks(self.grams.output, members)), slice(end - self.d * members.shape[1], end)
            value[:, rows] = root.mT @ value[:, rows]
            value[..., rows] = value[..., rows] @ root
        beyond = _beyond(key, self.d) + _beyond(value, self.d)
        return [sum(patterns) + other for patterns, other in zip(lost, beyond.tolist(), strict=True)]


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


def _blocks(gram: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """(H, H, d, d) -> (n, t d, t d) of n times t heads, (n, t)."""
    blocks = gram[members[:, :, None], members[:, None]]  # (n, t, t, d, d)
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _parts(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _psd_root(matrices: torch.Tensor) -> torch.Tensor:
    """C with C C^T = W, also for singular W: (..., n, n)."""
    energies, vectors = torch.linalg.eigh(matrices)
    return vectors * energies.clamp(min=0).sqrt()[..., None, :]


def _some_roots(matrices: torch.Tensor) -> torch.Tensor:
    """As `_psd_root`, in a sixth of the time where matrices are regular: (n, t, t)."""
    roots, failed = torch.linalg.cholesky_ex(matrices)
    return _psd_root(matrices) if failed.any() else roots


def _beyond(matrices: torch.Tensor, rank: int) -> torch.Tensor:
    """Sums of the eigenvalues that do not fit into `rank` directions: (n, t, t) -> (n)."""
    if matrices.shape[-1] <= rank:
        return matrices.new_zeros(len(matrices))
    return torch.linalg.eigvalsh(matrices)[:, :-rank].clamp(min=0).sum(-1)
