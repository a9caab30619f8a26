"""Heads shared out among layers: the arithmetic, what is asked, and what comes of it."""

import itertools
import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import gpt2, t5
from transformers import AutoConfig, T5EncoderModel

from sqa_convert import METHODS, Calibration, Partition, convert
from sqa_convert.calibration import allocation, calibrate
from sqa_convert.calibration.calibrate import Calibrator
from sqa_convert.calibration.fitter import SiteFitter
from sqa_convert.calibration.memory_budget import memory_budget
from sqa_convert.calibration.replaced_sites import Replacement
from sqa_convert.cli.convert import main
from sqa_convert.conversion.heads_by_layer import as_text, counts_of
from sqa_convert.conversion.request import Request
from sqa_convert.errors import RecipeError
from sqa_convert.heads.allocate import allocate, head_counts
from sqa_convert.pipeline.preflight import prepared
from sqa_convert.report.sentences import calibration_lines
from sqa_convert.text import quick_twin

SHORT = Calibration(tokens=2048, refine_steps=4, polish_steps=0)
BARE = Calibration(tokens=512, refine_steps=0, polish_steps=0)


def uneven_need():
    """A model of which only the middle layer says much."""
    source = gpt2(heads=4, layers=3)
    for layer in (0, 2):
        source.transformer.h[layer].attn.c_proj.weight.data *= 1e-2
    return source


@pytest.mark.parametrize("seed", range(6))
def test_no_other_counts_of_the_same_totals_cost_less(seed):
    chance = random.Random(seed)
    layers = [{counts: chance.random() for counts in head_counts(5)} for _ in range(3)]
    total = sum(q for q, _ in (chance.choice(list(layer)) for layer in layers)), 4
    sums = {
        sum(layer[c] for layer, c in zip(layers, chosen, strict=True))
        for chosen in itertools.product(*layers)
        if tuple(map(sum, zip(*chosen, strict=True))) == total
    }
    if not sums:
        with pytest.raises(ValueError, match="add up"):
            allocate(layers, total)
        return
    chosen = allocate(layers, total)
    assert tuple(map(sum, zip(*chosen, strict=True))) == total
    assert sum(layer[c] for layer, c in zip(layers, chosen, strict=True)) == pytest.approx(min(sums))


@pytest.mark.parametrize("text", ["4/2,8/4,10/5", "encoder:8/4,8/4,decoder:4/2,6/3,cross:12/12"])
def test_counts_are_read_as_they_are_written(text):
    assert as_text(counts_of(text)) == text
    assert counts_of(dict(counts_of(text))) == counts_of(text)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"allocation": "even"}, "'even': choose auto, uniform or adaptive, or give counts of every layer"),
        ({"allocation": "8/4,8"}, "choose auto, uniform or adaptive"),
        ({"allocation": {"decoder": [8, 4]}}, "choose auto, uniform or adaptive"),
        ({"allocation": "8/4,4/2", "q_groups": 8}, "leave out q_groups"),
        ({"allocation": "8/4"}, "1 counts of decoder, which has 2 layers"),
        ({"allocation": "8/4,8/3"}, "kv_groups=3 must divide q_groups=8"),
        ({"allocation": "encoder:8/4,8/4"}, "is of encoder: what is converted is decoder"),
        ({"allocation": {"decoders": ((8, 4), (8, 4))}}, "is of decoders: what is converted is decoder"),
        ({"allocation": "adaptive"}, "give q_groups"),
        ({"allocation": "adaptive", "q_groups": 8, "kv_groups": 4, "calibration": None}, "needs text"),
        ({"allocation": "adaptive", "q_groups": 8, "kv_groups": 4, "method": "mean"}, "needs text"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(asked, says):
    with pytest.raises(RecipeError, match=says):
        convert(gpt2(), **asked)


@pytest.mark.parametrize("asked", ["auto", "adaptive"])
def test_one_layer_has_none_to_share_with(asked):
    made = convert(gpt2(heads=4, layers=1), 2, 1, allocation=asked, calibration=SHORT)
    assert made.model.config.heads() == (2, 1) and "allocation" not in made.report["calibration"]


@pytest.mark.parametrize(
    "asked",
    [
        {"variant": "sqa"},
        {"method": "mean", "calibration": replace(SHORT, refit=True)},
        {"method": lambda heads, partition, statistics: METHODS["mean"].convert(heads, partition, statistics)},
        {"partition": Partition.contiguous(4, 2, 1)},
        {"calibration": None},
        {"allocation": "uniform"},
    ],
    ids=["variant", "mean", "own method", "partition", "blind", "uniform"],
)
def test_layers_keep_as_many_where_somebody_has_said_so(asked):
    heads = {} if "variant" in asked else {"q_groups": 2, "kv_groups": 1}
    made = convert(uneven_need(), **{"calibration": SHORT} | heads | asked)
    assert len({made.model.config.heads("decoder", layer) for layer in range(3)}) == 1
    assert "allocation" not in made.report.get("calibration", {})


def test_heads_that_are_shared_out_and_lose_more_are_not(monkeypatch):
    """Layers whose costs are told the wrong way round."""
    told = allocation.site_costs

    def upside_down(*given):
        return {counts: -cost for counts, cost in told(*given).items()}

    monkeypatch.setattr(allocation, "site_costs", upside_down)
    made = convert(uneven_need(), 2, 2, calibration=SHORT)
    told_of = made.report["calibration"]["allocation"]
    assert not told_of["kept"] and told_of["kl"] > told_of["kl_evenly"]
    assert {made.model.config.heads("decoder", layer) for layer in range(3)} == {(2, 2)}
    assert any("would not lose less" in line for line in calibration_lines(made.report))


def test_even_heads_of_a_large_model_are_fitted_as_if_none_had_been_shared_out(monkeypatch):
    """Candidates are compared on a part of the text, by the unknowns of even heads: where a layer keeps 4, on all."""
    monkeypatch.setattr(quick_twin, "LARGE", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(calibrate, "COMPARED_TOKENS", 1)
    monkeypatch.setattr(calibrate, "TOKENS_PER_UNKNOWN", 120)  # 1,080 of some 1,900 tokens, and for 4 heads 2,040
    monkeypatch.setattr(allocation, "cheapest", lambda costs, asked: {"decoder": ((4, 4), (1, 1), (1, 1))})
    monkeypatch.setattr(allocation.SharedOut, "kept", lambda *given: False)
    source, how = gpt2(heads=6, layers=3), replace(BARE, tokens=2048)
    tried, even = (convert(source, 2, 2, "svd", allocation=a, calibration=how) for a in ("adaptive", "uniform"))
    assert all(torch.equal(a, b) for a, b in zip(tried.model.parameters(), even.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(SiteFitter, "loss", math.nan), (SiteFitter, "loss", math.inf), (Replacement, "kl", -1e-9)],
    ids=["no number", "infinite", "below zero"],
)
def test_layers_keep_as_many_where_nothing_tells_what_one_costs(owner, name, value, monkeypatch):
    monkeypatch.setattr(owner, name, lambda *given: value)
    made = convert(uneven_need(), 2, 2, calibration=BARE)
    assert {made.model.config.heads("decoder", layer) for layer in range(3)} == {(2, 2)}
    assert "allocation" not in made.report["calibration"]


@pytest.mark.parametrize(
    "asked",
    [{"method": "svd", "partition": "contiguous"}, {"method": "mean", "calibration": replace(BARE, refit=True)}],
    ids=["svd", "mean"],
)
def test_the_even_model_that_sharing_out_is_held_against_is_the_one_that_is_asked_for(asked):
    """Neighbours together, where those are what is asked for, or what the method takes."""
    source, how = gpt2(heads=6), {"calibration": BARE} | asked
    told = convert(source, 2, 1, allocation="adaptive", **how).report["calibration"]["allocation"]
    even = convert(source, 2, 1, allocation="uniform", **how).report["calibration"]
    assert told["kl_evenly"] == pytest.approx(even["kl"], rel=1e-3)


def test_means_stand_for_layers_that_differ(tmp_path, recwarn):
    made = convert(uneven_need(), 2, 2, calibration=SHORT, output=tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    assert [config.heads("decoder", i) for i in range(3)] == [made.model.config.heads("decoder", i) for i in range(3)]


def test_of_an_encoder_nothing_tells_what_layers_cost():
    encoder = T5EncoderModel(t5().config)
    with pytest.raises(RecipeError, match="T5EncoderModel has no language model head"):
        convert(encoder, 8, 4, allocation="adaptive")


@pytest.mark.parametrize("make", [gpt2, t5, partial(t5, family="umt5")], ids=["gpt2", "t5", "umt5"])
def test_heads_put_into_the_source_predict_as_the_converted_model_does(make):
    source, plan = prepared(make(), Request(6, 3, calibration=SHORT), lambda partitions: None)
    budget = memory_budget(plan, source, torch.device("cpu"))
    calibrator = Calibrator(source.model, plan, source, torch.device("cpu"), budget, 0)
    made = {
        site: fitter.convert("svd", plan.partitions[site], False, True) for site, fitter in calibrator.fitters("fit")
    }
    together = calibrator.replacement.kl({site: converted.heads for site, converted in made.items()})
    assert together == pytest.approx(calibrator.kl(plan, made), rel=1e-3) and together > 1e-4
    assert abs(calibrator.replacement.kl({})) < 1e-6  # nothing stays in the source


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_heads_shared_out_are_as_many_in_total(make, tmp_path):
    source = make(heads=4, layers=2)
    made = convert(source, 2, 1, allocation="adaptive", calibration=SHORT, output=tmp_path / "out")
    cost, text = made.report["cost"]["after"], made.report["calibration"]["allocation"]["counts"]
    uniform = convert(source, 2, 1, method="mean").report["cost"]["after"]
    by_layer = counts_of(text)
    for kind, layers in by_layer.items():
        assert tuple(map(sum, zip(*layers, strict=True))) == (2 * len(layers), len(layers))
        assert [made.model.config.heads(kind or "decoder", layer) for layer in range(len(layers))] == list(layers)
    same = ("parameters", "kv_cache_bytes_per_token", "attention_flops")
    assert {key: cost[key] for key in same} == {key: uniform[key] for key in same}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["allocation"]["mean"] == [2, 1]
    assert "shared out" in (tmp_path / "out" / "report.html").read_text()

    if make is t5:
        return
    again = convert(source, allocation=text, calibration=SHORT)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), made.model.parameters(), strict=True))


def test_heads_go_where_predictions_need_them():
    source = uneven_need()
    made = convert(source, 2, 2, calibration=SHORT)
    assert [made.model.config.heads("decoder", layer) for layer in range(3)] == [(1, 1), (4, 4), (1, 1)]
    even = convert(source, 2, 2, allocation="uniform", calibration=SHORT).report["calibration"]["kl"]
    assert made.report["calibration"]["kl"] < even / 10


def test_the_same_seed_shares_out_to_the_same_weights():
    source = uneven_need()
    results = [convert(source, 2, 2, calibration=SHORT, seed=1).model.state_dict() for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_dry_run_says_that_heads_are_shared_out_later(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = ["sample:gpt2", "--q-groups", "8", "--kv-groups", "4", "--dry-run"]
    code, out, _ = called(main, *asked)
    assert code == 0 and "how many each keeps is found on text" in out and "gpt2-sqa-q8kv4 " in out
    assert "found on text" not in called(main, *asked, "--allocation", "uniform")[1]
    assert "gpt2-sqa-q8kv4-by-layer" in called(main, *asked[:1], "--dry-run", "--allocation", "4/2,8/2,12/4,8/8")[1]
