"""Models in memory, wrapped in what runs them."""

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from helpers import gpt2, logits, plain_convert, tokens

from sqa_convert.errors import SQAError


def with_adapter(model, by_peft):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    if by_peft:
        return peft.get_peft_model(model, adapter)
    model.add_adapter(adapter)
    return model


WRAPPERS = {
    "DataParallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "compiled, in parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "prepared": lambda model: Accelerator(cpu=True).prepare(model),
}
REFUSED = {
    "adapter of peft": (lambda model: with_adapter(model, True), "merge it first"),
    "adapter of transformers": (lambda model: with_adapter(model, False), "merge it first"),
    "offloaded": (lambda model: cpu_offload(model, execution_device=torch.device("cpu")), "without offloading"),
    "no model of transformers": (lambda model: torch.nn.Sequential(model), "give one, a folder or a hub id"),
    "nothing": (lambda model: None, "give one, a folder or a hub id"),
    "a class": (type, "give one, a folder or a hub id"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_converted_as_the_model_in_it(wrapper):
    model, ids = gpt2(layers=1), tokens()
    expected = logits(plain_convert(model, 6, 3).model, ids)
    conversion = plain_convert(WRAPPERS[wrapper](model), 6, 3)
    assert conversion.report["source"]["architecture"] == "GPT2LMHeadModel"
    torch.testing.assert_close(logits(conversion.model, ids), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_whole_model_is_refused_with_the_way_out(case):
    make, way_out = REFUSED[case]
    with pytest.raises(SQAError, match=way_out) as refusal:
        plain_convert(make(gpt2(layers=1)), 6, 3)
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)
