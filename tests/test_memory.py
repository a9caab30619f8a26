"""What calibration holds in memory: within a budget, a container's limit, and bfloat16 where float32 does not fit."""

import dataclasses

import psutil
import pytest
import torch
from helpers import gpt2, t5, tokens

from sqa_convert import Calibration, convert
from sqa_convert.calibration import load_source, memory_budget
from sqa_convert.calibration.available_memory import available_memory
from sqa_convert.calibration.fisher import sensitivity
from sqa_convert.calibration.lean_copy import lean_copy
from sqa_convert.checkpoints.find import open_source
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import RecipeError
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.measure import predict
from sqa_convert.families import Site
from sqa_convert.pipeline.verify import reloaded
from sqa_convert.text import quick_twin
from sqa_convert.text.quick_twin import twin_of

CPU = torch.device("cpu")
GROUPS = {
    "2": ("0::/box", "memory.max", "memory.current", "inactive_file"),
    "1": ("4:cpu,memory:/box", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def container(root, version, inside):
    """What Linux shows of a control group that may hold 1000 bytes, has 600, and can give up 100 of them."""
    line, limit, used, given_up = GROUPS[version]
    group = root / "sys/fs/cgroup" / ("memory" if version == "1" else "") / ("" if inside else "box")
    group.mkdir(parents=True)
    for name, text in ((limit, "1000\n"), (used, "600\n"), ("memory.stat", f"anon 500\n{given_up} 100\n")):
        (group / name).write_text(text)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpuset:/\n{line}\n")


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_containers_limit_is_what_is_available(tmp_path, version, inside):
    container(tmp_path, version, inside)
    assert available_memory(tmp_path) == 500


def test_without_a_limit_the_machines_is(tmp_path):
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize("given", ["8", "lots", "10KB", 8])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(RecipeError, match=rf"memory='?{given}'?\): give a size with its unit"):
        convert(gpt2(), 8, 4, calibration=Calibration(memory=given))


@pytest.mark.parametrize("make", [lambda: "sample:gpt2", gpt2], ids=["folder", "in memory"])
def test_too_little_memory_is_refused_with_what_is_needed(make):
    with pytest.raises(RecipeError, match=r"memory=…\): 0\.2GB is too little; .* needs about \d\.\dGB; give more"):
        convert(make(), 8, 4, calibration=Calibration(memory="200MB"))


@pytest.mark.parametrize("held", [2e8, 9e9], ids=["little", "another model"])
def test_what_the_process_holds_is_not_free(held, monkeypatch):
    """Such as a model in a notebook. What libraries take of it is not counted a second time."""
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 3_000_000_000)
    monkeypatch.setattr(memory_budget, "memory_of_process", lambda: int(held))
    source = ModelSource(gpt2())
    budget = memory_budget.memory_budget(make_plan(source, Request(6, 3)), source, CPU)
    assert budget.total == 3e9 + min(held, memory_budget.LIBRARIES)


@pytest.mark.parametrize(("asked", "told"), [(None, "1534MB"), ("1.5GiB", "1610.612736MB")])
def test_a_report_says_what_memory_gives_the_same_budget_again(asked, told, monkeypatch):
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 1_234_567_891)
    monkeypatch.setattr(memory_budget, "memory_of_process", lambda: 300_000_000)
    how, source = Calibration(tokens=256, refine_steps=0, polish_steps=0, memory=asked), ModelSource(gpt2(4, layers=1))
    assert convert(source.model, 2, 1, calibration=how, device="cpu").report["calibration"]["memory"] == told
    plans = (make_plan(source, Request(2, 1, calibration=dataclasses.replace(how, memory=m))) for m in (asked, told))
    first, again = (memory_budget.memory_budget(plan, source, CPU) for plan in plans)
    assert first == again


def test_a_budget_is_found_once_before_anything_is_loaded(monkeypatch):
    found, loads = [], []
    asked, loaded = memory_budget.memory_budget, load_source.load_source
    monkeypatch.setattr(memory_budget, "memory_budget", lambda *given: found.append(len(loads)) or asked(*given))
    monkeypatch.setattr(load_source, "load_source", lambda *given: loads.append(0) or loaded(*given))
    convert(gpt2(heads=4, layers=1), 2, 1, calibration=Calibration(tokens=256, refine_steps=0, polish_steps=0))
    assert (found, loads) == ([0], [0])


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_a_lean_copy_is_the_twin_of_a_source_that_was_never_in_float32(make, tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    lean = lean_copy(make_plan(source, Request(6, 3)), source)
    monkeypatch.setattr(quick_twin, "LARGE", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    twin, ids = twin_of(model, CPU), tokens(2, 9)
    more = {"labels": ids} if model.config.is_encoder_decoder else {}
    for module in lean.modules():
        module.quick = True
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=ids, **more).logits for m in (lean, twin)))
        for module in lean.modules():
            module.quick = False
        slow, expected = (m(input_ids=ids, **more).logits.log_softmax(-1) for m in (lean, model))
    assert 0 < (expected.exp() * (expected - slow)).sum(-1).mean() < 1e-3
    large = {p.dtype for p in lean.parameters() if p.ndim == 2 and p.shape != lean.get_input_embeddings().weight.shape}
    assert torch.bfloat16 in large
    assert twin_of(lean, CPU) is lean


def test_where_float32_does_not_fit_heads_are_fitted_by_a_lean_copy(tmp_path, monkeypatch):
    gpt2(heads=4, layers=1).save_pretrained(tmp_path)

    def tight(*given, found=memory_budget.memory_budget):
        return dataclasses.replace(found(*given), lean=True)

    monkeypatch.setattr(memory_budget, "memory_budget", tight)
    how = Calibration(tokens=400, refine_steps=1, polish_steps=2)
    report = convert(tmp_path, 2, 1, calibration=how, device="cpu").report["calibration"]
    assert report["warnings"][0]["rule"] == "little_memory"
    assert not report["polish"]["kept"] and "memory" in report["polish"]["why"]
    assert report["kl_before_refine"].keys() == {"svd", "svd, contiguous", "procrustes"}
    assert 0 < report["kl"] < 1


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_blocks_computed_again_give_the_same_gradients(make):
    model, ids = make().requires_grad_(False), tokens(1, 9)
    prefix = "decoder.block.1.layer.0.SelfAttention" if model.config.is_encoder_decoder else "transformer.h.1.attn"
    site, calls = Site("decoder", 1, prefix), []
    hook = model.get_submodule(prefix).register_forward_hook(lambda *given: calls.append(1))
    found = [
        sensitivity(model, [site], [{"input_ids": ids, "labels": ids}], CPU, torch.Generator().manual_seed(0), memory=m)
        for m in (float("inf"), 1)
    ]
    hook.remove()
    assert torch.equal(found[0][site], found[1][site])
    assert len(calls) == 3  # once, and twice
    assert not any(module.training for module in model.modules())


def test_no_other_process_loads_a_result_beside_what_is_measured_in_little_memory(tmp_path):
    gpt2().save_pretrained(tmp_path)
    report = {}
    with reloaded(tmp_path, report, memory=10):
        pass
    assert report == {"reloaded": {"skipped": "there was not memory enough"}}


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_predictions_are_kept_without_logits_of_the_whole_batch(make, monkeypatch):
    model, ids = make(), tokens(2, 9)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *given, **how: pytest.fail("a loss was computed"))
    found = predict(model, HeldOut([{"input_ids": ids, "labels": ids}], "", 0, CPU))
    answers = model.config.is_encoder_decoder
    logits = model(input_ids=ids, **({"decoder_input_ids": model._shift_right(ids)} if answers else {})).logits
    predicted = logits if answers else logits[:, :-1]
    assert torch.allclose(found.hidden @ found.head.T, predicted.flatten(0, 1), atol=1e-4)
    assert "forward" not in vars(model.get_output_embeddings())
