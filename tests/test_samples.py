"""The two checkpoints in the package. Methods are judged on them, so they never change."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import logits
from helpers import plain_convert as convert

from sqa_convert import evaluate
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_model
from sqa_convert.evaluation.measure import measure, predict

SHA256 = {
    "gpt2": "7b6f095efafb5282ef6154a857268184dbbd2250b922504996f93d8992033e1b",
    "t5": "34751fa15c910989a9d835127d6fb0382289285e0232c66bf1db3ff0785b0364",
}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize("name", SHA256)
def test_weights_are_frozen(name):
    assert hashlib.sha256((SAMPLES / name / "model.safetensors").read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", SHA256)
def test_samples_are_small_twelve_headed_and_trained(name):
    model = load_model(SAMPLES / name)
    assert model.config.num_attention_heads == 12
    assert model.num_parameters() <= 2_400_000
    assert (SAMPLES / name / "model.safetensors").stat().st_size <= 10e6
    # The baselines were counted on the corpus the sample was trained with; another interpreter's differs a little.
    recorded = json.loads((RESULTS / f"sample-{name}.json").read_text())
    measured = evaluate(SAMPLES / name)["model"]["loss"]
    assert measured == pytest.approx(recorded["held_out_loss"], abs=0.25)
    assert measured < recorded["baselines"]["bigram"] < recorded["baselines"]["unigram"]


def test_t5_reads_its_input():
    """Else its encoder and cross-attention would cost nothing to convert."""
    model, held_out = load_model(SAMPLES / "t5"), prepare(SAMPLES / "t5", tokens=4096)
    crossed = [batch | {"input_ids": batch["input_ids"].roll(1, 0)} for batch in held_out.batches]
    own, others = (measure(predict(model, replace(held_out, batches=b))).loss for b in (held_out.batches, crossed))
    assert others > own + 1


@pytest.mark.parametrize("name", SHA256)
def test_identity_conversion_keeps_the_samples_logits(name):
    source = load_model(SAMPLES / name)
    result = convert(f"sample:{name}", 12, 12).model
    ids = torch.randint(5, 2048, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, 30:] = 0
    expected, found = logits(source, ids, mask), logits(result, ids, mask)
    if name == "t5":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
