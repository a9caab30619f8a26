"""The methods on bare weights: what they must keep, and what they may not."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_convert.errors import RecipeError
from sqa_convert.heads import METHODS, AttentionHeads, Partition, get_method
from sqa_convert.heads.attend import Attention
from sqa_convert.heads.site_inputs import Inputs
from sqa_convert.heads.statistics import collect, from_norms

D, d, T, BUCKETS = 24, 5, 7, 8


def random_heads(q_heads, kv_heads, biases=True, table=True):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return AttentionHeads(
        query=make(q_heads, d, D),
        key=make(kv_heads, d, D),
        value=make(kv_heads, d, D),
        output=make(q_heads, d, D),
        query_bias=make(q_heads, d) if biases else None,
        key_bias=make(kv_heads, d) if biases else None,
        value_bias=make(kv_heads, d) if biases else None,
        output_bias=make(D) if biases else None,
        position_bias=make(q_heads, BUCKETS) if table else None,
    )


ATTENTION = Attention(d**-0.5, causal=False, bucket=lambda distance: distance % BUCKETS)


def statistics(heads, x=None):
    """From data x (B, T, D), else from the weights of a norm."""
    if x is None:
        return from_norms(heads, ATTENTION, (torch.linspace(0.5, 2, D), None), (torch.linspace(0.5, 2, D), None))
    return collect(heads, ATTENTION, [Inputs(part) for part in x.split(4)], 1.0, torch.Generator())


def inputs(count=60):
    """Correlated inputs (B, T, D) with a mean."""
    mixing = torch.randn(D, D, dtype=torch.float64) * torch.logspace(0, -1.5, D, dtype=torch.float64)
    return torch.randn(count, T, D, dtype=torch.float64) @ mixing.T + torch.randn(D, dtype=torch.float64)


def converted(method, heads, partition, x=None):
    needs = get_method(method).needs_statistics
    return get_method(method).convert(heads, partition, statistics(heads, x) if needs else None)


def attend(heads, x):
    """The layer's output (T, D), straight from the definition; distance j - i picks the bucket of the position bias."""
    repeat = len(heads.query) // len(heads.key)
    total = torch.zeros(len(x), D, dtype=x.dtype) + (0 if heads.output_bias is None else heads.output_bias)

    def project(weight, bias, h):
        return x @ weight[h].T + (0 if bias is None else bias[h])

    for i in range(len(heads.query)):
        query = project(heads.query, heads.query_bias, i)
        key, value = (
            project(heads.key, heads.key_bias, i // repeat),
            project(heads.value, heads.value_bias, i // repeat),
        )
        scores = query @ key.T * d**-0.5
        if heads.position_bias is not None:
            position = torch.arange(len(x))
            scores = scores + heads.position_bias[i][(position[None] - position[:, None]) % BUCKETS]
        total = total + scores.softmax(-1) @ value @ heads.output[i]
    return total


def expand(small, partition):
    """An equal MHA: keys and values copied to each head of the group, queries to each of the cluster, Wo shared out."""
    of_cluster = {h: c for c, cluster in enumerate(partition.clusters) for h in cluster}
    of_group = {h: g for g, group in enumerate(partition.kv_groups) for h in group}
    q = [of_cluster[h] for h in range(partition.heads)]
    kv = [of_group[h] for h in range(partition.heads)]
    share = torch.rand(partition.heads, dtype=torch.float64) + 0.1
    for cluster in partition.clusters:
        share[list(cluster)] /= share[list(cluster)].sum()

    def pick(weights, index):
        return None if weights is None else weights[index]

    return AttentionHeads(
        query=small.query[q],
        key=small.key[kv],
        value=small.value[kv],
        output=small.output[q] * share[:, None, None],
        query_bias=pick(small.query_bias, q),
        key_bias=pick(small.key_bias, kv),
        value_bias=pick(small.value_bias, kv),
        output_bias=small.output_bias,
        position_bias=pick(small.position_bias, q),
    )


CASES = [(12, 8, 4), (12, 6, 3), (7, 4, 2), (5, 3, 1), (6, 2, 2), (9, 9, 3)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["mean", "first"])
def test_expand_then_contract_is_lossless(method, case):
    partition = Partition.contiguous(*case)
    small = random_heads(case[1], case[2])
    large = expand(small, partition)
    x = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(attend(large, x), attend(small, x), rtol=1e-10, atol=1e-10)
    back = get_method(method).convert(large, partition, None)
    torch.testing.assert_close(attend(back, x), attend(small, x), rtol=1e-10, atol=1e-10)


def test_expand_then_contract_is_lossless_for_a_partition_out_of_order():
    partition = Partition((((3, 0), (5,)), ((1,), (6, 2, 4))))
    small = random_heads(4, 2)
    back = get_method("mean").convert(expand(small, partition), partition, None)
    x = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(attend(back, x), attend(small, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [1, 5])
def test_one_head_groups_are_copied_verbatim(method, heads):
    source = random_heads(heads, heads)
    result = converted(method, source, Partition.identity(heads))
    for field in dataclasses.fields(source):
        assert torch.equal(getattr(result, field.name), getattr(source, field.name)), field.name


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(1, 13), st.data())
def test_shapes_follow_the_partition(method, heads, data):
    q_groups = data.draw(st.integers(1, heads))
    kv_groups = data.draw(st.sampled_from([n for n in range(1, q_groups + 1) if q_groups % n == 0]))
    biases = data.draw(st.booleans())
    source = random_heads(heads, heads, biases, not biases)
    result = converted(method, source, Partition.contiguous(heads, q_groups, kv_groups))
    assert result.query.shape == result.output.shape == (q_groups, d, D)
    assert result.key.shape == result.value.shape == (kv_groups, d, D)
    assert (result.query_bias is None) == (result.key_bias is None) == (result.position_bias is not None)
    assert attend(result, torch.randn(T, D, dtype=torch.float64)).isfinite().all()


def test_mean_averages_queries_and_keys_and_sums_outputs():
    source = random_heads(3, 3)
    result = get_method("mean").convert(source, Partition((((0, 2), (1,)),)), None)
    torch.testing.assert_close(result.query[0], (source.query[0] + source.query[2]) / 2)
    torch.testing.assert_close(result.output[0], source.output[0] + source.output[2])
    torch.testing.assert_close(result.key[0], source.key.mean(0))
    torch.testing.assert_close(result.position_bias[0], (source.position_bias[0] + source.position_bias[2]) / 2)
    assert torch.equal(result.output_bias, source.output_bias)


@pytest.mark.parametrize("method", ["mean", "first", "select"])
def test_gradients_flow_through_simple_methods(method):
    """Heads may be parameters that require gradients."""
    source = random_heads(6, 6)
    for weights in vars(source).values():
        weights.requires_grad_()
    result = get_method(method).convert(source, Partition.contiguous(6, 4, 2), None)
    sum(weights.sum() for weights in vars(result).values()).backward()
    assert all(weights.grad.abs().sum() > 0 for weights in vars(source).values())


def test_first_takes_the_first_head_of_each_group():
    source = random_heads(4, 4)
    result = get_method("first").convert(source, Partition((((2, 0), (1, 3)),)), None)
    assert torch.equal(result.query, source.query[[2, 1]])
    assert torch.equal(result.key, source.key[[2]])
    torch.testing.assert_close(result.output, torch.stack([source.output[[2, 0]].sum(0), source.output[[1, 3]].sum(0)]))


def test_select_keeps_the_head_with_the_largest_output_map_whatever_its_gauge():
    source = random_heads(4, 4, biases=False)
    value, output = source.value.clone(), source.output.clone()
    output[3] *= 100
    value[1], output[1] = value[1] * 1e3, output[1] / 1e3  # the same map in another gauge
    source = dataclasses.replace(source, value=value, output=output)
    norms = torch.stack([torch.linalg.matrix_norm(value[h].T @ output[h]) for h in range(4)])
    result = get_method("select").convert(source, Partition((((0, 1), (2, 3)),)), None)
    best = max((0, 1), key=lambda h: norms[h])
    assert torch.equal(result.query, source.query[[best, 3]])
    assert torch.equal(result.output, source.output[[best, 3]])
    assert torch.equal(result.value, source.value[[3]])
    assert torch.equal(result.position_bias, source.position_bias[[best, 3]])


def test_every_method_names_its_source():
    for method in METHODS.values():
        assert "arXiv" in method.source
        assert method.summary


def test_unknown_method_is_refused():
    with pytest.raises(RecipeError, match="choose one of auto, svd, procrustes, mean, first, select"):
        get_method("median")
