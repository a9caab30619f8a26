"""The twin of a large model that multiplies in bfloat16, and what calibration does with it."""

import pytest
import torch
from helpers import gpt2, t5, tokens

from sqa_convert import Calibration, convert
from sqa_convert.text import quick_twin
from sqa_convert.text.quick_twin import twin_of

CPU = torch.device("cpu")


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(quick_twin, "LARGE", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_a_twin_predicts_nearly_the_same_and_shares_what_it_does_not_round(make, all_are_large):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = twin_of(model, CPU)
    ids = tokens(2, 9)
    more = {"labels": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected, found = (m(input_ids=ids, **more).logits.log_softmax(-1) for m in (model, twin))
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < 1e-3 * (expected.exp() * (expected - expected.mean(-1, keepdim=True))).sum(-1).mean()
    assert twin_of(twin, CPU) is twin
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_small_models_and_devices_without_such_products_have_no_twin(monkeypatch):
    model = gpt2()
    assert twin_of(model, CPU) is model
    monkeypatch.setattr(quick_twin, "LARGE", 1)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    assert twin_of(model, CPU) is model
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert twin_of(model, CPU) is not model
    assert twin_of(model, torch.device("meta")) is model


@pytest.mark.parametrize(
    "make", [pytest.param(gpt2, id="gpt2"), pytest.param(t5, id="t5", marks=pytest.mark.integration)]
)
def test_heads_are_fitted_as_well_by_a_twin(make, monkeypatch, request):
    source = make()
    how = Calibration(tokens=1000, refine_steps=5, polish_steps=0)
    plain = convert(source, 6, 3, "svd", allocation="uniform", calibration=how).report
    request.getfixturevalue("all_are_large")
    quick = convert(source, 6, 3, "svd", allocation="uniform", calibration=how).report
    assert quick["calibration"]["kl"] != plain["calibration"]["kl"]
    assert quick["calibration"]["kl"] < 1.15 * plain["calibration"]["kl"]
    again = convert(source, 6, 3, "svd", allocation="uniform", calibration=how).report
    assert again["calibration"]["kl"] == quick["calibration"]["kl"]


def test_large_logits_are_not_rounded(all_are_large):
    """GPT-2's are about -100: all of them alike, which says nothing."""
    model = gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        shift = model.transformer.ln_f.bias * 400 / model.transformer.ln_f.bias.square().sum()
        model.lm_head.weight.add_(shift)
        ids = tokens(2, 9)
        expected, found = (m(input_ids=ids).logits for m in (model, twin_of(model, CPU)))
    assert expected.abs().mean() > 100
    assert (expected.log_softmax(-1) - found.log_softmax(-1)).abs().max() < 0.1
