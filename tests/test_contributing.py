"""The method and the family worked out in CONTRIBUTING.md are such."""

import re
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, randomize, tokens
from transformers import OPTConfig, OPTForCausalLM

from sqa_convert import METHODS, convert, models
from sqa_convert.families import FAMILIES

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def example():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    example, methods = {"__name__": "example"}, dict(METHODS)
    for block in blocks:
        exec(block, example)
    yield example
    METHODS.clear()
    METHODS.update(methods)


@pytest.fixture
def source(example, monkeypatch):
    for name in ("SQAOPTConfig", "SQAOPTForCausalLM"):
        monkeypatch.setattr(models, name, example[name], raising=False)
    monkeypatch.setitem(FAMILIES, "opt", example["OPT"]())
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, word_embed_proj_dim=48, ffn_dim=40, num_hidden_layers=2,
        num_attention_heads=12, max_position_embeddings=32, dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomize(OPTForCausalLM(config))


@torch.no_grad()
def test_the_worked_example_keeps_the_logits_of_an_identity_conversion(source):
    ids = tokens()
    converted = convert(source, 12, 12, "mean").model
    assert torch.allclose(converted(ids).logits, source(ids).logits, atol=1e-5)


@torch.no_grad()
def test_the_worked_example_merges_heads_and_writes(source):
    model = convert(source, 8, 4, "svd", calibration=None).model
    attention = model.model.decoder.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 16)
    ids = tokens(1, 6)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


@torch.no_grad()
def test_the_worked_method_keeps_the_last_head_of_each_group(source):
    for how in ({}, {"partition": "searched"}):
        made = convert(source, 6, 3, "last", calibration=None, **how)
        groups = made.report["sites"][0]["partition"]
        lasts = [group[-1][-1] for group in groups]
        key = source.model.decoder.layers[0].self_attn.k_proj.weight.view(12, 4, 48)
        assert torch.equal(made.model.model.decoder.layers[0].self_attn.k_proj.weight.view(3, 4, 48), key[lasts])
