import json
import os

import pytest
import torch
from helpers import gpt2, t5, tokens
from helpers import plain_convert as convert

from sqa_convert import Recipe, load_recipe, uptrain
from sqa_convert.distill import kl_divergence
from sqa_convert.errors import CheckpointError, DataError, RecipeError
from sqa_convert.evaluation import HeldOut, Predictions, evaluate, load_model, measure, predict
from sqa_convert.recipe import recipe_names
from sqa_convert.report import recovered

SHORT = Recipe(tokens=40 * 1024, sequence_length=128, batch_size=8, learning_rate=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_short_run_recovers_part_of_the_damage_and_says_so(name, loss, tmp_path):
    out = tmp_path / "out"
    convert(f"sample:{name}", 6, 2, output=out)
    before = {k: v.clone() for k, v in load_model(out).state_dict().items()}
    report = uptrain(out, Recipe(**{**SHORT.__dict__, "loss": loss}))
    quality = report["quality"]
    assert quality["uptrained"]["kl"] < (0.8 if loss == "kl" else 1) * quality["converted"]["kl"]
    assert quality["uptrained"]["loss"] < quality["converted"]["loss"]
    share = (quality["converted"]["kl"] - quality["uptrained"]["kl"]) / quality["converted"]["kl"]
    assert recovered(quality, "kl") == pytest.approx(share)
    assert report["uptraining"]["tokens"] == 40 * 1024
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    # measured again from the folder: the numbers in the report are this model's
    again = evaluate(out, f"sample:{name}")
    assert again["model"]["kl"] == pytest.approx(quality["uptrained"]["kl"], rel=1e-4)
    after = load_model(out).state_dict()
    frozen = {n for n in before if n.endswith("k_proj.bias")}
    assert {n for n in before if torch.equal(before[n], after[n])} == frozen
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((out / "config.json").read_text())["sqa"]["source"] == f"sample:{name}"


def test_failed_training_leaves_the_converted_model(tmp_path):
    out = tmp_path / "out"
    convert("sample:gpt2", 6, 2, output=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="256 positions"):
        uptrain(out, Recipe(sequence_length=512))
    with pytest.raises(DataError, match="--data"):
        uptrain(out, SHORT.__class__(data=str(tmp_path / "none")))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_was_not_converted_is_refused(tmp_path):
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not made by sqa-convert"):
        uptrain(tmp_path)


def test_half_precision_weights_are_trained_in_float32_and_stored_as_they_were(tmp_path):
    convert("sample:gpt2", 6, 2, output=tmp_path / "out", dtype="bfloat16")
    uptrain(tmp_path / "out", Recipe(tokens=1024, sequence_length=64, batch_size=8), evaluate=False)
    assert {t.dtype for t in load_model(tmp_path / "out").state_dict().values()} == {torch.bfloat16}


def test_kl_divergence_is_the_definition():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(student, teacher).double(), expected, rtol=1e-5, atol=1e-6)
    assert kl_divergence(teacher, teacher).abs() < 1e-6


@pytest.mark.parametrize("make", [gpt2, t5])
def test_measured_loss_is_the_models_own(make):
    model = make()
    batches = [{"input_ids": tokens(2, 20), "labels": tokens(2, 20)} for _ in range(3)]
    if not model.config.is_encoder_decoder:
        batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in batches]
    predictions = predict(model, HeldOut(batches, "random", 0, torch.device("cpu")))
    quality = measure(predictions, predictions)
    expected = torch.stack([model(**b).loss for b in batches]).mean().item()
    assert quality.loss == pytest.approx(expected, rel=1e-5)
    assert quality.kl == pytest.approx(0, abs=1e-9)
    assert quality.top1 == 1


def test_kl_and_agreement_against_another_model():
    hidden, labels = torch.randn(50, 4), torch.randint(0, 9, (50,))
    a, b = (Predictions(hidden, torch.randn(9, 4), labels) for _ in range(2))
    q, p = ((x.hidden @ x.head.T).softmax(-1) for x in (a, b))
    quality = measure(a, b)
    assert quality.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert quality.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_every_packaged_recipe_loads():
    assert "quick" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).steps > 0


def test_flags_win_over_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tokens: 1_000_000\nlearning_rate: 1e-4\nloss: ce\n")  # YAML 1.1 reads 1e-4 as text
    with pytest.raises(RecipeError, match="learning_rate"):
        load_recipe(str(path))
    path.write_text("tokens: 1_000_000\nlearning_rate: 1.0e-4\nloss: ce\n")
    assert load_recipe(str(path)) == Recipe(tokens=1_000_000, learning_rate=1e-4, loss="ce")
    assert load_recipe(str(path), tokens=2_000_000).tokens == 2_000_000


def test_all_faults_of_a_recipe_are_named_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("tokns: 5\nbatch_size: many\nloss: mse\nwarmup: 2\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    for part in ("did you mean tokens", "batch_size: 'many' is no int", "loss: 'mse' must be kl or ce", "warmup: 2"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", ["- a", "{", "\x00"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(str(tmp_path / "r.yaml"))
