"""Which heads to put together: the nested partition that loses the least energy of the layer's output.

The cost of a group is the energy lost to its shared key, to its shared value, and to the patterns its heads give up,
all three in the unit of the output's energy. Over few heads every partition is looked at (dynamic programming over
subsets). Over many, groups are first valued by their pairs, which are few, and the best found by swaps; what they cost
together decides between that and neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import combinations, islice, pairwise

import torch

from .attend import query_with_bias
from .partition import Partition
from .statistics import Statistics, with_ridge
from .weights import AttentionHeads

_MOST_SPLITS = 12  # of one group into clusters, that are compared by their whole cost; more are compared by patterns
_MOST_COSTS = 10_000  # splits of groups whose cost is found, and
_MOST_WORK = 2e11  # multiplications for that; beyond either, swaps
_MOST_MEMBERS = 16  # to be arranged exactly
_COMPARED_SPLITS = 2  # of a group found by its pairs, the cheapest by patterns
_STARTS = 4  # of a search by swaps

Group = tuple[int, ...]
Clusters = tuple[Group, ...]
Cost = Callable[[Group], float]


class GroupCost:
    """Energy lost by a group of heads, its best split into clusters included."""

    def __init__(
        self,
        heads: AttentionHeads,
        statistics: Statistics,
        clusters: int,
        generator: torch.Generator,
        compared: int = _MOST_SPLITS,
    ) -> None:
        self.clusters, self.most_compared = clusters, compared
        self.generator = generator
        self.statistics = statistics
        self.d = heads.key.shape[1]
        query = query_with_bias(heads)
        weight_root = _psd_root(query @ statistics.query @ query.mT)  # (H, d, d)
        key = weight_root.mT @ heads.key.double() @ torch.linalg.cholesky(with_ridge(statistics.key))
        self.key_gram = _gram(key)  # (H, H, d, d)
        metric = with_ridge(statistics.value.mean(0))
        self.value_gram = _gram(heads.value.double() @ torch.linalg.cholesky(metric))
        self.output_gram = _gram(heads.output.double())
        self._known: dict[Group, tuple[float, Clusters]] = {}  # no functools.cache: its cycle would outlive the site
        self._roots: dict[Group, torch.Tensor] = {}

    def __call__(self, group: Group) -> float:
        return self._cheapest(group)[0]

    def split(self, group: Group) -> Clusters:
        return self._cheapest(group)[1]

    def _cheapest(self, group: Group) -> tuple[float, Clusters]:
        if group not in self._known:
            self._known[group] = self._compared(group)
        return self._known[group]

    def _compared(self, group: Group) -> tuple[float, Clusters]:
        splits = list(islice(_even_partitions(group, self.clusters), _MOST_SPLITS + 1))
        if len(splits) > _MOST_SPLITS:
            splits = [arrange(group, self.clusters, self.pattern_cost, self.generator)]
        elif len(splits) > self.most_compared:
            splits.sort(key=lambda split: sum(map(self.pattern_cost, split)))
        return min((self.cost(split), split) for split in splits[: self.most_compared])

    def pattern_cost(self, cluster: Group) -> float:
        return self.statistics.representative(cluster)[1]

    def cost(self, clusters: Clusters) -> float:
        """Of one split: shared key, shared value, patterns given up."""
        if len(clusters) == 1 and len(clusters[0]) == 1:
            return 0.0
        chosen, lost = zip(*map(self.statistics.representative, clusters), strict=True)
        scale = torch.stack([self.statistics.attention_energy[list(c)].sum().sqrt() for c in clusters])
        scale = scale.repeat_interleave(self.d)
        key = _blocks(self.key_gram, chosen) * scale * scale[:, None]
        members = [h for cluster in clusters for h in cluster]
        root = torch.block_diag(*map(self._root, clusters))
        value = root.T @ _blocks(self.value_gram, members) @ root
        return sum(lost) + _beyond(key, self.d) + _beyond(value, self.d)

    def _root(self, cluster: Group) -> torch.Tensor:
        """A root of the Gram matrix of a cluster's output projections."""
        if cluster not in self._roots:
            self._roots[cluster] = _psd_root(_blocks(self.output_gram, cluster))
        return self._roots[cluster]


class PairCost:
    """An estimate of `GroupCost` from what every two heads lose together.

    Of heads that have nothing in common a group of t loses t - 1 times what a pair does, in keys r - 1 times, since r
    clusters bring one pattern each.
    """

    def __init__(self, exact: GroupCost) -> None:
        count = len(exact.key_gram)
        rows, columns = torch.triu_indices(count, count, 1)
        energy = exact.statistics.attention_energy.sqrt()
        roots = _psd_root(torch.stack([exact.output_gram[h, h] for h in range(count)]))
        key = exact.key_gram * (energy[:, None] * energy)[..., None, None]
        value = roots.mT[:, None] @ exact.value_gram @ roots[None]
        self.key, self.value = (_pair_losses(gram, rows, columns) for gram in (key, value))
        self.pattern = exact.statistics.pattern_cost.tolist()
        self.clusters, self.generator = exact.clusters, exact.generator

    def __call__(self, group: Group) -> float:
        if len(group) == 1:
            return 0.0
        pairs = list(combinations(group, 2))
        shares = (self.clusters - 1, self.key), (len(group) - 1, self.value)
        lost = sum(times * sum(loss[i][j] for i, j in pairs) / len(pairs) for times, loss in shares)
        return lost + sum(map(self.pattern_cost, self.split(group)))

    def split(self, group: Group) -> Clusters:
        splits = list(islice(_even_partitions(group, self.clusters), _MOST_SPLITS + 1))
        if len(splits) > _MOST_SPLITS:
            return arrange(group, self.clusters, self.pattern_cost, self.generator)
        return min(splits, key=lambda split: sum(map(self.pattern_cost, split)))

    def pattern_cost(self, cluster: Group) -> float:
        """Of the representative that costs the least."""
        return min(sum(self.pattern[i][j] for i in cluster) for j in cluster)


def _pair_losses(gram: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> list[list[float]]:
    """Energy beyond d directions of every two heads' (d, d) blocks of a Gram matrix (H, H, d, d): (H, H), symmetric."""
    count, d = len(gram), gram.shape[2]
    upper = torch.cat([gram[rows, rows], gram[rows, columns]], -1)
    lower = torch.cat([gram[columns, rows], gram[columns, columns]], -1)
    lost = torch.linalg.eigvalsh(torch.cat([upper, lower], -2))[:, :d].clamp(min=0).sum(-1)
    losses = torch.zeros(count, count, dtype=lost.dtype)
    losses[rows, columns] = losses[columns, rows] = lost.cpu()
    return losses.tolist()


def search(
    heads: AttentionHeads, statistics: Statistics, q_groups: int, kv_groups: int, generator: torch.Generator
) -> Partition:
    """The partition of the least cost: group sizes differ by at most one, and so do cluster sizes within a group.

    Exact up to a fixed amount of work, by pairs of heads beyond it.

    Args:
        heads: the H heads of the source.
        statistics: of the site.
        q_groups: Hq, a multiple of `kv_groups`.
        kv_groups: Hkv.
        generator: draws the starts of the search by swaps.

    Returns:
        The partition, its groups in the order of their first heads.
    """
    count, d = heads.query.shape[:2]
    if q_groups == kv_groups == count:
        return Partition.identity(count)
    clusters = q_groups // kv_groups
    if count <= _MOST_MEMBERS and _affordable(count, kv_groups, clusters, d):
        cost = GroupCost(heads, statistics, clusters, generator)
        groups = _exact(tuple(range(count)), kv_groups, cost)
    else:
        cost = GroupCost(heads, statistics, clusters, generator, _COMPARED_SPLITS)
        estimate = PairCost(cost)
        found = _swapped(tuple(range(count)), kv_groups, estimate, generator)
        neighbours = next(_starts(tuple(range(count)), kv_groups, generator))
        groups = min(found, neighbours, key=lambda groups: sum(map(cost, groups)))
    return Partition(tuple(cost.split(group) for group in sorted(groups)))


def arrange(members: Group, parts: int, cost: Cost, generator: torch.Generator) -> Clusters:
    """The partition of `members` into `parts` sets of even sizes with the least total cost, or a good one by swaps."""
    if len(members) <= _MOST_MEMBERS:
        return _exact(members, parts, cost)
    return _swapped(members, parts, cost, generator)


def _swapped(members: Group, parts: int, cost: Cost, generator: torch.Generator) -> Clusters:
    known = cache(cost)
    found = (_swap(start, known) for start in _starts(members, parts, generator))
    return min(found, key=lambda groups: sum(map(known, groups)))


def _exact(members: Group, parts: int, cost: Cost) -> Clusters:
    small, larger = divmod(len(members), parts)
    return _best(members, small, larger, cost, {})[1]


def _best(
    rest: Group, small: int, larger: int, cost: Cost, known: dict[tuple[Group, int], tuple[float, Clusters]]
) -> tuple[float, Clusters]:
    if not rest:
        return 0.0, ()
    if (rest, larger) not in known:
        options = []
        for mine, left, still_larger in _first_sets(rest, small, larger):
            total, others = _best(left, small, still_larger, cost, known)
            options.append((cost(mine) + total, (mine, *others)))
        known[rest, larger] = min(options)
    return known[rest, larger]


def _first_sets(rest: Group, small: int, larger: int) -> Iterator[tuple[Group, Group, int]]:
    """Every set that may hold the first of `rest`, what it leaves, and how many sets of small + 1 are then to come."""
    sets = (len(rest) - larger) // small
    for size in ([small + 1] if larger else []) + ([small] if sets > larger else []):
        for others in combinations(rest[1:], size - 1):
            mine = (rest[0], *others)
            yield mine, tuple(h for h in rest if h not in mine), larger - (size > small)


def _even_partitions(members: Group, parts: int) -> Iterator[Clusters]:
    """The partitions into `parts` sets whose sizes differ by at most one."""
    small, larger = divmod(len(members), parts)

    def place(rest: Group, larger: int) -> Iterator[Clusters]:
        if not rest:
            yield ()
            return
        for mine, left, still_larger in _first_sets(rest, small, larger):
            for others in place(left, still_larger):
                yield (mine, *others)

    return place(members, larger)


def _affordable(heads: int, kv_groups: int, clusters: int, d: int) -> bool:
    """Whether the costs of all groups there are can be found."""
    size = math.ceil(heads / kv_groups)
    splits = sum(1 for _ in islice(_even_partitions(tuple(range(size)), clusters), _MOST_SPLITS))
    costs = math.comb(heads, size) * splits
    return costs <= _MOST_COSTS and costs * 10.0 * (size * d) ** 3 <= _MOST_WORK


def _starts(members: Group, parts: int, generator: torch.Generator) -> Iterator[Clusters]:
    """Neighbours together, then seeded shuffles."""
    small, larger = divmod(len(members), parts)
    cuts = [i * small + min(i, larger) for i in range(parts + 1)]
    order = list(members)
    for _ in range(_STARTS):
        yield tuple(tuple(sorted(order[a:b])) for a, b in pairwise(cuts))
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]


def _swap(start: Clusters, cost: Cost) -> Clusters:
    """Exchanges heads between two groups as long as that lowers the cost."""
    groups = list(start)
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(len(groups)), 2):
            before = cost(groups[a]) + cost(groups[b])
            for i in groups[a]:
                for j in groups[b]:
                    one = tuple(sorted({*groups[a], j} - {i}))
                    two = tuple(sorted({*groups[b], i} - {j}))
                    if cost(one) + cost(two) < before * (1 - 1e-9):
                        groups[a], groups[b], improved = one, two, True
                        break
                else:
                    continue
                break
    return tuple(groups)


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
