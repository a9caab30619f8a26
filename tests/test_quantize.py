"""Converted models in 8 bits, by torchao as transformers loads it."""

import json
from pathlib import Path

import pytest
import torch
from helpers import plain_convert
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sqa_convert import evaluate

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "quantize.json"
AUTO = {"gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
LINEAR = {"gpt2": 16, "t5": 72}
"""layers of a converted sample that torchao quantizes: of a GPT-2 those of attention"""


@pytest.mark.integration
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("sample", ["gpt2", "t5"])
def test_a_converted_model_is_quantized_as_it_is_loaded(sample, config, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    plain_convert(f"sample:{sample}", 8, 4, output=tmp_path / "out", evaluate=False, verify=False)
    how = {"trust_remote_code": True, "dtype": torch.float32}
    whole = AUTO[sample].from_pretrained(tmp_path / "out", **how).eval()
    int8 = TorchAoConfig(getattr(torchao, config)())
    model = AUTO[sample].from_pretrained(tmp_path / "out", quantization_config=int8, **how).eval()
    small = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
    assert len(small) == LINEAR[sample] and model.get_output_embeddings() not in small
    found = evaluate(model, whole, tokens=1024, tokenizer=f"sample:{sample}")
    assert 0 < found["model"]["kl"] < 0.02 and abs(found["model"]["loss"] - found["against"]["loss"]) < 0.02
    model.save_pretrained(tmp_path / "int8")
    again = AUTO[sample].from_pretrained(tmp_path / "int8", trust_remote_code=True).eval()
    ids = torch.arange(1, 9)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if sample == "t5" else {})
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_the_page_shows_what_was_measured():
    result = json.loads(RESULTS.read_text())
    page = (RESULTS.parent.parent.parent / "docs" / "quantize.md").read_text()
    for row in result["rows"]:
        assert f"{row['loss']:.4f}, {row['kl']:.4f}" in page
