"""What a method may know of a site's inputs: second moments, and what one head costs in another's place.

Moments are accumulated in a stream: products of a few thousand rows in the dtype the model computes in, their sum in
float64. Where there is no data the weights of
the layer norm before the site stand in: a normalized input n times the norm's weight, plus its bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attend import Attention
from .site_inputs import Inputs
from .weights import AttentionHeads

RIDGE = 1e-3  # share of an isotropic part in every metric: some models have a few huge directions
_LEAST = 1e-8  # mean variance of inputs that is told from none; normalized inputs are of order one
_BLIND_SPREAD = 0.1  # without data: sum of the squared weights of a pattern that is unknown


@dataclass(frozen=True)
class Statistics:
    """Moments of a site's inputs, float64. H heads of the source, D model width."""

    query: Tensor
    """(D + 1, D + 1), E[x x^T] of query inputs with a one appended: a bias is one more input"""
    key: Tensor
    """(D, D), covariance of key inputs: their mean adds the same to all scores of a query"""
    value: Tensor
    """(H, D, D), of what each head reads, P x: covariance where there is an output bias to take the mean, else second
    moment; (1, D, D) where it is the same for all"""
    value_mean: Tensor
    """(H, D), E[P x]; (1, D) likewise"""
    attention_energy: Tensor
    """(H,): output energy per squared error of a score, kappa"""
    pattern_cost: Tensor
    """(H, H): output energy lost when head i takes the pattern of head j, with the best values for it"""
    adapted_value: Tensor | None
    """(H, H, d, D): [i, j] are the values of head i that make up best for the pattern of head j; None without data,
    where they are head i's own"""

    def values_for(self, heads: AttentionHeads, head: int, pattern: int) -> Tensor:
        """(d, D), float64: a head's values under the pattern of another."""
        adapted = None if self.adapted_value is None or head == pattern else self.adapted_value[head, pattern]
        return (heads.value[head] if adapted is None else adapted).double()

    def representative(self, cluster: Sequence[int]) -> tuple[int, float]:
        """The head whose pattern the heads of a cluster can take at the least cost, and that cost."""
        members = list(cluster)
        cost = self.pattern_cost[members][:, members].sum(0)
        best = int(cost.argmin())
        return cluster[best], cost[best].item()

    def value_metric(self, group: Iterable[int]) -> Tensor:
        """(D, D), the mean over the heads of a group."""
        return self.value[list(group)].mean(0) if len(self.value) > 1 else self.value[0]

    def mean_read(self, head: int) -> Tensor:
        """(D,), what a head reads on average."""
        return self.value_mean[head if len(self.value_mean) > 1 else 0]


def with_ridge(metric: Tensor, share: float = RIDGE) -> Tensor:
    """(1 - a) S + a tr(S) / D I, positive definite even for S = 0."""
    size = len(metric)
    level = metric.diagonal().mean().clamp(min=_LEAST)
    return (1 - share) * metric + share * level * torch.eye(size, dtype=metric.dtype, device=metric.device)


class _Moment:
    """Streamed mean and second moment of rows (..., n, D), about the mean of the first of them.

    What varies little about a large mean would be lost in products of its whole size.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin: Any = None  # (..., 1, D)
        self.total: Any = 0.0
        self.square: Any = 0.0

    def add(self, rows: Tensor) -> Tensor:
        """Takes rows up; returns them less the origin."""
        if self.origin is None:
            self.origin = rows.mean(-2, keepdim=True)
        rows = rows - self.origin
        self.count += rows.shape[-2]
        self.total = self.total + rows.sum(-2, dtype=torch.float64)
        self.square = self.square + (rows.mT @ rows).double()
        return rows

    @property
    def offset(self) -> Tensor:
        """(..., D), the mean less the origin."""
        return self.total / self.count

    @property
    def mean(self) -> Tensor:
        return self.origin.squeeze(-2).double() + self.offset

    @property
    def second(self) -> Tensor:
        return self.covariance + self.mean[..., :, None] * self.mean[..., None, :]

    @property
    def covariance(self) -> Tensor:
        return self.square / self.count - self.offset[..., :, None] * self.offset[..., None, :]


@torch.no_grad()
def collect(
    heads: AttentionHeads,
    attention: Attention,
    batches: Iterable[Inputs],
    share: float,
    generator: torch.Generator,
) -> Statistics:
    """Statistics of a site from its inputs.

    Args:
        heads: the source's.
        attention: how the site attends.
        batches: inputs; padding counts in nothing.
        share: of the query positions, at which patterns are looked at.
        generator: draws them.
    """
    count, d, width = heads.value.shape
    queries, keys, read = _Moment(), _Moment(), _Moment()
    energy: Any = 0.0
    made = _Moment()  # of what heads add, before their output projections
    cross: Any = None
    output_gram = (heads.output @ heads.output.mT).double()  # (H, d, d)
    for batch in batches:
        x, source = batch.x, batch.read
        rows = batch.count(x)
        queries.add(torch.cat([rows, torch.ones_like(rows[:, :1])], -1))
        keys.add(batch.key_rows())
        some = max(1, round(share * x.shape[1]))
        chosen = torch.randperm(x.shape[1], generator=generator)[:some].sort().values.to(x.device)
        pattern = attention.patterns(heads, x, chosen, batch.memory, batch.attended, batch.mask)  # (B, H, n, S)
        counts = None if batch.counted is None else batch.counted[:, chosen]  # (B, n)
        seen = (pattern @ source[:, None]).transpose(0, 1)  # (H, B, n, D)
        seen = seen.flatten(1, 2) if counts is None else seen[:, counts]  # (H, m, D)
        value = source[:, None] @ heads.value.mT  # (B, H, S, d), without bias: it is folded away
        energy = energy + _attention_energy(pattern, value, output_gram, counts)
        contribution = made.add(seen @ heads.value.mT)  # (H, m, d)
        seen_with_made = read.add(seen).mT @ contribution.transpose(0, 1).flatten(1)  # (H, D, H d)
        cross = seen_with_made.double() if cross is None else cross.add_(seen_with_made)  # the largest array there is
    centred = heads.output_bias is not None
    value_moment = read.covariance if centred else read.second
    made_moment = made.covariance if centred else made.second
    cross = cross.view(count, width, count, d).div_(read.count)
    for j in range(count):
        cross[j] -= read.offset[j, :, None, None] * made.offset
        if not centred:
            cross[j] += read.mean[j, :, None, None] * made.mean
    adapted, cost = _adapted(heads.value, value_moment, cross, made_moment, output_gram)
    return Statistics(
        query=queries.second.cpu(),
        key=keys.covariance.cpu(),
        value=value_moment.cpu(),
        value_mean=read.mean.cpu(),
        attention_energy=(attention.scale**2 * energy / read.count).cpu(),
        pattern_cost=cost.cpu(),
        adapted_value=adapted.cpu(),
    )


def _adapted(
    values: Tensor, moments: Tensor, cross: Tensor, made: Tensor, output_gram: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares of what each head makes on what each other reads: values (H, H, d, D), and the energy left (H, H).

    The ridge draws to the head's own values, so heads of one pattern keep them.

    Args:
        values: (H, d, D), each head's own.
        moments: (H, D, D), of what each head reads.
        cross: (H, D, H, d), of what each reads with what each makes.
        made: (H, d, d), of what each makes.
        output_gram: (H, d, d).
    """
    count, d, width = values.shape
    own = values.double().permute(2, 0, 1).flatten(1)  # (D, H d)
    adapted = values.new_empty(count, count, d, width)  # in the weights' dtype
    cost = torch.empty(count, count, dtype=torch.float64, device=values.device)
    for j in range(count):
        read = cross[j].flatten(1)  # (D, H d)
        fit = own + torch.linalg.solve(with_ridge(moments[j]), read - moments[j] @ own)
        explained = (2 * read - moments[j] @ fit).view(width, count, d)
        fitted = fit.view(width, count, d)
        left = made - torch.einsum("Dhd,Dhe->hde", fitted, explained)
        cost[:, j] = ((left + left.mT) / 2 * output_gram).sum((1, 2)).clamp(min=0)
        adapted[:, j] = fitted.permute(1, 2, 0).to(adapted)
    return adapted, cost.fill_diagonal_(0)


def _attention_energy(pattern: Tensor, value: Tensor, output_gram: Tensor, counts: Tensor | None) -> Tensor:
    """Sum over positions of sum_j P_ij^2 |(v_j - v_i) Wo|^2, v_i what i reads: (H,); to first order in score noise.

    Of the positions (B, n) those that count.
    """
    gram = output_gram.to(value.dtype)
    read = pattern @ value  # (B, H, n, d)
    squares = pattern**2
    own = ((value @ gram) * value).sum(-1, keepdim=True)  # (B, H, S, 1)
    energy = (squares @ own).squeeze(-1) - 2 * (((squares @ value) @ gram) * read).sum(-1)
    energy = energy + squares.sum(-1) * ((read @ gram) * read).sum(-1)  # (B, H, n)
    energy = energy.clamp(min=0).transpose(0, 1)  # (H, B, n)
    energy = energy.flatten(1) if counts is None else energy[:, counts]
    return energy.sum(1).double()


def from_norms(
    heads: AttentionHeads,
    attention: Attention,
    query_norm: tuple[Tensor, Tensor | None],
    key_norm: tuple[Tensor, Tensor | None],
    value_norm: tuple[Tensor, Tensor | None] | None = None,
) -> Statistics:
    """Statistics without data, from weight (D,) and bias (D,) or None of the norms before queries, before keys and,
    where they are made from something else, before values.

    Normalized inputs are taken as white. A pattern is taken to follow its scores: what head i pays for the pattern of
    head j grows with the difference of their score forms, position bias included, up to what two unrelated patterns
    cost.
    """
    query = torch.diag(torch.cat([query_norm[0], torch.zeros(1).to(query_norm[0])]).double() ** 2)
    offset = torch.ones(len(query), dtype=torch.float64)
    offset[:-1] = 0 if query_norm[1] is None else query_norm[1].double()
    query += torch.outer(offset, offset)
    key = torch.diag(key_norm[0].double() ** 2)
    weight, bias = value_norm or key_norm
    read = torch.diag(weight.double() ** 2)
    mean = torch.zeros(len(read), dtype=torch.float64) if bias is None else bias.double()

    value = heads.value.double()
    output_gram = heads.output.double() @ heads.output.double().mT
    strength = ((value @ read @ value.mT) * output_gram).sum((1, 2)).clamp(min=0)  # (H,), energy of each head's output
    energy = attention.scale**2 * _BLIND_SPREAD * strength
    difference = _form_distance(heads, query, key)
    if heads.position_bias is not None:
        table = heads.position_bias.double() / attention.scale
        table = table - table.mean(1, keepdim=True)
        difference = difference + (table[:, None] - table[None]).square().mean(-1)
    cost = torch.minimum(energy[:, None] * difference, 2 * _BLIND_SPREAD * strength[:, None].expand_as(difference))
    return Statistics(query, key, read[None], mean[None], energy, cost, None)


def _form_distance(heads: AttentionHeads, query: Tensor, key: Tensor) -> Tensor:
    """|Sq^1/2 (M_i - M_j) Sk^1/2|^2 of the score forms M = Wq^T Wk: (H, H), from d x d products."""
    from .attend import query_with_bias

    count, d, _ = heads.query.shape
    q, k = query_with_bias(heads).flatten(0, 1), heads.key.double().flatten(0, 1)
    q_gram = (q @ query @ q.T).view(count, d, count, d).transpose(1, 2)  # (H, H, d, d)
    k_gram = (k @ key @ k.T).view(count, d, count, d).transpose(1, 2)
    inner = (q_gram * k_gram).sum((2, 3))  # (H, H), inner products of the forms
    own = inner.diagonal()
    return (own[:, None] + own[None] - 2 * inner).clamp(min=0)


def similarity(heads: AttentionHeads, statistics: Statistics) -> dict[str, list[list[float]]]:
    """How alike the heads of a site are, for pictures: {"pattern", "output map"}, each (H, H) from 0 to 1.

    Patterns by the output energy that taking another's costs, against the most it costs that head; output maps by their
    cosine in the metric of what heads read.
    """
    cost = statistics.pattern_cost
    share = cost / cost.amax(1, keepdim=True).clamp(min=1e-30)
    value = heads.value.double().cpu()
    root = torch.linalg.cholesky(with_ridge(statistics.value.mean(0)))
    flat = (value @ root).flatten(0, 1)
    output = heads.output.double().cpu().flatten(0, 1)
    count, d, _ = value.shape
    inner = ((flat @ flat.T) * (output @ output.T)).view(count, d, count, d).sum((1, 3))
    norm = inner.diagonal().clamp(min=1e-30).sqrt()
    return {
        "pattern": _rounded(1 - (share + share.T) / 2),
        "output map": _rounded((inner / norm[:, None] / norm).abs().clamp(max=1)),
    }


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in matrix.tolist()]
