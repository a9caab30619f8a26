"""What result and report say of themselves: config.json what a model needs, report.json how it came about."""

import json
import os
import platform
from datetime import datetime, timedelta, timezone

import pytest
import torch
from helpers import gpt2, inputs_for, plain_convert, t5, tokens
from transformers import AutoModelForCausalLM

import sqa_convert
from sqa_convert import Calibration, Recipe, uptrain
from sqa_convert.cli.convert import main as convert
from sqa_convert.report.report_json import read_report
from sqa_convert.report.write import write_report

FEW = Recipe(tokens=1024, sequence_length=64, evaluations=1)
BUILD = {"gpt2": gpt2, "t5": t5}
SITES = {"gpt2": {"decoder": 2}, "t5": {"encoder": 3, "decoder": 2, "cross": 2}}


@pytest.mark.parametrize("name", BUILD)
def test_config_holds_what_a_model_needs_and_the_report_every_layers_partition(name, tmp_path):
    source = BUILD[name]()
    in_memory = plain_convert(source, 8, 4)
    source.save_pretrained(tmp_path / "source")
    out = plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output
    config = json.loads((out / "config.json").read_text())
    assert config["sqa"].keys() == {"source", "revision", "source_heads", "method", "sqa_convert"}
    assert (config["num_key_value_heads"], config["architectures"]) == (4, [type(in_memory.model).__name__])
    assert "partition" not in in_memory.model.config.sqa and "partition" not in (out / "config.json").read_text()
    for report in (in_memory.report, read_report(out)):
        kinds = [site["kind"] for site in report["sites"]]
        assert {kind: kinds.count(kind) for kind in kinds} == SITES[name]
        for site in report["sites"]:
            heads = [head for group in site["partition"] for cluster in group for head in cluster]
            assert len(site["partition"]) == 4 and sorted(heads) == list(range(12))


def as_it_was_written_before(folder):
    """A folder whose config.json holds the partitions, and whose report does not say how it came about."""
    config, report = json.loads((folder / "config.json").read_text()), read_report(folder)
    partitions: dict = {}
    for site in report["sites"]:
        partitions.setdefault(site["kind"], []).append(site["partition"])
    config["sqa"]["partition"] = partitions
    (folder / "config.json").write_text(json.dumps(config))
    for key in ("command", "date", "machine"):
        del report[key]
    del report["versions"]["python"]
    (folder / "report.json").write_text(json.dumps(report))


def test_a_folder_with_partitions_in_its_config_works_as_before(tmp_path):
    new, old = (plain_convert("sample:gpt2", 8, 4, output=tmp_path / name).output for name in ("new", "old"))
    as_it_was_written_before(old)
    ids = tokens()
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (new, old))
        assert torch.equal(ours(**inputs_for(ours, ids)).logits, theirs(**inputs_for(theirs, ids)).logits)
    assert theirs.config.sqa["partition"]["decoder"][0] == read_report(old)["sites"][0]["partition"]
    theirs.save_pretrained(tmp_path / "again")
    write_report(old, read_report(old))
    assert (
        "<dt>date</dt>" in (new / "report.html").read_text()
        and "<dt>date</dt>" not in (old / "report.html").read_text()
    )
    report = uptrain(old, FEW, evaluate=False)
    asked = f"sqa_convert.uptrain({str(old)!r}, Recipe(tokens=1024, sequence_length=64, evaluations=1), evaluate=False)"
    assert report["uptraining"]["command"] == asked and is_now(report["uptraining"]["date"])
    assert "command" not in report and "partition" in json.loads((old / "config.json").read_text())["sqa"]


def is_now(date):
    ago = datetime.now(timezone.utc) - datetime.fromisoformat(date.replace("Z", "+00:00"))
    return timedelta() <= ago < timedelta(minutes=10)


def test_a_report_holds_the_command_as_it_was_typed(called, tmp_path):
    arguments = ["sample:gpt2", "--variant", "sqa", "--method", "mean", "--no-evaluate", "-o", tmp_path / "with space"]
    assert called(convert, *arguments)[0] == 0
    report = read_report(tmp_path / "with space")
    expected = f"sqa-convert sample:gpt2 --variant sqa --method mean --no-evaluate -o '{tmp_path}/with space'"
    assert report["command"] == expected
    assert expected.replace("'", "&#39;") in (tmp_path / "with space" / "report.html").read_text()


def last(heads, partition, statistics):
    return sqa_convert.METHODS["first"].convert(heads, partition, statistics)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((8,), {"kv_groups": 4, "method": "mean"}, "8, kv_groups=4, method='mean'"),
        ((8, 4), {"method": last, "calibration": None}, "8, 4, method=last, calibration=None"),
        (
            (8, 4, "mean"),
            {"calibration": Calibration(text="self", tokens=4096, refit=True)},
            "8, 4, 'mean', calibration=Calibration(text='self', tokens=4096, refit=True)",
        ),
    ],
)
def test_a_report_holds_the_call_with_objects_shortened(arguments, options, said):
    report = sqa_convert.convert(gpt2(), *arguments, **options).report
    assert report["command"] == f"sqa_convert.convert(GPT2LMHeadModel(…), {said})"


def test_a_report_says_when_and_on_what_it_was_made():
    report = plain_convert(gpt2(), 8, 4).report
    assert report["date"].endswith("Z") and is_now(report["date"])
    assert report["versions"]["python"] == platform.python_version()
    assert report["machine"].keys() == {"platform", "cpu", "cores", "device"} and all(report["machine"].values())
    assert (report["machine"]["cores"], report["machine"]["device"]) == (os.cpu_count(), "cpu")


def test_two_reports_of_the_same_differ_in_when_and_how_long_alone():
    source = gpt2()
    one, two = (plain_convert(source, 8, 4).report for _ in range(2))
    assert {key for key in one | two if one.get(key) != two.get(key)} <= {"date", "seconds", "stages"}
