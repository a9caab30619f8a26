"""Methods and partitions of the user's own: objects, functions, names, and partitions of single sites."""

import dataclasses
import functools
import json

import pytest
import torch
from helpers import gpt2, t5

from sqa_convert import METHODS, Calibration, Partition, convert, load
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import CheckpointError, RecipeError
from sqa_convert.heads import AttentionHeads, Method, register_method
from sqa_convert.heads.statistics import Statistics

PAIRS = Partition(tuple(((i,), (i + 6,)) for i in range(6)))  # 12/6
THIRDS = Partition((((0, 5, 7), (1, 2, 3)), ((4, 6, 8), (9, 10, 11))))  # 4/2
OTHER = Partition((((11, 10, 9), (8, 7, 6)), ((5, 4, 3), (2, 1, 0))))  # 4/2
FITTED = Calibration(tokens=1024, refine_steps=2)


def weights(conversion):
    return conversion.model.state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def partitions_of(conversion):
    groups = {f"{s['kind']}.{s['layer']}": s["partition"] for s in conversion.report["sites"]}
    return {site: Partition(groups) for site, groups in groups.items()}


def last(heads, partition, statistics):
    """The last head of each group."""
    assert isinstance(statistics, Statistics) and isinstance(heads.key, torch.Tensor)
    clusters, groups = [c[-1] for c in partition.clusters], [g[-1] for g in partition.kv_groups]
    chosen = {"key": groups, "value": groups, "key_bias": groups, "value_bias": groups}
    arrays = vars(heads).items()
    return AttentionHeads(
        **{n: a if a is None or n == "output_bias" else a[chosen.get(n, clusters)] for n, a in arrays}
    )


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield register_method
    METHODS.clear()
    METHODS.update(before)


def test_a_method_is_taken_as_an_object_and_by_its_function():
    model = gpt2()
    by_name = convert(model, 6, 2, "mean")
    for given in (METHODS["mean"], METHODS["mean"].convert):
        made = convert(model, 6, 2, method=given)
        assert same(weights(made), weights(by_name))
        assert made.report["method"] == "mean"


def test_a_function_merges_heads_and_the_report_and_card_hold_its_name(tmp_path):
    model = gpt2()
    made = convert(model, method=last, partition=THIRDS, output=tmp_path / "out", calibration=None)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == made.report["method"] == "last"
    assert {site["method"] for site in report["sites"]} == {"last"}
    assert "method `last`" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sqa"]["method"] == "last"
    value = model.transformer.h[0].attn.c_attn.weight[:, 96:].T.view(12, 4, 48)
    assert torch.equal(weights(made)["transformer.h.0.attn.v_proj.weight"].view(2, 4, 48), value[[3, 11]])


def test_a_function_is_fitted_as_other_methods_are():
    made = convert(gpt2(layers=1), 6, 2, last, calibration=FITTED)
    errors = made.report["sites"][0]["output_error"]
    assert errors["refined"] < errors["converted"] and made.report["sites"][0]["method"] == "last"


def test_functions_without_a_name_of_their_own_have_one():
    def times(heads, partition, statistics, factor):
        return METHODS["mean"].convert(heads, partition, statistics)

    class Merge:
        def __call__(self, heads, partition, statistics):
            return METHODS["mean"].convert(heads, partition, statistics)

    named = {"times": functools.partial(times, factor=2), "Merge": Merge(), "<lambda>": lambda h, p, s: last(h, p, s)}
    for name, given in named.items():
        assert convert(gpt2(layers=1), 6, 2, given, calibration=None).report["method"] == name


def test_a_result_that_is_being_trained_is_taken_as_it_is():
    def trained(heads, partition, statistics):
        made = last(heads, partition, statistics)
        return dataclasses.replace(made, value=made.value.clone().requires_grad_())

    model = gpt2(layers=1)
    made = convert(model, method=trained, partition=THIRDS, calibration=None)
    assert same(weights(made), weights(convert(model, method=last, partition=THIRDS, calibration=None)))


def test_a_registered_method_is_found_by_its_name_and_defined_anew_it_takes_its_own_place(registered):
    assert registered("last", summary="of each group", source="here", needs_statistics=True)(last) is last
    assert METHODS["last"] == Method("last", "of each group", "here", last, True)
    assert convert(gpt2(layers=1), 6, 2, "last", calibration=None).report["method"] == "last"
    registered("last")(last)
    assert (METHODS["last"].summary, METHODS["last"].source) == (
        "The last head of each group.",
        "test_own_methods.last",
    )

    def another(heads, partition, statistics):
        return last(heads, partition, statistics)

    for name in ("last", "mean", "auto"):
        with pytest.raises(RecipeError, match=f"there is a method {name} already"):
            registered(name)(another)


def test_another_method_under_a_name_that_is_taken_is_refused():
    def mean(heads, partition, statistics):
        return last(heads, partition, statistics)

    for given in (
        mean,
        dataclasses.replace(METHODS["svd"], name="mean"),
        dataclasses.replace(METHODS["svd"], name="auto"),
    ):
        with pytest.raises(RecipeError, match="is the name of another method"):
            convert(gpt2(layers=1), 6, 2, given)
    with pytest.raises(RecipeError, match="give a name, a Method or a function"):
        convert(gpt2(layers=1), 6, 2, 3)


@pytest.mark.parametrize("calibration", [None, FITTED])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda h, p, s: h, r"query of shape \(12, 4, 48\): it must be \(6, 4, 48\)"),
        (lambda *site: dataclasses.replace(last(*site), key_bias=None), r"key_bias of shape None: it must be \(2, 4\)"),
        (lambda *site: dataclasses.replace(last(*site), value=[1]), r"value of shape \(\): it must be \(2, 4, 48\)"),
        (lambda h, p, s: (h.query, h.key), "a tuple: it must return AttentionHeads"),
    ],
)  # fmt: skip
def test_what_a_function_returns_must_be_the_heads_of_the_partition(wrong, says, calibration):
    with pytest.raises(RecipeError, match=f"^method <lambda> returned .*{says}") as error:
        convert(gpt2(layers=1), 6, 2, wrong, calibration=calibration)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["mean", "svd", "auto"])
@pytest.mark.parametrize("calibration", [None, FITTED])
def test_a_given_partition_is_that_of_every_layer_and_says_how_many_heads_are_kept(method, calibration):
    made = convert(gpt2(), method=method, partition=THIRDS, calibration=calibration)
    assert set(partitions_of(made).values()) == {THIRDS}
    assert made.model.config.heads("decoder") == (4, 2)
    if calibration and method == "auto":
        assert made.report["calibration"]["kl_before_refine"].keys() == {"svd", "procrustes"}


def test_partitions_are_given_by_kind_and_by_layer_and_the_layer_wins():
    made = convert(gpt2(layers=3), method="mean", partition={"decoder.1": OTHER, "decoder": THIRDS})
    assert partitions_of(made) == {"decoder.0": THIRDS, "decoder.1": OTHER, "decoder.2": THIRDS}


@pytest.mark.parametrize("calibration", [None, pytest.param(FITTED, marks=pytest.mark.integration)])
def test_sites_that_none_is_given_for_are_searched(calibration):
    model = gpt2()
    searched = convert(model, 4, 2, "svd", allocation="uniform", calibration=calibration)
    made = convert(model, method="svd", partition={"decoder.1": OTHER}, calibration=calibration)
    assert partitions_of(made) == partitions_of(searched) | {"decoder.1": OTHER}


def test_kinds_of_a_t5_may_keep_different_numbers_of_heads():
    given = {"encoder": THIRDS, "decoder": PAIRS}
    made = convert(t5(), method="mean", partition=given, sites=("encoder", "decoder"))
    kept = {name.split(".")[0]: partition for name, partition in partitions_of(made).items()}
    assert kept == {"encoder": THIRDS, "decoder": PAIRS, "cross": Partition.identity(12)}
    both = convert(t5(), 8, 4, "mean", partition={"encoder.0": Partition.contiguous(12, 8, 4)})
    assert both.model.config.heads("cross") == (8, 4)


UNEVEN = {
    "gpt2": (gpt2, {"decoder.0": THIRDS, "decoder.1": PAIRS}, {"decoder": [(4, 2), (12, 6), (12, 12)]}),
    "t5": (
        t5,
        {"encoder": THIRDS, "encoder.1": Partition.identity(12), "decoder.0": OTHER, "cross.1": PAIRS},
        {"encoder": [(4, 2), (12, 12), (4, 2)], "decoder": [(4, 2), (12, 12)], "cross": [(12, 12), (12, 6)]},
    ),
}
"""source, partitions, and what each layer has then; layers that are not named keep all heads"""


@pytest.mark.parametrize("family", UNEVEN)
def test_layers_of_different_numbers_of_heads_from_end_to_end(family, tmp_path):
    make, given, kept = UNEVEN[family]
    source = make(layers=3, n_positions=64)
    how = {"partition": given, "calibration": FITTED, "method": "auto"}
    made = convert(source, 12, 12, output=tmp_path / "out", **how)
    assert same(weights(made), weights(convert(source, 12, 12, **how)))
    for kind, layers in kept.items():
        assert [made.model.config.heads(kind, i) for i in range(len(layers))] == layers
    partitions = partitions_of(made)
    assert all(partitions[site] == partition for site, partition in given.items() if "." in site)
    fitted = {f"{s['kind']}.{s['layer']}" for s in made.report["sites"] if "output_error" in s}
    assert fitted == {name for name, partition in partitions.items() if not partition.is_identity}

    cost = made.report["cost"]["after"]
    assert cost["key_value_heads"] == {kind: [kv for _, kv in layers] for kind, layers in kept.items()}
    assert cost["query_heads"] == {k: [q for q, _ in v] if k != "cross" else 12 for k, v in kept.items()}
    assert "4 to 12 by layer, mean" in repr(made) and cost["parameters"] == made.model.num_parameters()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4/2, 12/6, 12/12" in card if family == "gpt2" else "encoder 4/2, 12/12, 4/2" in card

    made.model.save_pretrained(tmp_path / "saved")  # without a report
    rebuilt = load(tmp_path / "saved", source)
    assert rebuilt.report["cost"] == made.report["cost"] and same(weights(rebuilt), weights(made))
    for other in (make(layers=4, n_positions=64), make(heads=6, layers=3, n_positions=64)):
        with pytest.raises(CheckpointError, match="is not what the model was made from"):
            load(tmp_path / "saved", other)
    written, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved"))
    for key in ("layer_heads", "per_layer_config"):
        assert written.get(key) == saved.get(key)


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("method", ["mean", "svd"])
def test_a_layer_is_converted_as_it_would_be_where_all_keep_its_number_of_heads(family, method):
    make, given, _ = UNEVEN[family]
    source, left = make(layers=3), {"gpt2": ("decoder.2", "h.2.attn"), "t5": ("decoder.1", "block.1.layer.0.Self")}
    made = convert(source, 6, 3, method, partition=given, calibration=None)
    assert made.report["cost"]["after"]["parameters"] == made.model.num_parameters()
    alone = convert(source, 6, 3, method, calibration=None)
    name, inside = left[family]
    assert partitions_of(made)[name] == partitions_of(alone)[name]
    found = {key: tensor for key, tensor in weights(made).items() if inside in key and key.split(".")[0] != "encoder"}
    assert found and all(torch.equal(tensor, weights(alone)[key]) for key, tensor in found.items())


def test_layers_that_no_partition_is_given_for_need_counts_where_the_given_differ():
    model, given = gpt2(layers=3), {"decoder.0": THIRDS, "decoder.1": PAIRS}
    with pytest.raises(RecipeError, match=r"4/2 heads in decoder.0 and 12/6 in decoder.1: give .* for the layers"):
        convert(model, method="mean", partition=given)
    made = convert(model, variant="sqa", method="mean", partition=given)
    assert made.model.config.heads("decoder", 2) == (6, 3)


def test_heads_that_stay_on_their_own_stay_in_their_order():
    model = gpt2(layers=1)
    alone = Partition(tuple(((i,),) for i in reversed(range(12))))
    made = convert(model, method="mean", partition=alone)
    assert partitions_of(made)["decoder.0"] == Partition.identity(12)
    ids = torch.arange(9)[None]
    assert torch.allclose(made.model(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"partition": THIRDS, "q_groups": 6}, "6: .* of decoder keeps 4 query heads"),
        ({"partition": THIRDS, "q_groups": 4, "kv_groups": 1}, "1: .* of decoder keeps 2 key/value heads"),
        ({"partition": THIRDS, "variant": "sqa"}, r"'sqa' \(6\): .* of decoder keeps 4 query heads"),
        ({"partition": Partition.contiguous(6, 4, 2)}, "of decoder: it is of 6 heads, the source has 12"),
        ({"partition": {"decoder.0": THIRDS, "decoder.1": PAIRS}, "q_groups": 4, "kv_groups": 2},
         "4: .* of decoder keeps 12 query heads"),
        ({"partition": {"decoder.2": THIRDS}}, r"of decoder.2: what is converted is decoder: decoder.0 … 1"),
        ({"partition": {"encoder": THIRDS}}, "of encoder: what is converted"),
        ({"partition": {0: THIRDS}}, "of 0: what is converted"),
        ({"partition": {"decoder": "searched"}}, "of decoder: searched is no Partition"),
        ({"partition": 3}, "choose searched or contiguous"),
        ({"partition": {}}, "give .*q.groups and .*kv.groups"),
    ],
)  # fmt: skip
def test_partitions_that_cannot_be_are_refused(asked, says):
    with pytest.raises(RecipeError, match=says):
        convert(gpt2(), method="mean", **asked)


def test_kinds_without_a_partition_need_counts_or_are_left_out():
    with pytest.raises(RecipeError, match=r"is given for none of decoder: give .* or leave decoder out"):
        convert(t5(), method="mean", partition={"encoder": THIRDS})
    made = convert(t5(), method="mean", partition={"encoder": THIRDS}, sites="encoder")
    assert made.model.config.heads("decoder") == (12, 12)


@pytest.mark.parametrize("sites", ["encoder", "encoder,", ("encoder",), ["encoder"], {"encoder"}])
def test_one_kind_of_attention_may_be_given_as_its_name(sites):
    made = convert(t5(), 6, 2, "mean", sites=sites)
    assert made.model.config.heads("encoder") == (6, 2) and made.model.config.heads("cross") == (12, 12)


@pytest.mark.parametrize("make", [gpt2, t5])
def test_a_model_comes_back_in_the_dtype_that_it_was_moved_to(make, tmp_path):
    source = make()
    source.config.dtype = torch.float32  # as of one that was loaded
    source.to(torch.bfloat16)
    made, in_memory = convert(source, 6, 2, "mean", output=tmp_path / "out"), convert(source, 6, 2, "mean")
    for model in (made.model, in_memory.model):
        assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {
            torch.bfloat16
        }
        assert model.config.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("needs_statistics", [True, False])
def test_heads_are_shared_out_by_a_method_that_has_a_name_and_wants_statistics(needs_statistics, registered):
    registered("last", needs_statistics=needs_statistics)(last)
    source = ModelSource(gpt2(heads=4))
    assert make_plan(source, Request(2, 1, method="last")).shares_out == needs_statistics
    assert not make_plan(source, Request(2, 1, method=last)).shares_out
