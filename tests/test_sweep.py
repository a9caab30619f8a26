"""sqa-sweep and --target: points, the frontier, what is picked, and what the command shows."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import gpt2, t5, tokens

from sqa_convert import Calibration, convert, sweep
from sqa_convert.calibration import site_fits
from sqa_convert.calibration.lean_copy import lean_copy
from sqa_convert.calibration.replaced_sites import Replacement
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.cli.convert import main as convert_command
from sqa_convert.cli.sweep import main
from sqa_convert.conversion.convert_site import convert_site
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import QualityError, RecipeError
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.measure import kl_to, predict
from sqa_convert.pipeline import fitted_models
from sqa_convert.pipeline.sweep import default_settings
from sqa_convert.pipeline.sweep_points import (
    Point,
    Target,
    asked_flags,
    calibration_flags,
    pick,
    rank_correlation,
    with_frontier,
)
from sqa_convert.report.sweep_report import sweep_lines
from sqa_convert.text.collate import CausalCollator

SHORT = Calibration(tokens=2048, refine_steps=4, polish_steps=0)
FEW = ["--settings", "3/1,2/1", "--calibration-tokens", "2048", "--refine-steps", "0", "--no-speed"]


def point(kl, flops, cache=None, **more):
    return Point(8, 4, "uniform", {"decoder": ((8, 4),)}, kl, 3.0, 0.8, kl, 0.9, flops, cache, **more)


def test_the_frontier_is_what_no_other_point_beats():
    points = with_frontier([point(0.1, 0.5, 0.5), point(0.2, 0.4, 0.6), point(0.2, 0.5, 0.5), point(0.05, 0.5, 0.9)])
    assert [p.frontier for p in points] == [True, True, False, True]


def test_the_knee_is_where_the_frontier_turns():
    measured = [(0.1, 2.0), (0.3, 0.4), (0.5, 0.3), (0.7, 0.06), (0.9, 0.0)]
    points = with_frontier([point(kl, cost) for cost, kl in measured])
    assert [p.cost for p in points if p.knee] == [0.3]
    assert not any(p.knee for p in with_frontier([point(0.1, 0.5)]))


@pytest.mark.parametrize(
    ("asked", "cost", "holds"),
    [
        (["kl<=0.15"], 0.5, True),  # the cheapest
        (["flops<=0.75x"], 0.7, True),  # the nearest to the source
        (["kl<=0.3", "flops<=0.4x"], 0.3, True),
        (["kl<=0.01"], 0.9, False),  # the closest
        (["kl<=0.08", "flops<=0.6x"], 0.7, False),
        (["prefill<=0.5x"], 0.9, True),  # all others were not timed
    ],
)
def test_targets_pick_the_cheapest_point_that_holds_or_the_closest(asked, cost, holds):
    points = [point(0.25, 0.3), point(0.1, 0.5), point(0.07, 0.7), point(0.02, 0.9, prefill=0.4)]
    chosen, held = pick(points, [Target.read(text) for text in asked])
    assert (chosen.cost, held) == (cost, holds)


@pytest.mark.parametrize("text", ["kl<=0.05x", "cache<=0.3", "loss<=1", "kl>=0.1", "kl", "", "kl<=.x"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(RecipeError, match=r"write kl<=0.05, or .* prefill<=0.8x"):
        Target.read(text)


def test_ranks_are_correlated():
    rising = [point(kl, 0.5) for kl in (0.1, 0.2, 0.3)]
    assert rank_correlation(rising) == pytest.approx(1) and rank_correlation(rising[:2]) is None


@pytest.mark.parametrize("heads", [2, 5, 8, 12, 16, 25, 64])
def test_some_twenty_settings_are_tried_of_many_heads(heads):
    settings = default_settings(heads)
    assert all(1 <= kv <= q <= heads and q % kv == 0 for q, kv in settings) and (heads, heads) not in settings
    assert heads < 12 or 20 <= len(settings) <= 60


@pytest.mark.parametrize("make", [gpt2, pytest.param(t5, marks=pytest.mark.integration)], ids=["gpt2", "t5"])
def test_a_point_is_what_its_conversion_gives(make):
    source = make(heads=4, layers=3)
    points = sweep(source, [(4, 2), (3, 3), (2, 1), (1, 1)], calibration=SHORT, speed=False)
    assert [p.allocation for p in points].count("uniform") == 4
    for one in points:
        if (one.q_groups, one.kv_groups) == (2, 1):
            heads = {"allocation": dict(one.layers)}
            made = convert(source, method="svd", calibration=SHORT, **heads)
            assert one.kl == pytest.approx(made.report["calibration"]["kl"], rel=1e-3)
            before, after = made.report["cost"]["before"], made.report["cost"]["after"]
            assert one.flops == after["attention_flops"] / before["attention_flops"]
            assert one.cache == after["kv_cache_bytes_per_token"] / before["kv_cache_bytes_per_token"]
            assert one.parameters == after["parameters"] / before["parameters"]
    even = {(p.q_groups, p.kv_groups): p for p in points if p.allocation == "uniform"}
    shared = [p for p in points if p.allocation == "adaptive"]
    assert (shared or make is t5) and all(p.predicted_kl <= even[p.q_groups, p.kv_groups].predicted_kl for p in shared)
    assert all((p.flops, p.cache) == (even[p.q_groups, p.kv_groups].flops, p.cache) for p in shared)
    json.dumps(points.to_json())


@pytest.mark.integration
def test_a_point_is_measured_as_its_conversion_is():
    few = Calibration(tokens=2048, refine_steps=0, polish_steps=0)
    (point,) = sweep("sample:gpt2", [(8, 4)], calibration=few, speed=False)
    made = convert("sample:gpt2", 8, 4, method="svd", allocation="uniform", calibration=few)
    assert point.kl == pytest.approx(made.evaluate()["model"]["kl"], rel=1e-3)


@pytest.mark.parametrize("make", [gpt2, pytest.param(t5, marks=pytest.mark.integration)], ids=["gpt2", "t5"])
def test_where_float32_does_not_fit_points_are_measured_in_place_and_not_timed(make, tmp_path, monkeypatch):
    source, how = make(heads=4), {"settings": [(2, 1)], "calibration": SHORT, "device": "cpu"}
    source.save_pretrained(tmp_path)
    expected = sweep(source, **how, speed=False)
    monkeypatch.setattr(fitted_models, "load_source", lambda plan, opened, *given: lean_copy(plan, opened))
    monkeypatch.setattr(fitted_models, "build_model", lambda *given: pytest.fail("a second model was made"))
    points = sweep(tmp_path, **how)
    assert points[0].name == "2/1" and not any(p.prefill or p.decode for p in points)
    assert points.info["timed_tokens"] is None and "too little memory" in " ".join(sweep_lines(points.to_json()))
    assert points[0].kl == pytest.approx(expected[0].kl, rel=0.2)
    with pytest.raises(RecipeError, match=r"too little memory: speed=False leaves times out"):
        sweep(tmp_path, **how, speed=True)


def test_documents_in_one_row_are_apart_where_heads_are_replaced():
    model = gpt2(heads=4)
    source = ModelSource(model)
    made = convert(model, 4, 2, method="mean", calibration=None)
    plan = make_plan(source, Request(4, 2, method="mean", calibration=None))
    ids = tokens(2, 17).index_fill(1, torch.tensor([5, 11]), 0)
    text = HeldOut([CausalCollator(0)([*enumerate(ids)])], "", 0, torch.device("cpu"))
    replaced = Replacement(model, plan, text, predict(model, text))
    heads = {site: convert_site(plan, source, site).heads.tensors() for site in plan.converted_sites}
    expected = kl_to(replaced.source, text, made.model)
    assert replaced.kl(heads) == pytest.approx(expected, rel=1e-4) and expected > 0.001


def test_the_frontier_is_timed():
    points = sweep(gpt2(heads=4, n_positions=32), [(2, 1), (4, 1)], calibration=SHORT)
    assert all((p.prefill is not None and p.decode > 0) == p.frontier for p in points)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"settings": [(8, 3)]}, "must divide"),
        ({"settings": [(12, 12)]}, "below 12/12"),
        ({"settings": []}, "below 12/12"),
        ({"settings": [(13, 1)]}, "12 heads"),
        ({"settings": [8, 4]}, r"settings \[8, 4\]: give pairs"),
        ({"settings": "8/4"}, "give pairs"),
        ({"calibration": Calibration(refine_steps=-1)}, "0 or more"),
        ({"calibration": None}, "give a Calibration"),
        ({"calibration": ["some text"]}, "give a Calibration"),
    ],
)
def test_what_cannot_be_swept_is_refused(asked, says):
    with pytest.raises(RecipeError, match=says):
        sweep(gpt2(), **asked)


def test_fits_that_the_disk_does_not_hold_are_refused_first(monkeypatch):
    monkeypatch.setattr(site_fits, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(RecipeError, match=r"settings: fits at 1 of them take .* TMPDIR"):
        sweep(gpt2(), [(8, 4)], calibration=SHORT)


def test_fits_that_are_not_finite_give_no_points(monkeypatch):
    monkeypatch.setattr(Replacement, "kl", lambda self, heads: None)
    with pytest.raises(QualityError, match="no setting predicts anything finite"):
        sweep(gpt2(heads=2, layers=1), [(1, 1)], calibration=SHORT, speed=False)


def test_a_target_that_does_not_hold_names_the_whole_command(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    gpt2(heads=2).save_pretrained("source")
    few = ["--calibration-tokens", "400", "--refine-steps", "0", "--memory", "8GB", "--dtype", "bfloat16"]
    code, _, err = partial(called, convert_command)("source", "--target", "flops<=0.01x", *few, "--seed", "3")
    assert code == 4
    assert err.endswith("--memory 8GB --seed 3 --dtype bfloat16 --calibration-tokens 400 --refine-steps 0\n")


def test_commands_say_what_else_was_asked():
    rows, few = [list(range(i, i + 20)) for i in range(1, 40)], Calibration(tokens=400, refine_steps=0)
    source = t5(heads=2, layers=2)
    points = sweep(source, [(1, 1)], sites=iter(["encoder"]), data=iter(rows), calibration=few, speed=False)
    command = points.to_json()["points"][0]["command"]
    assert command.endswith("--q-groups 1 --kv-groups 1 --allocation uniform --sites encoder")
    how = Calibration(tokens="1M", refine_steps=4, memory="8GB", effort="light", refit=False, prompts="begin.txt")
    fitting = make_plan(ModelSource(gpt2()), Request(4, 2, calibration=how)).calibration
    flags = "--calibration-prompts begin.txt --calibration-tokens 1000000 --no-refit --effort light --memory 8GB"
    assert asked_flags(calibration_flags(how, fitting)) == f" {flags}"
    points = sweep(gpt2(heads=2), [(1, 1)], calibration=few, speed=False, device="cpu", seed=3, trust_remote_code=True)
    assert points.to_json()["points"][0]["command"].endswith("uniform --seed 3 --device cpu --trust-remote-code")
    asked = {"data": "my text.txt", "calibration": None, "text-column": "", "tokenizer": source}
    assert points[0].command("m", asked_flags(asked)).endswith(" --allocation uniform --data 'my text.txt'")


def test_the_command_writes_a_table_a_picture_and_a_page(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    gpt2(heads=4, n_positions=64).save_pretrained("model")
    code, out, err = partial(called, main)("model", *FEW, "--target", "kl<=0.0000001")
    assert code == 4 and "no point holds; closest" in err and "sqa-convert model --" in err
    table = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) >= 3 and "…" not in out and max(map(len, table)) <= 80
    result = json.loads(Path("model-sweep/sweep.json").read_text())
    assert result["target"]["holds"] is False
    assert result["points"][0]["command"] == "sqa-convert model --q-groups 3 --kv-groups 1 --allocation uniform"
    page = Path("model-sweep/sweep.html").read_text()
    assert "<svg" in page and "<script" not in page and "sqa-convert model --q-groups" in page
    assert "<svg" in Path("model-sweep/frontier.svg").read_text()
    code, _, err = partial(called, main)("model", *FEW)
    assert code == 2 and err.endswith("model-sweep exists already: give another\n")
    code, _, err = partial(called, main)("model", *FEW, "-o", "other", "--memory", "1MB")
    assert code == 2 and "--memory: 1MB is too little" in err and not Path("other").exists()
    code, _, err = partial(called, main)("model", *FEW, "-o", "other", "--text-column", "body")
    assert code == 2 and "--text-column names a column of --data" in err and not Path("other").exists()


def test_a_conversion_takes_the_point_that_holds_its_target(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    gpt2(heads=4, layers=1).save_pretrained("source")
    few = ["--calibration-tokens", "1024", "--refine-steps", "0", "--no-evaluate"]
    code, out, err = partial(called, convert_command)("source", "--target", "flops<=0.6x", *few, "-o", "out")
    assert code == 0, err
    assert re.search(r"flops<=0.6x: \d+/\d+", out)
    cost = json.loads(Path("out/report.json").read_text())["cost"]
    assert cost["after"]["attention_flops"] <= 0.6 * cost["before"]["attention_flops"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--q-groups", "8"], "--target finds the heads: leave out --q-groups"),
        (["--no-calibration"], "--target needs text"),
        (["--target", "speed<=1x"], "--target speed<=1x: write kl<=0.05"),
    ],
)
def test_targets_of_a_conversion_that_cannot_be(asked, says, monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = partial(called, convert_command)("sample:gpt2", "--target", "kl<=0.1", *asked)
    assert code == 2 and says in err and err.count("\n") == 1
