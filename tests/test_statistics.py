"""Statistics, costs, fits and factors against their definitions, written out slowly."""

import dataclasses
from itertools import combinations

import pytest
import torch
from test_methods import ATTENTION, D, T, attend, converted, d, inputs, random_heads, statistics

import sqa_convert.heads.refine as refine_module
from sqa_convert.heads import Partition
from sqa_convert.heads.attend import Attention
from sqa_convert.heads.cheapest_sets import improved
from sqa_convert.heads.group_cost import CircuitGrams, GroupCost, PairCost
from sqa_convert.heads.merge_circuits import balance, shared_factor
from sqa_convert.heads.procrustes import _aligned
from sqa_convert.heads.refine import LEARNING_RATE, refine
from sqa_convert.heads.refit import RIDGE as REFIT_RIDGE
from sqa_convert.heads.refit import output_error, refit
from sqa_convert.heads.site_inputs import Inputs
from sqa_convert.heads.statistics import RIDGE, collect, from_norms, similarity, with_ridge

BLIND_SPREAD = 0.1


def generator():
    return torch.Generator().manual_seed(0)


def close(a, b, tolerance=1e-7):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def patterns_of(heads, attention, x, memory):
    """(B, H, T, S) and what each head reads, (B, H, T, D)."""
    pattern = attention.patterns(heads, x, torch.arange(x.shape[1]), memory)
    return pattern, pattern @ (x if memory is None else memory)[:, None]


CASES = [(biases, cross) for biases in (True, False) for cross in (True, False)]


@pytest.mark.parametrize(("biases", "cross"), CASES)
def test_moments_of_data_are_their_definitions(biases, cross):
    heads, x = random_heads(3, 3, biases, table=not cross), inputs(12) + 0.3
    memory = inputs(12)[:, :5] - 0.2 if cross else None
    attention = Attention(0.7, False) if cross else dataclasses.replace(ATTENTION, scale=0.7)
    whole = Inputs(x, memory)
    known = collect(heads, attention, [whole[:5], whole[5:]], 1.0, generator())

    rows = torch.cat([x, torch.ones(12, T, 1)], -1).flatten(0, 1)
    close(known.query, rows.T @ rows / len(rows))
    read_from = (x if memory is None else memory).flatten(0, 1)
    close(known.key, torch.cov(read_from.T, correction=0))

    pattern, read = patterns_of(heads, attention, x, memory)
    read = read.transpose(0, 1).flatten(1, 2)  # (H, B T, D)
    close(known.value_mean, read.mean(1))
    for h in range(3):
        moment = torch.cov(read[h].T, correction=0) if biases else read[h].T @ read[h] / len(read[h])
        close(known.value[h], moment)
        # the first order of what noise in the scores does to what the head adds
        value = (x if memory is None else memory) @ heads.value[h].T @ heads.output[h]  # (B, S, D)
        away = value[:, None] - (pattern[:, h] @ value)[:, :, None]  # (B, T, S, D)
        energy = (pattern[:, h, :, :, None] * away).square().sum((2, 3)).mean()
        close(known.attention_energy[h], 0.7**2 * energy)


@pytest.mark.parametrize("biases", [True, False])
def test_the_cost_of_a_borrowed_pattern_is_what_the_best_values_leave(biases):
    heads, x = random_heads(3, 3, biases), inputs(40)
    known = statistics(heads, x)
    _, read = patterns_of(heads, ATTENTION, x, None)
    read = read.transpose(0, 1).flatten(1, 2)
    if biases:
        read = read - read.mean(1, keepdim=True)  # the output bias takes the means
    for i in range(3):
        close(known.values_for(heads, i, i), heads.value[i])
        for j in set(range(3)) - {i}:
            wanted = read[i] @ heads.value[i].T  # (n, d)
            moment = with_ridge(read[j].T @ read[j] / len(read[j]))
            gap = read[j].T @ (wanted - read[j] @ heads.value[i].T) / len(read[j])
            best = heads.value[i] + torch.linalg.solve(moment, gap).T
            close(known.values_for(heads, i, j), best)
            left = (wanted - read[j] @ best.T) @ heads.output[i]
            assert known.pattern_cost[i, j] == pytest.approx(left.square().sum(-1).mean().item(), rel=1e-6)
    assert known.representative((0, 2))[0] in (0, 2)
    chosen, cost = known.representative((0, 1, 2))
    assert cost == pytest.approx(min(known.pattern_cost[:, j].sum().item() for j in range(3)))
    assert cost == pytest.approx(known.pattern_cost[:, chosen].sum().item())


def test_a_ridge_keeps_the_trace():
    x = inputs()[0]
    metric = x.T @ x
    ridged = with_ridge(metric)
    assert ridged.trace() == pytest.approx(metric.trace().item())
    close(ridged - torch.diag(ridged.diagonal()), (1 - RIDGE) * (metric - torch.diag(metric.diagonal())))
    close(with_ridge(torch.zeros(3, 3).double()), RIDGE * 1e-8 * torch.eye(3).double(), 1e-15)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_without_data_the_norms_stand_in(biases, table):
    heads = random_heads(3, 3, biases, table)
    heads = dataclasses.replace(
        heads, query=heads.query * 0.004, query_bias=None if not biases else heads.query_bias / 250
    )
    heads.query[2] *= 300  # its pattern is like no other
    if table:
        heads = dataclasses.replace(heads, position_bias=heads.position_bias / 9)
    norms = [(torch.rand(D).double() + 0.5, torch.randn(D).double() if biases else None) for _ in range(2)]
    attention = Attention(0.6, True)
    known = from_norms(heads, attention, *norms)

    (query_weight, query_bias), (key_weight, key_bias) = norms
    offset = torch.cat([torch.zeros(D).double() if query_bias is None else query_bias, torch.ones(1).double()])
    weights = torch.cat([query_weight, torch.zeros(1).double()])
    close(known.query, torch.diag(weights**2) + torch.outer(offset, offset))
    close(known.key, torch.diag(key_weight**2))
    close(known.value, torch.diag(key_weight**2)[None])
    close(known.value_mean[0], torch.zeros(D).double() if key_bias is None else key_bias)
    assert known.adapted_value is None

    strength = [(heads.output[h].T @ heads.value[h] * key_weight).square().sum() for h in range(3)]
    close(known.attention_energy, 0.6**2 * BLIND_SPREAD * torch.stack(strength))
    full = heads.query if not biases else torch.cat([heads.query, heads.query_bias[..., None]], -1)
    full = full if biases else torch.cat([full, torch.zeros_like(full[..., :1])], -1)
    root = torch.linalg.cholesky(known.query + 1e-14 * torch.eye(D + 1))
    capped = 0
    for i, j in combinations(range(3), 2):
        form = root.T @ (full[i].T @ heads.key[i] - full[j].T @ heads.key[j]) * key_weight
        distance = form.square().sum()
        if table:
            columns = [(t - t.mean()) / 0.6 for t in (heads.position_bias[i], heads.position_bias[j])]
            distance = distance + (columns[0] - columns[1]).square().mean()
        for of in (i, j):
            most = 2 * BLIND_SPREAD * strength[of]
            cost = torch.minimum(0.6**2 * BLIND_SPREAD * strength[of] * distance, most)
            capped += bool(cost == most)
            close(known.pattern_cost[of, j if of == i else i], cost, 1e-6)
    assert capped == 4


def test_similarity_is_share_of_cost_and_cosine_of_maps():
    heads = random_heads(3, 3)
    known = statistics(heads, inputs())
    shown = similarity(heads, known)
    share = known.pattern_cost / known.pattern_cost.amax(1, keepdim=True)
    root = torch.linalg.cholesky(with_ridge(known.value.mean(0)))
    maps = [(root.T @ heads.value[h].T @ heads.output[h]).flatten() for h in range(3)]
    for i in range(3):
        for j in range(3):
            assert shown["pattern"][i][j] == pytest.approx(1 - (share[i, j] + share[j, i]).item() / 2, abs=6e-4)
            cosine = torch.cosine_similarity(maps[i], maps[j], dim=0).abs().item()
            assert shown["output map"][i][j] == pytest.approx(cosine, abs=6e-4)


@pytest.mark.parametrize("biases", [True, False])
def test_refit_is_ridge_regression_around_its_start(biases):
    heads, x = random_heads(4, 2, biases), inputs(30)
    wanted = torch.randn(30, T, D).double()
    parts = [(Inputs(x[:11]), wanted[:11]), (Inputs(x[11:]), wanted[11:])]
    found = refit(heads, ATTENTION, parts)
    features = ATTENTION.outputs(heads, x).flatten(-2).flatten(0, 1)
    missing = (wanted - ATTENTION.layer(heads, x)).flatten(0, 1)
    penalty = REFIT_RIDGE * features.square().mean() * len(features)
    if biases:  # a free intercept is regression on centred features
        centre, features = features.mean(0), features - features.mean(0)
    # sums of squares: as many more rows, each feature's penalty
    rows = torch.cat([features, penalty.sqrt() * torch.eye(features.shape[1])])
    change = torch.linalg.lstsq(rows, torch.cat([missing, torch.zeros(features.shape[1], D)])).solution
    close(found.output.flatten(0, 1), heads.output.flatten(0, 1) + change, 1e-6)
    if biases:
        close(found.output_bias, heads.output_bias + missing.mean(0) - centre @ change, 1e-6)
    assert output_error(found, ATTENTION, parts) < output_error(heads, ATTENTION, parts)


@pytest.mark.parametrize("biases", [True, False])
def test_the_output_error_is_a_share_of_variance(biases):
    heads, x = random_heads(4, 2, biases), inputs(9)
    wanted = torch.randn(9, T, D).double() + 0.5
    lost = (ATTENTION.layer(heads, x) - wanted).square().sum()
    energy = (wanted - wanted.mean((0, 1)) if biases else wanted).square().sum()
    parts = [(Inputs(x[:4]), wanted[:4]), (Inputs(x[4:]), wanted[4:])]
    assert output_error(heads, ATTENTION, parts) == pytest.approx((lost / energy).item())


def test_refine_takes_steps_in_units_of_the_weights():
    """Adam's first step is its rate in every weight: a tenth of it, for the warm-up, times the weights' size."""
    heads, x = random_heads(4, 2), inputs(6)
    wanted = torch.randn(6, T, D).double()
    stepped = refine(heads, ATTENTION, [(Inputs(x), wanted)], 1, generator())
    for name in ("query", "key", "value", "output", "query_bias", "output_bias", "position_bias"):
        before, after = getattr(heads, name), getattr(stepped, name)
        moved = (after - before).abs()
        close(moved[moved > 0].mean(), 0.1 * LEARNING_RATE * before.square().mean().sqrt(), 1e-4)
    for name in ("key_bias", "value_bias"):
        assert torch.equal(getattr(stepped, name), getattr(heads, name))


def test_refine_sees_every_sequence_before_any_again(monkeypatch):
    heads, x = random_heads(4, 2, table=False), inputs(6)
    memory = torch.randn(6, 2 * T, D).double()
    sizes, seen = [], []

    class Watched(Attention):
        def layer(self, heads, x_, *others):
            sizes.append(len(x_))
            seen.extend(int((x == row).all((1, 2)).nonzero()) for row in x_)
            return super().layer(heads, x_, *others)

    monkeypatch.setattr(refine_module, "BATCH_TOKENS", 4 * T)
    refine(heads, Watched(1.0, False), [(Inputs(x), x)], 3, generator())
    assert set(sizes) == {1} and sorted(seen[:6]) == list(range(6))  # in pieces of a quarter of a batch
    sizes.clear()
    seen.clear()
    refine(heads, Watched(1.0, False), [(Inputs(x, memory), x)], 3, generator())  # of the longer side
    assert sizes == [1] * 6 and sorted(seen) == list(range(6))
    monkeypatch.setattr(refine_module, "BATCH_TOKENS", 1)
    sizes.clear()
    refine(heads, Watched(1.0, False), [(Inputs(x), x)], 2, generator())
    assert sizes == [1, 1]


@pytest.mark.parametrize("clusters", [1, 2])
def test_the_cost_of_a_pair_is_what_it_loses(clusters):
    heads = random_heads(4, 4)
    known = statistics(heads, inputs())
    exact = GroupCost(CircuitGrams(heads, known), clusters, generator())
    pairs = PairCost(exact)
    query_metric, key_metric = known.query, with_ridge(known.key)
    full = torch.cat([heads.query, heads.query_bias[..., None]], -1)
    key_root, query_root = torch.linalg.cholesky(key_metric), torch.linalg.cholesky(query_metric)
    value_root = torch.linalg.cholesky(with_ridge(known.value.mean(0)))

    def beyond(matrix):
        return torch.linalg.svdvals(matrix)[d:].square().sum().item()

    for i, j in combinations(range(4), 2):
        forms = [known.attention_energy[h].sqrt() * query_root.T @ full[h].T @ heads.key[h] @ key_root for h in (i, j)]
        key = beyond(torch.cat(forms))
        value = beyond(torch.cat([value_root.T @ heads.value[h].T @ heads.output[h] for h in (i, j)], 1))
        pattern = 0.0 if clusters == 2 else known.representative((i, j))[1]
        expected = (clusters - 1) * key + value + pattern
        assert pairs((i, j)) == pytest.approx(expected, rel=1e-5)
        if clusters == 2:
            assert exact.costs([((i,), (j,))])[0] == pytest.approx(expected, rel=1e-5)
    # of more heads: the mean over their pairs, once for each head beyond the first
    triple = [pairs((i, j)) for i, j in combinations((0, 1, 3), 2)]
    if clusters == 1:
        values = [
            total - known.representative(pair)[1]
            for total, pair in zip(triple, combinations((0, 1, 3), 2), strict=True)
        ]
        assert pairs((0, 1, 3)) == pytest.approx(2 * sum(values) / 3 + known.representative((0, 1, 3))[1], rel=1e-5)
    assert pairs((2,)) == 0.0


def test_swaps_end_where_no_swap_is_better():
    weights = torch.rand(9, 9, generator=generator()).tolist()

    def cost(group):
        return sum(weights[i][j] for i, j in combinations(group, 2))

    found = improved(((0, 1, 2), (3, 4, 5), (6, 7, 8)), cost)
    assert sorted(h for group in found for h in group) == list(range(9))
    for one, two in combinations(found, 2):
        for i in one:
            for j in two:
                swapped = tuple(sorted({*one, j} - {i})), tuple(sorted({*two, i} - {j}))
                assert sum(map(cost, swapped)) >= (cost(one) + cost(two)) * (1 - 1e-9)


def test_the_shared_factor_spans_the_most_energy():
    factors = [torch.randn(3, 7).double() for _ in range(2)]
    roots = [torch.randn(3, 3).double() for _ in range(2)]
    metric_root = torch.linalg.cholesky(with_ridge(torch.cov(torch.randn(7, 30).double())))
    found = shared_factor(factors, [root @ root.T for root in roots], metric_root, 2)
    forms = torch.cat([root.T @ factor @ metric_root for root, factor in zip(roots, factors, strict=True)])
    best = torch.linalg.svd(forms).Vh[:2]
    close(found.T @ found, best.T @ best)
    close(found @ found.T, torch.eye(2).double())
    assert (forms @ found[0]).norm() > (forms @ found[1]).norm()  # the strongest first


def test_a_shared_factor_of_few_directions_reads_nothing_beyond_them():
    for rows, width, rank in ((2, 7, 4), (9, 3, 5)):
        factor = torch.randn(rows, width).double()
        found = shared_factor([factor], [torch.eye(rows).double()], torch.eye(width).double(), rank)
        assert found.shape == (rank, width)
        least = min(rows, width)
        assert not found[least:].any()
        close(factor @ found.T @ found, factor)


@pytest.mark.parametrize("biases", [True, False])
def test_balance_changes_no_output_and_evens_norms(biases):
    heads, x = random_heads(4, 2, biases), inputs()
    heads = dataclasses.replace(
        heads, key=heads.key * 30, value=heads.value / 50, key_bias=None if not biases else heads.key_bias * 30
    )
    for only in (None, [1]):
        even = balance(dataclasses.replace(heads, key_bias=None, value_bias=None), only)
        close(attend(even, x[0]), attend(dataclasses.replace(heads, key_bias=None, value_bias=None), x[0]), 1e-6)
        for g in range(2) if only is None else only:
            mine = slice(2 * g, 2 * g + 2)
            full = even.query[mine].square().sum(-1)
            full = full if not biases else full + even.query_bias[mine].square()
            close(full.mean(0), even.key[g].square().sum(-1))
            close(even.output[mine].square().sum(-1).mean(0), even.value[g].square().sum(-1))
        if only:
            assert torch.equal(even.key[0], heads.key[0]) and torch.equal(even.output[:2], heads.output[:2])


def test_the_output_bias_keeps_the_mean():
    """With one head left of each group the pattern is its representative's, and no mean is lost."""
    heads, x = random_heads(6, 6), inputs(50)
    for counts in ((3, 3), (2, 2)):
        result = converted("svd", heads, Partition.contiguous(6, *counts), x)
        close(ATTENTION.layer(result, x).mean((0, 1)), ATTENTION.layer(heads, x).mean((0, 1)), 1e-6)


def test_aligned_factors_are_balanced_and_their_forms_the_same():
    left, right = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 8).double()
    a, b = _aligned(left, right)
    close(a.mT @ b, left.mT @ right)
    close(a @ a.mT, b @ b.mT)
    # no rotation of one of them brings it nearer to the mean of the others
    both = torch.cat([a, b], -1)
    cross = both.mean(0) @ both.mT
    u, _, vh = torch.linalg.svd(cross)
    close(u @ vh, torch.eye(4).double().expand(3, -1, -1), 1e-3)
