"""The last step of calibration: the whole converted model, trained towards its source for a few steps."""

import dataclasses
from functools import partial

import pytest
import torch
from helpers import gpt2, t5, tokens
from transformers import T5EncoderModel

import sqa_convert
from sqa_convert import Calibration
from sqa_convert.calibration import keep_polish, polish
from sqa_convert.conversion import fitting
from sqa_convert.errors import RecipeError
from sqa_convert.report.sentences import calibration_lines

HOW = Calibration(tokens=600, refine_steps=1)
WITHOUT = dataclasses.replace(HOW, polish_steps=0)
convert = partial(sqa_convert.convert, allocation="uniform")
KINDS = {"gpt2": gpt2, "t5": partial(t5, layers=2)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_comes_nearer_and_embeddings_stay(kind):
    source = KINDS[kind]()
    plain, polished = (convert(source, 6, 3, "svd", calibration=how) for how in (WITHOUT, HOW))
    told = polished.report["calibration"]["polish"]
    assert told["kept"] and told["steps"] == 8
    assert all(after < before for after, before in zip(told["kl"], told["kl_before"], strict=True))
    assert "polish" not in plain.report["calibration"]
    assert polished.report["calibration"]["kl"] < plain.report["calibration"]["kl"]
    before, after = plain.model.state_dict(), polished.model.state_dict()
    embedded = ("wte", "wpe", "shared", "embed_tokens", "lm_head")
    for name, tensor in after.items():
        stays = any(part in name for part in embedded) or name.endswith("k_proj.bias")
        assert torch.equal(tensor, before[name]) == stays, name
    assert any(
        "polished in 8 steps, kept: KL on the tokens to choose by" in s for s in calibration_lines(polished.report)
    )


def test_the_folder_holds_what_was_trained_in_the_checkpoints_dtype(tmp_path):
    source = gpt2().bfloat16()
    folder = convert(source, 6, 3, "svd", tmp_path / "x", calibration=HOW)
    in_memory = convert(source, 6, 3, "svd", calibration=HOW).model.state_dict()
    written = folder.model.state_dict()
    assert folder.report["calibration"]["polish"]["kept"]
    assert all(
        torch.equal(tensor, in_memory[name]) and tensor.dtype == torch.bfloat16 for name, tensor in written.items()
    )


@pytest.mark.parametrize("make", [partial(t5, layers=2), partial(gpt2, layers=3)], ids=["t5", "gpt2"])
def test_attention_that_is_not_converted_is_trained_at_the_small_rate(make, monkeypatch):
    """Here at none."""
    monkeypatch.setattr(polish, "REST", 0.0)
    source = make(heads=4)
    asked = {"q_groups": 2, "kv_groups": 1, "sites": "encoder"} if make.func is t5 else {"allocation": "4/4,2/1,4/4"}
    result = convert(source, method="svd", calibration=HOW, **asked)
    assert result.report["calibration"]["polish"]["kept"]
    whole = convert(source, 4, 4, calibration=None).model.state_dict()
    changed = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, whole[name])}
    sites = ("encoder.block.0", "encoder.block.1") if make.func is t5 else ("h.1.attn",)
    assert changed and all(any(site in name for site in sites) for name in changed)


def test_heads_that_were_fitted_outlive_a_want_of_memory(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(keep_polish, "polish", full)
    report = convert(gpt2(), 6, 3, "svd", calibration=HOW).report
    assert any("not polished: there is too little memory" in line for line in calibration_lines(report))


def test_what_predicts_nothing_cannot_be_polished():
    with pytest.raises(RecipeError, match="no language model head"):
        convert(T5EncoderModel(t5().config), 6, 3, calibration=dataclasses.replace(HOW, polish_steps=8))


def test_what_polish_makes_worse_is_not_kept(monkeypatch):
    source = gpt2()
    plain = convert(source, 6, 3, "svd", calibration=WITHOUT).model.state_dict()
    monkeypatch.setattr(polish, "RATE", 3.0)
    result = convert(source, 6, 3, "svd", calibration=HOW)
    assert not result.report["calibration"]["polish"]["kept"]
    assert all(torch.equal(plain[name], tensor) for name, tensor in result.model.state_dict().items())
    assert any("left out, as it did not lower the KL everywhere" in line for line in calibration_lines(result.report))


def test_one_kind_of_text_that_gets_worse_is_enough(monkeypatch):
    told = iter([0.2, 0.2, 0.1, 0.3])  # two kinds before, two after
    monkeypatch.setattr(keep_polish, "kl_to", lambda expected, held_out, student: next(told, 0.1))
    monkeypatch.setattr("sqa_convert.calibration.calibrate.kl_to", lambda *a: 0.2)
    how = dataclasses.replace(HOW, tokens=2048)
    polish_ = convert(gpt2(), 6, 3, "svd", calibration=how).report["calibration"]["polish"]
    assert polish_ == {"steps": 8, "kept": False, "kl_before": [0.2, 0.2], "kl": [0.1, 0.3]}


def test_beginnings_that_were_given_are_one_kind(tmp_path):
    (tmp_path / "begin.txt").write_text("def \nclass \n")
    how = dataclasses.replace(HOW, prompts=str(tmp_path / "begin.txt"), refine_steps=0, polish_steps=1)
    assert len(convert("sample:gpt2", 8, 4, "svd", calibration=how).report["calibration"]["polish"]["kl"]) == 1


def test_a_cpu_leaves_out_what_takes_it_too_long_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(fitting, "POLISH_OPERATIONS", 1.0)
    report = convert(gpt2(), 6, 3, "svd", calibration=HOW).report
    assert report["calibration"]["polish"]["steps"] == 0
    assert any("--polish-steps 150 does it anyway" in line for line in calibration_lines(report))
    asked = convert(gpt2(), 6, 3, "svd", calibration=dataclasses.replace(HOW, polish_steps=3)).report
    assert asked["calibration"]["polish"]["steps"] == 3


@pytest.mark.parametrize(("bytes_", "trained"), [(3e5, "attention"), (1.0, "nothing")])
def test_little_memory_trains_attention_alone_or_nothing(monkeypatch, bytes_, trained):
    source = gpt2()
    monkeypatch.setattr(polish, "MEMORY", bytes_)
    before = convert(source, 6, 3, "svd", calibration=WITHOUT).model.state_dict()
    after = convert(source, 6, 3, "svd", calibration=HOW).model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert all(".attn." in name for name in changed) and bool(changed) == (trained == "attention")


def test_it_trains_on_nothing_that_is_padding():
    source, text, results = gpt2(), tokens(4, 9), []
    for fill in (3, 40):
        student = convert(source, 6, 3, "mean", calibration=None).model
        ids = torch.full((4, 24), fill)
        ids[:, :9] = text
        labels = torch.where(torch.arange(24) < 9, ids, -100)
        drawn = torch.Generator().manual_seed(0)
        how = ({"transformer.h.0.attn.q_proj.weight"}, 3, torch.device("cpu"), drawn)
        results.append(polish.polish(student, source, [{"input_ids": ids, "labels": labels}], *how))
    assert results[0] and all(torch.equal(results[0][name], results[1][name]) for name in results[0])
