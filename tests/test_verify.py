"""Folders that look right and are not."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import gpt2, plain_convert, t5
from safetensors.torch import load_file, save_file

from sqa_convert import Partition
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.checkpoints.small_files import sha256_of
from sqa_convert.cli.evaluate import main
from sqa_convert.errors import CheckpointError
from sqa_convert.evaluation.evaluate import compare
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.pipeline import verify as verifying
from sqa_convert.pipeline.verify import compare_logits, reloaded, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    work = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    other = Partition.contiguous(12, 6, 2)  # so layers have different numbers of heads
    for name, model, given in (("gpt2", gpt2(), "decoder.0"), ("t5", t5(), "encoder.1")):
        model.save_pretrained(work / f"{name}-source")
        plain_convert(work / f"{name}-source", 8, 4, partition={given: other}, output=work / name)
    return work


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made / "gpt2", tmp_path / "out"))


def change_weights(folder, change, recorded=True):
    """Other weights, and with `recorded` a report that knows them."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    if recorded:
        report = json.loads((folder / "report.json").read_text())
        report["sha256"] = {path.name: sha256_of(path)}
        (folder / "report.json").write_text(json.dumps(report))


def refused(folder, says):
    with pytest.raises(CheckpointError, match=says):
        verify(folder)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_what_was_written_is_verified(made, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sqa-eval", str(made / name), "--verify"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert "1 with the checksums of report.json" in said.out and "loads without sqa_convert" in said.out


def test_a_changed_byte_is_found(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    refused(folder, "checksum differs")


def test_a_missing_and_an_added_file_are_found(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    refused(folder, "holds model-2.safetensors, model.safetensors; written were model.safetensors")
    (folder / "model-2.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights; written were model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w["transformer.ln_f.bias"].fill_(float("nan")), "ln_f.bias holds NaN"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(3)}), r"ln_f.bias has shape \[3\]"),
        (lambda w: w.pop("transformer.ln_f.bias"), "ln_f.bias is missing"),
    ],
)
def test_weights_that_the_model_does_not_call_for_are_found(folder, change, says):
    change_weights(folder, change)
    refused(folder, says)


def test_code_that_is_not_ours_is_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    with (folder / "modeling_sqa_gpt2.py").open("a") as file:
        file.write(f"\nopen({str(canary)!r}, 'w').close()\n")
    refused(folder, "modeling_sqa_gpt2.py is not .* trust_remote_code=True runs it")
    assert not canary.exists()
    assert verify(folder, trust_remote_code=True)["difference"] == 0 and canary.exists()


@pytest.mark.parametrize("place", ["other.Model", "../sqa.Model", 3])
def test_code_named_elsewhere_is_not_run(folder, place):
    (folder / "other.py").write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = place
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "is not the file this version of sqa-convert ships")


def test_a_folder_that_computes_something_else_for_strangers_is_refused(folder):
    path = folder / "modeling_sqa_gpt2.py"
    path.write_text(path.read_text().replace("self.head_dim**-0.5", "self.head_dim**-0.6"))
    report = json.loads((folder / "report.json").read_text())
    with pytest.raises(CheckpointError, match="computes something else"), reloaded(folder, report):
        pass
    path.write_text("raise ValueError('broken')")
    says = "does not load where sqa_convert is not: ValueError: broken"
    with pytest.raises(CheckpointError, match=says), reloaded(folder, report):
        pass


def test_without_memory_for_it_nothing_is_lost(folder, monkeypatch):
    report = json.loads((folder / "report.json").read_text())
    monkeypatch.setattr(verifying, "_COPIES", 10**12)
    with reloaded(folder, report):
        pass
    assert "memory" in report["reloaded"]["skipped"]


def test_other_logits_are_noticed(folder):
    report = json.loads((folder / "report.json").read_text())
    for theirs in (torch.zeros(1, 16, 61), torch.zeros(1, 3, 61), torch.full((1, 16, 61), float("nan"))):
        with pytest.raises(CheckpointError, match="computes something else"):
            compare_logits(theirs, folder, report)


def test_a_row_for_comparison_may_fail():
    source = SAMPLES / "gpt2"
    held_out = prepare(source, tokens=64)

    def fails():
        raise MemoryError

    found = compare({"source": source, "mean": fails}, held_out, optional={"mean"})
    assert "source" in found and "mean" not in found
    with pytest.raises(MemoryError):
        compare({"source": source, "mean": fails}, held_out)


@pytest.mark.parametrize(
    "report", ["[]", "{}", '{"schema": 1, "sqa_convert": "1", "architecture": "X", "sites": []}', "{"]
)
def test_a_report_that_is_none_is_one_line(folder, report):
    (folder / "report.json").write_text(report)
    refused(folder, "report.json")


def test_a_stranger_who_takes_too_long_is_no_fault_of_the_folder(folder, monkeypatch):
    report = json.loads((folder / "report.json").read_text())
    monkeypatch.setattr(verifying, "_PATIENCE", 0)
    with reloaded(folder, report):
        pass
    assert "it took more than" in report["reloaded"]["skipped"]
    refused(folder, "it took more than")
