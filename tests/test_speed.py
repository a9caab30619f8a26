"""What sqa-bench says: its counts, its ratios, and what it refuses to compare."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import UNEVEN, gpt2, plain_convert, sqa_gpt2, sqa_t5, t5
from torch.utils.flop_counter import FlopCounterMode

from sqa_convert import bench, convert
from sqa_convert.cli import bench as command
from sqa_convert.errors import RecipeError
from sqa_convert.report.pictures import speed_picture
from sqa_convert.report.speed_table import speed_details
from sqa_convert.speed.bench import bench_layers, grid_heads, heads_of
from sqa_convert.speed.measurement import Measurement, speedup
from sqa_convert.speed.settings import Settings
from sqa_convert.speed.timing import WARM_UPS, Spread, alternate
from sqa_convert.speed.workloads import (
    MODES,
    attention_layer,
    bytes_read,
    extend_positions,
    flops,
    layer_workload,
    model_workload,
)

CPU = torch.device("cpu")
QUICK = Settings(lengths=(8,), repeats=2, parts=("model",), modes=("prefill", "decode"))
MODELS = {"gpt2": gpt2, "t5": t5, "sqa_gpt2": sqa_gpt2, "sqa_t5": sqa_t5}


def eager(model):
    return type(model)._from_config(model.config, attn_implementation="eager")


@pytest.fixture
def folders(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out", evaluate=False)
    return {"source": tmp_path / "source", "out": tmp_path / "out"}


@pytest.fixture
def run(monkeypatch, called, tmp_path):
    """Runs sqa-bench inside a folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return partial(called, command.main)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts_while_it_runs(name, mode):
    model = MODELS[name]()
    with FlopCounterMode(display=False) as counter:
        model_workload(eager(model), mode, 12, 2).run()
        once = counter.get_total_flops()
    assert flops(model, model_workload, mode, 12, 2) > 0
    prepared = model_workload(eager(model), mode, 12, 2)  # decoding fills a cache first, which is not counted
    with FlopCounterMode(display=False) as counter:
        prepared.run()
    assert flops(model, model_workload, mode, 12, 2) == counter.get_total_flops() <= once


def test_operations_of_a_layer_are_those_of_its_formula():
    layer = attention_layer(sqa_gpt2(6, 3), "prefill")
    batch, length, width, size = 2, 10, 48, 4
    linear = width * size * (6 + 3 + 3 + 6)
    scores = 2 * length * size * 6
    assert flops(layer, layer_workload, "prefill", length, batch) == 2 * batch * length * (linear + scores)


@pytest.mark.parametrize("name", MODELS)
def test_a_decoding_step_reads_the_cache_and_the_weights_it_multiplies_by(name):
    model = MODELS[name]()
    work = model_workload(model, "decode", 12, 3)
    decoder = model.get_decoder()
    read = sum(p.nbytes for n, p in decoder.named_parameters() if p.ndim == 2 and "wpe" not in n and "bias" not in n)
    if model.config.is_encoder_decoder:  # keys and values of the encoder's output are in the cache
        cross = [layer.layer[1].EncDecAttention for layer in decoder.block]
        read -= sum(part.weight.nbytes for module in cross for part in (module.k, module.v))
    assert bytes_read(model, work) == read + work.cache_bytes


def test_the_cache_shrinks_with_the_key_value_heads():
    whole, fewer = (model_workload(sqa_gpt2(6, n), "decode", 12, 2).cache_bytes for n in (6, 2))
    assert whole == 3 * fewer == 2 * 2 * 2 * 6 * 11 * 4 * 4  # layers, keys and values, rows, heads, tokens, size, bytes


def test_every_step_of_decoding_starts_from_the_same_cache():
    for model in (sqa_gpt2(), sqa_t5()):
        work = model_workload(model, "decode", 12, 2)
        before = work.cache_bytes
        work.run()
        work.run()
        assert work.cache_bytes == before


def test_rounds_alternate_and_every_run_is_warmed_up():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    found = alternate(runs, 3, CPU, least=0)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[: WARM_UPS + 1] == ["a"] * (WARM_UPS + 1)
    assert order[-9:] == [*"abc", *"bca", *"cab"]


def measurement(**changes):
    row = Measurement("a", "model", "prefill", 8, 1, "float32", "cpu", "sdpa", tokens=8, seconds=[2.0, 3.0], flops=100)
    return replace(row, **changes)


def test_a_ratio_is_taken_round_by_round_and_has_a_spread():
    fast = measurement(model="b", seconds=[1.0, 2.0], flops=50)
    assert speedup(measurement(), fast) == Spread(1.75, 1.5, 2.0)
    row = fast.to_json(measurement())
    assert row["ideal"] == 2 and row["tokens_per_second"] == 8 / 1.5
    assert row["seconds"] == {"median": 1.5, "low": 1.0, "high": 2.0}


@pytest.mark.parametrize(
    "change", [{"batch": 2}, {"dtype": "bfloat16"}, {"length": 9}, {"mode": "train"}, {"device": "cuda"},
               {"attention": "eager"}, {"part": "attention"}, {"seconds": [1.0]}], ids=str,
)  # fmt: skip
def test_what_was_measured_otherwise_is_not_compared(change):
    with pytest.raises(RecipeError, match=r"cannot be compared|timed"):
        speedup(measurement(), measurement(model="b", **change))


def test_models_of_different_dtypes_are_not_compared(folders):
    other = folders["out"].parent / "half"
    plain_convert(folders["source"], 8, 4, output=other, evaluate=False, dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"float32.*bfloat16.*give Settings\(dtype=…\)$"):
        bench({"source": folders["source"], "half": other}, QUICK)
    rows = bench({"source": folders["source"], "half": other}, replace(QUICK, dtype="bfloat16"))["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_what_does_not_fit_into_memory_is_said_and_the_rest_measured(folders, monkeypatch):
    from sqa_convert.speed import bench as speed

    def too_large(model, *rest):
        if not hasattr(model.config, "num_key_value_heads") and model.device.type != "meta":
            raise torch.OutOfMemoryError
        return model_workload(model, *rest)

    monkeypatch.setattr(speed, "model_workload", too_large)
    source, converted = bench(folders, replace(QUICK, modes=("prefill",)))["rows"]
    assert source["out_of_memory"] and source["seconds"] is None
    assert converted["seconds"]["median"] > 0 and "speedup" not in converted and converted["ideal"] > 1


def test_where_nothing_fits_into_memory_nothing_is_reported(folders, monkeypatch):
    from sqa_convert.speed import bench as speed

    def too_large(model, *rest):
        if model.device.type != "meta":
            raise torch.OutOfMemoryError
        return model_workload(model, *rest)

    monkeypatch.setattr(speed, "model_workload", too_large)
    with pytest.raises(RecipeError, match="nothing fits"):
        bench(folders, QUICK)


def test_a_model_is_lengthened_for_timing_alone():
    model = gpt2()
    assert not extend_positions(model, 64)
    assert extend_positions(model, 150)
    assert torch.equal(model.transformer.wpe.weight[128:150], model.transformer.wpe.weight[:22])
    assert model_workload(model, "decode", 150, 1).run() is None
    assert not extend_positions(t5(), 10**6)


def test_the_paper_s_grid_has_its_head_counts():
    names = ("mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "xsmqa", "12/3")
    assert [grid_heads(name, 16) for name in names] == [
        (16, 16), (16, 4), (16, 1), (8, 4), (8, 8), (4, 4), (4, 1), (12, 3),
    ]  # fmt: skip
    found = bench_layers(4, 16, ("mha", "xsqa"), replace(QUICK, modes=MODES))
    assert found["heads"] == {"mha": "4/4", "xsqa": "1/1"}
    assert [row["ideal"] > 1 for row in found["rows"]] == [False, True] * 3


def test_heads_of_a_model_are_named_shortly():
    models = {"12": gpt2(), "6/3": sqa_gpt2(6, 3), "6/6 to 8/4": sqa_gpt2(**UNEVEN["gpt2"])}
    models |= {
        "encoder 4/2, decoder 6/3, cross 6/3": sqa_t5(6, 3, site_heads={"encoder": [4, 2]}),
        "encoder 6/6 to 8/4, decoder 6/3 to 8/2, cross 4/1 to 5/5": sqa_t5(**UNEVEN["t5"]),
    }
    assert [heads_of(model.config) for model in models.values()] == list(models)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_converted_folder_alone_is_measured_beside_its_source(kind, run, tmp_path):
    plain_convert(f"sample:{kind}", 6, 2, output=tmp_path / "out", evaluate=False)
    code, said, err = run("out", "--lengths", "16", "--repeats", 1, "--output", "measured", "--json")
    assert (code, err) == (0, "")
    found = json.loads(said)
    assert list(found["heads"].items()) == [(f"sample:{kind}", "12"), ("out", "6/2")]
    assert len(found["rows"]) == 2 * 2 * 3  # models, parts, modes
    assert found["versions"]["torch"] and found["machine"] and found["device"] == "cpu"
    assert json.loads(Path("out/report.json").read_text())["speed"] == found
    assert json.loads(Path("measured/speed.json").read_text()) == found
    for folder in ("out", "measured"):
        assert Path(folder, "speed.png").read_bytes()[:4] == b"\x89PNG"
    card = Path("out/README.md").read_text()
    assert "speed.svg" in card and "| model, decode | 16 | " in card and "out: prefill at 16 tokens" in card


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sample:gpt2", "--head-grid"], "--head-grid"),
        (["sample:gpt2", "--lengths", "1q"], "'1q'"),
        (["sample:gpt2", "--lengths", "1"], "give 2 to"),
        (["sample:gpt2", "--lengths", "100000000k"], "give 2 to"),
        (["--head-grid", "--variants", ","], "--variants"),
        (["--head-grid", "--attn", "flash_attention_2"], "--attn flash_attention_2"),
        (["--head-grid", "-o", "x" * 300], "--output"),
        (["sample:gpt2", "--modes", "decode,prefil"], "prefill"),
        (["sample:gpt2", "--repeats", "0"], "--repeats 0"),
        (["sample:gpt2", "--attn", "flashy"], "flash_attention_2"),
        (["sample:gpt2", "--dtype", "int8"], "bfloat16"),
        (["sample:gpt2", "sample:gpt2"], "twice"),
        (["--head-grid", "--variants", "9/4"], "--variants 9/4"),
        (["--head-grid", "--heads", "0"], "--heads 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_told_in_one_line(arguments, told, run):
    code, said, err = run(*arguments)
    assert (code, said) == (2, "") and told in err and len(err.splitlines()) == 1


def test_attention_of_a_umt5_is_timed():
    source = t5(family="umt5")
    made = convert(source, 6, 3, method="mean", calibration=None).model
    rows = bench({"source": source, "made": made}, replace(QUICK, parts=("attention",), repeats=1))["rows"]
    assert {row["mode"] for row in rows} == set(QUICK.modes) and all(row["seconds"] for row in rows)


@pytest.mark.parametrize("family", [gpt2, t5], ids=["gpt2", "t5"])
def test_each_kind_of_layer_is_timed_where_they_differ(family):
    source = family(layers=3)
    kinds = {"gpt2": "8/4,4/2,8/4", "t5": "encoder:8/4,4/2,8/4,decoder:6/3,6/3,cross:12/1,4/1"}
    made = convert(source, allocation=kinds[source.config.model_type], method="mean", calibration=None)
    how = replace(QUICK, parts=("attention",), repeats=1)
    result = bench({"source": source, "made": made}, how)
    layers = {"prefill": {"made, layer 0": "8/4", "made, layer 1": "4/2"}}
    layers["decode"] = {"made, layer 0": "12/1", "made, layer 1": "4/1"} if family is t5 else layers["prefill"]
    for mode, timed in layers.items():
        rows = [row for row in result["rows"] if row["mode"] == mode]
        assert [row["model"] for row in rows] == ["source", *timed]
        assert all(row["seconds"] for row in rows)
    assert rows[1]["flops"] != rows[2]["flops"] and result["heads"]["made, layer 1"] in ("4/2", "4/1")
    shown = [row for _, (_, rows) in speed_details(result) for row in rows]
    assert len(shown) == len(result["rows"]) and b"layer 1" in speed_picture(result, "page")
