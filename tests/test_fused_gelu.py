"""GELU as one operation: the same function, and models are left as they were."""

import pytest
import torch
from helpers import gpt2, t5, tokens
from transformers.activations import NewGELUActivation

from sqa_convert import Calibration, convert
from sqa_convert.evaluation.fused_gelu import fused_gelu


@pytest.mark.parametrize("make", [gpt2, lambda: t5(feed_forward_proj="gated-gelu")], ids=["gpt2", "t5"])
def test_models_compute_the_same_and_are_left_as_they_were(make):
    model, ids = make(), tokens(2, 9)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    parts = [part for part in model.modules() if type(part) is NewGELUActivation]
    expected = model(input_ids=ids, **more).logits
    with pytest.raises(ZeroDivisionError), fused_gelu(model):
        assert parts and not any(type(part) is NewGELUActivation for part in model.modules())
        torch.testing.assert_close(model(input_ids=ids, **more).logits, expected, rtol=1e-4, atol=1e-5)
        raise ZeroDivisionError
    assert [part for part in model.modules() if type(part) is NewGELUActivation] == parts


def test_a_model_in_memory_keeps_its_own_after_a_conversion():
    source = gpt2(layers=1)
    result = convert(source, 8, 4, calibration=Calibration(tokens=512, refine_steps=1, polish_steps=1)).model
    for model in (source, result):
        assert any(type(part) is NewGELUActivation for part in model.modules())
        assert not any(type(part) is torch.nn.GELU for part in model.modules())
