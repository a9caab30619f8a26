import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqa_convert.errors import RecipeError
from sqa_convert.heads import VARIANTS, Partition, check_head_counts, variant_heads


@st.composite
def counts(draw):
    heads = draw(st.integers(1, 40))
    q_groups = draw(st.integers(1, heads))
    return heads, q_groups, draw(st.sampled_from([n for n in range(1, q_groups + 1) if q_groups % n == 0]))


@given(counts())
def test_contiguous_partition_is_nested_ordered_and_as_even_as_can_be(case):
    heads, q_groups, kv_groups = case
    partition = Partition.contiguous(*case)
    assert (partition.heads, len(partition.clusters), len(partition.kv_groups)) == case
    assert [h for cluster in partition.clusters for h in cluster] == list(range(heads))
    sizes = [len(group) for group in partition.kv_groups]
    assert max(sizes) - min(sizes) <= 1
    for group in partition.groups:
        assert len(group) == q_groups // kv_groups
        assert max(map(len, group)) - min(map(len, group)) <= 1


def test_twelve_heads_to_eight_and_four():
    assert Partition.contiguous(12, 8, 4).groups == (
        ((0, 1), (2,)),
        ((3, 4), (5,)),
        ((6, 7), (8,)),
        ((9, 10), (11,)),
    )


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ((12, 9, 4), "use kv_groups=1 or 3 or 9, with 4 key/value heads use q_groups=4 or 8 or 12"),
        ((12, 13, 1), "1 to 12 query heads"),
        ((12, 0, 1), "q_groups=0"),
        ((12, 8, 0), "kv_groups=0"),
        ((12, 8, -4), "kv_groups=-4"),
        ((12, 4, 8), "use kv_groups=1 or 2 or 4, with 8 key/value heads use q_groups=8$"),
        ((25, 12, 5), "use kv_groups=2 or 3 or 4 or 6, with 5 key/value heads use q_groups=5 or 10 or 15 or 20$"),
    ],
)
def test_impossible_counts_are_refused_with_the_nearest_possible(case, says):
    with pytest.raises(RecipeError, match=says.replace("/", "[/]")):
        check_head_counts(*case)


@pytest.mark.parametrize(
    "groups",
    [
        (((0,), (1,)), ((2,),)),  # unequal numbers of clusters
        (((0,), ()),),
        (((0, 2),),),  # head 1 missing
        (((0, 0),),),
    ],
)
def test_what_is_no_partition_is_refused(groups):
    with pytest.raises(RecipeError, match="no partition"):
        Partition(groups)


def test_variants_follow_the_rounding_rule():
    twelve = {name: variant_heads(name, 12) for name in VARIANTS}
    assert twelve == {
        "gqa": (12, 3), "mqa": (12, 1), "sqa": (6, 3), "ssqa": (6, 6), "xsqa": (3, 3), "xsmqa": (3, 1), "lsqa": (9, 3),
    }  # fmt: skip
    # 25 heads: half is 12.5 and rounds up; 13 is prime, and of 1 and 13 the target 6.25 is nearer to 1.
    assert variant_heads("sqa", 25) == (13, 1)
    # 6 heads: a quarter is 1.5, rounded up to 2; gqa's target 1.5 lies between 1 and 2, the larger wins.
    assert variant_heads("xsqa", 6) == (2, 2)
    assert variant_heads("gqa", 6) == (6, 2)
    assert variant_heads("xsqa", 1) == (1, 1)
    with pytest.raises(RecipeError, match="variant='rsqa'"):
        variant_heads("rsqa", 12)


@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 64))
def test_every_variant_of_every_head_count_is_possible(variant, heads):
    check_head_counts(heads, *variant_heads(variant, heads))
