"""Factorised circuits, searched partitions, refit and refine on bare weights."""

import dataclasses
from itertools import combinations, pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import ATTENTION, BUCKETS, CASES, D, T, attend, converted, d, expand, inputs, random_heads, statistics

import sqa_convert.heads.search as search_module
from sqa_convert.checkpoints.find import open_source
from sqa_convert.conversion.convert_site import read_norm, read_site
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.heads import AttentionHeads, Partition, get_method
from sqa_convert.heads.attend import Attention
from sqa_convert.heads.cheapest_sets import arrange
from sqa_convert.heads.group_cost import CircuitGrams, GroupCost
from sqa_convert.heads.refine import refine
from sqa_convert.heads.refit import output_error, refit
from sqa_convert.heads.search import search
from sqa_convert.heads.site_inputs import Inputs
from sqa_convert.heads.statistics import collect, from_norms, similarity


def generator():
    return torch.Generator().manual_seed(0)


def close(a, b, tolerance=1e-7):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def regauged(heads):
    """The same function: every head's queries and keys, values and outputs, in coordinates of their own."""

    def matrices():
        return torch.linalg.qr(torch.randn(len(heads.query), d, d, dtype=torch.float64))[0] @ torch.diag_embed(
            torch.rand(len(heads.query), d, dtype=torch.float64) + 0.5
        )

    a, c = matrices(), matrices()
    back_a, back_c = torch.linalg.inv(a).mT, torch.linalg.inv(c).mT

    def biased(matrix, bias):
        return None if bias is None else (matrix @ bias[..., None])[..., 0]

    return dataclasses.replace(
        heads,
        query=a @ heads.query,
        key=back_a @ heads.key,
        value=c @ heads.value,
        output=back_c @ heads.output,
        query_bias=biased(a, heads.query_bias),
        key_bias=biased(back_a, heads.key_bias),
        value_bias=biased(c, heads.value_bias),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_attention_is_what_the_definition_says(causal, table):
    heads, x = random_heads(6, 3, table=table), inputs(2)
    attention = Attention(d**-0.5, causal, (lambda distance: distance % BUCKETS) if table else None)
    made = attention.layer(heads, x)
    if not causal:
        close(made, torch.stack([attend(heads, row) for row in x]))
    rows = torch.tensor([1, 4])
    pattern = attention.patterns(heads, x, rows)  # (B, Hq, n, S)
    assert not causal or not pattern[:, :, 0, 2:].any()
    value = (x[:, None] @ heads.value.mT + heads.value_bias[:, None]).repeat_interleave(2, 1)
    close((pattern @ value).transpose(1, 2), attention.outputs(heads, x)[:, rows])


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_svd_is_lossless_for_an_expanded_model_in_any_gauge(case, data):
    small, partition = random_heads(case[1], case[2]), Partition.contiguous(*case)
    large, x = regauged(expand(small, partition)), inputs()
    close(attend(large, x[0]), attend(small, x[0]))
    back = converted("svd", large, partition, x if data else None)
    close(attend(back, x[0]), attend(small, x[0]))
    if case[1] != case[0]:
        assert (attend(converted("mean", large, partition), x[0]) - attend(small, x[0])).abs().max() > 1e-2


def test_procrustes_is_lossless_for_copies_in_any_gauge():
    small, partition = random_heads(3, 3), Partition.contiguous(7, 3, 3)
    large, x = expand(small, partition), inputs()
    sizes = torch.tensor([len(group) for group in partition.kv_groups for _ in group])
    shared = small.output[[g for g, group in enumerate(partition.kv_groups) for _ in group]] / sizes[:, None, None]
    back = converted("procrustes", regauged(dataclasses.replace(large, output=shared)), partition, x)
    close(attend(back, x[0]), attend(small, x[0]))


@pytest.mark.parametrize("method", ["svd", "procrustes"])
def test_the_gauge_of_the_source_does_not_matter(method):
    heads, x, partition = random_heads(6, 6), inputs(), Partition.contiguous(6, 4, 2)
    other = regauged(heads)
    close(attend(other, x[0]), attend(heads, x[0]))
    close(attend(converted(method, other, partition, x), x[0]), attend(converted(method, heads, partition, x), x[0]))
    plain = [attend(converted("mean", h, partition), x[0]) for h in (heads, other)]
    assert (plain[0] - plain[1]).abs().max() > 1e-2


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.booleans(), st.sampled_from([(4, 2), (3, 3), (6, 2), (2, 1)]))
def test_the_order_of_heads_does_not_matter_to_a_searched_partition(order, data, counts):
    torch.manual_seed(1)
    heads, x = random_heads(6, 6), inputs()
    names = [f.name for f in dataclasses.fields(heads) if f.name != "output_bias"]
    shuffled = dataclasses.replace(heads, **{name: getattr(heads, name)[list(order)] for name in names})
    outputs = []
    for source in (heads, shuffled):
        known = statistics(source, x if data else None)
        partition = search(source, known, *counts, generator())
        outputs.append(attend(converted("svd", source, partition, x if data else None), x[0]))
    close(outputs[0], outputs[1], 1e-6)


def test_an_exact_search_finds_the_cheapest_of_all_partitions():
    heads = random_heads(6, 6)
    known = statistics(heads, inputs())
    cost = GroupCost(CircuitGrams(heads, known), 2, generator())
    every = {
        tuple(sorted(tuple(sorted((tuple(sorted(o[3 * g : 3 * g + 2])), o[3 * g + 2 : 3 * g + 3]))) for g in (0, 1)))
        for o in permutations(range(6))
    }
    cheapest = min(sum(cost.costs(groups)) for groups in every)
    found = search(heads, known, 4, 2, generator())
    assert sum(cost.costs(found.groups)) == pytest.approx(cheapest)
    contiguous = sum(cost.costs(Partition.contiguous(6, 4, 2).groups))
    assert sum(map(cost, arrange(tuple(range(6)), 2, cost, generator()))) == pytest.approx(cheapest)
    assert cheapest < contiguous


@pytest.mark.parametrize(("size", "parts"), [(8, 3), (7, 2), (5, 4), (5, 1)])
@pytest.mark.parametrize("seed", range(8))
def test_few_heads_are_arranged_at_the_least_cost_there_is(size, parts, seed):
    """Costs that say nothing of each other, in which a search by swaps gets stuck."""
    draw = torch.Generator().manual_seed(seed)
    costs = {
        group: torch.rand(1, generator=draw).item() for n in range(size + 1) for group in combinations(range(size), n)
    }
    cuts = [i * (size // parts) + min(i, size % parts) for i in range(parts + 1)]
    cheapest = min(
        sum(costs[tuple(sorted(order[a:b]))] for a, b in pairwise(cuts)) for order in permutations(range(size))
    )
    found = arrange(tuple(range(size)), parts, costs.__getitem__, generator())
    assert sum(map(costs.__getitem__, found)) == pytest.approx(cheapest)
    assert sorted(h for group in found for h in group) == list(range(size))
    assert sorted(map(len, found)) == sorted(b - a for a, b in pairwise(cuts))


@pytest.mark.parametrize(("counts", "way"), [
    ((12, 8, 4), "exact"), ((12, 6, 3), "swapped"), ((16, 8, 8), "exact"), ((16, 8, 4), "swapped"),
    ((25, 5, 5), "swapped"),
])  # fmt: skip
def test_what_is_searched_exactly(counts, way, monkeypatch):
    """At 64 dimensions a head: the work grows with the number of possible groups and the cube of their width."""

    class FoundError(Exception):
        pass

    def found(*_):
        raise FoundError

    heads = AttentionHeads(*(torch.randn(counts[0], 64, D).double() for _ in range(4)))
    monkeypatch.setattr(search_module, way, found)
    with pytest.raises(FoundError):
        search(heads, statistics(heads), *counts[1:], generator())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_groups_found_by_their_pairs_cost_little_more_than_the_cheapest(kind, monkeypatch):
    source = open_source(f"sample:{kind}")
    plan = make_plan(source, Request(8, 4, method="svd", calibration=None))
    site = plan.sites[-1]
    heads = read_site(plan, source, site).tensors()
    norms = ((read_norm(plan, source, prefix)[0], None) for prefix in plan.family.norms(site))
    known = from_norms(heads, plan.family.attention(site, source.config), *norms)
    cost = GroupCost(CircuitGrams(heads, known), 2, generator())
    cheapest = search(heads, known, 8, 4, generator())
    monkeypatch.setattr(search_module, "_MOST_COSTS", 0)
    found = search(heads, known, 8, 4, generator())
    best, by_pairs = (sum(cost.costs(partition.groups)) for partition in (cheapest, found))
    assert best * (1 - 1e-9) <= by_pairs < 1.1 * best


@pytest.mark.parametrize(
    "counts", [(25, 10, 10), (32, 16, 16), (25, 13, 1), (25, 4, 1), (16, 8, 4), (20, 6, 3), (5, 5, 1)]
)
def test_search_keeps_sizes_even_at_any_head_count(counts):
    heads = random_heads(counts[0], counts[0])
    partition = search(heads, statistics(heads), *counts[1:], generator())
    assert partition.heads == counts[0] and len(partition.clusters) == counts[1]
    sizes = [len(group) for group in partition.kv_groups]
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == counts[2]
    for group in partition.groups:
        assert max(map(len, group)) - min(map(len, group)) <= 1


def test_search_puts_copies_together():
    small = random_heads(3, 3)
    partition = Partition((((0, 4),), ((1, 3),), ((2, 5),)))
    found = search(
        regauged(expand(small, partition)), statistics(expand(small, partition), inputs()), 3, 3, generator()
    )
    assert {frozenset(group) for group in found.kv_groups} == {frozenset(group) for group in partition.kv_groups}


def test_heads_wider_than_the_model_convert():
    torch.manual_seed(2)
    wide = AttentionHeads(*(torch.randn(4, 9, 6, dtype=torch.float64) for _ in range(4)))
    attention, x = Attention(1.0, True), torch.randn(40, T, 6, dtype=torch.float64)
    known = collect(wide, attention, [Inputs(x)], 1.0, generator())
    for method in ("svd", "procrustes"):
        result = get_method(method).convert(wide, Partition.contiguous(4, 2, 1), known)
        assert result.key.shape == (1, 9, 6) and attention.layer(result, x).isfinite().all()


@pytest.mark.parametrize("method", ["svd", "procrustes"])
@pytest.mark.parametrize("fault", ["dead", "copies", "one token", "flat inputs", "rank"])
def test_degenerate_sites_convert_to_finite_heads(method, fault):
    heads, x = random_heads(6, 6), inputs()
    if fault == "dead":
        zero = {name: getattr(heads, name).clone() for name in ("query", "key", "value", "output")}
        for weights in zero.values():
            weights[[0, 3]] = 0
        heads = dataclasses.replace(heads, **zero)
    if fault == "copies":
        heads = dataclasses.replace(
            heads, **{n: getattr(heads, n)[[0] * 6] for n in ("query", "key", "value", "output")}
        )
    x = {"one token": x[:1, :1], "flat inputs": torch.ones_like(x), "rank": x[..., :2] @ torch.ones(2, D).double()}.get(
        fault, x
    )
    known = statistics(heads, x)
    partition = search(heads, known, 4, 2, generator())
    result = converted(method, heads, partition, x)
    wanted = ATTENTION.layer(heads, x)
    result = refit(result, ATTENTION, [(Inputs(x), wanted)])
    for field in dataclasses.fields(result):
        weights = getattr(result, field.name)
        assert weights.isfinite().all() and weights.abs().max() < 1e6, field.name
    assert output_error(result, ATTENTION, [(Inputs(x), wanted)]) < 1.5 or fault in ("one token", "flat inputs")


def test_position_bias_follows_the_pattern_that_is_kept():
    heads = random_heads(6, 6, biases=False)
    heads = dataclasses.replace(heads, query=torch.zeros_like(heads.query), key=torch.zeros_like(heads.key))
    x, partition = inputs(), Partition.contiguous(6, 4, 2)
    result = converted("svd", heads, partition, x)
    for column, cluster in zip(result.position_bias, partition.clusters, strict=True):
        assert torch.equal(column, heads.position_bias[statistics(heads, x).representative(cluster)[0]])
    mean = converted("mean", heads, partition)
    for column, cluster in zip(mean.position_bias, partition.clusters, strict=True):
        close(column, heads.position_bias[list(cluster)].mean(0))
    merged = attend(result, x[0])
    assert merged.isfinite().all() and (merged - attend(mean, x[0])).abs().max() > 1e-3


@pytest.mark.parametrize("biases", [True, False])
def test_refit_finds_a_lost_output_projection(biases):
    heads, x = random_heads(4, 2, biases), inputs()
    wanted = ATTENTION.layer(heads, x)
    lost = dataclasses.replace(heads, output=torch.randn_like(heads.output))
    found = refit(lost, ATTENTION, [(Inputs(part), ATTENTION.layer(heads, part)) for part in x.split(7)])
    assert output_error(lost, ATTENTION, [(Inputs(x), wanted)]) > 0.5
    assert output_error(found, ATTENTION, [(Inputs(x), wanted)]) < 1e-4
    assert (found.output_bias is None) == (not biases)


def test_refit_on_fewer_tokens_than_unknowns_stays_near_its_start():
    heads, x = random_heads(4, 2), inputs()[:1, :2]
    wanted = ATTENTION.layer(heads, x)
    close(refit(heads, ATTENTION, [(Inputs(x), wanted)]).output, heads.output)
    start = dataclasses.replace(heads, output=heads.output * 1.3)
    found = refit(start, ATTENTION, [(Inputs(x), wanted)]).output
    assert found.isfinite().all() and (found - start.output).norm() < (heads.output - start.output).norm()


@pytest.mark.parametrize("cross", [False, True])
def test_refine_lowers_the_error_and_repeats_exactly(cross):
    heads, x = random_heads(6, 6, table=not cross), inputs().float()
    heads = dataclasses.replace(
        heads, **{f.name: v.float() for f in dataclasses.fields(heads) if (v := getattr(heads, f.name)) is not None}
    )
    memory = inputs().float()[:, :5] if cross else None
    attention = Attention(d**-0.5, False) if cross else ATTENTION
    wanted = attention.layer(heads, x, memory)
    start = converted("mean", heads, Partition.contiguous(6, 4, 2))
    refined = [refine(start, attention, [(Inputs(x, memory), wanted)], 60, generator()) for _ in range(2)]
    errors = [output_error(h, attention, [(Inputs(x, memory), wanted)]) for h in (start, refined[0])]
    assert errors[1] < 0.7 * errors[0]
    for field in dataclasses.fields(start):
        values = [getattr(h, field.name) for h in refined]
        assert values[0] is None or torch.equal(*values), field.name
    assert torch.equal(refined[0].key_bias, start.key_bias) and torch.equal(refined[0].value_bias, start.value_bias)


def test_adapted_values_lower_the_cost_of_a_borrowed_pattern():
    heads, x = random_heads(4, 4), inputs(200)
    known = statistics(heads, x)
    pattern = ATTENTION.patterns(heads, x, torch.arange(T))
    value = x[:, None] @ heads.value.mT
    for i, j in ((0, 1), (2, 3)):
        lost = ((pattern[:, i] - pattern[:, j]) @ value[:, i]) @ heads.output[i]
        plain = (lost - lost.mean((0, 1))).square().sum(-1).mean().item()
        assert 0 < known.pattern_cost[i, j] < plain
    assert not known.pattern_cost.diagonal().any()


def test_similarity_is_one_for_copies_and_in_range():
    heads = random_heads(5, 5)
    index = [0, 1, 0, 3, 4]
    heads = dataclasses.replace(
        heads, **{f.name: getattr(heads, f.name)[index] for f in dataclasses.fields(heads) if f.name != "output_bias"}
    )
    for matrix in similarity(heads, statistics(heads, inputs())).values():
        assert matrix[0][2] == pytest.approx(1, abs=2e-3)
        assert all(-1e-6 <= value <= 1 for row in matrix for value in row)
        assert matrix[0][1] < 0.98
