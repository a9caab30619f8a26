"""Objects in, objects out: what a user of transformers does from Python without a folder or a flag."""

import json

import pytest
import torch
from helpers import gpt2, t5
from test_given_data import LENGTH, ROWS, drawn_tokens
from transformers import AutoTokenizer

from sqa_convert import Calibration, Recipe, bench, convert, evaluate, load, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.errors import CheckpointError, OutputError, RecipeError
from sqa_convert.pipeline.verify import verify
from sqa_convert.speed.settings import Settings

TRAINED = {"sequence_length": 16, "batch_size": 4, "evaluations": 1, "held_out_tokens": 64, "tokens": 8 * 64}
QUICK = Settings(lengths=(8,), repeats=1, parts=("model",), modes=("prefill",))


@pytest.fixture
def source():
    return gpt2(heads=4, n_positions=32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(SAMPLES / "gpt2")


def same_weights(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.integration
def test_a_model_in_memory_is_converted_measured_trained_timed_and_saved(source, tmp_path):
    data = drawn_tokens(ROWS, LENGTH)
    conversion = convert(source, 2, 1, "svd", calibration=Calibration(data, tokens=600, refine_steps=1))
    before = conversion.evaluate(data)
    assert conversion.source is source and before["model"]["kl"] > 0
    weights = {name: tensor.clone() for name, tensor in conversion.model.state_dict().items()}
    model = conversion.model
    assert conversion.uptrain(data, keep_anyway=True, **TRAINED) is conversion
    assert conversion.model is model and conversion.output is None
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    after = conversion.evaluate(data)
    assert after["model"]["kl"] == pytest.approx(conversion.report["quality"]["uptrained"]["kl"], abs=1e-5)
    assert conversion.report["uptraining"]["tokens"] == TRAINED["tokens"]
    timed = conversion.bench(QUICK)
    assert [row["model"] for row in timed["rows"]] == ["source", "converted"]
    place = conversion.save_pretrained(tmp_path / "saved")
    assert verify(place)["files"] == 1 and same_weights(load(place).model, model)
    again = load(place, source)
    assert again.evaluate(data)["model"] == after["model"]
    with pytest.raises(OutputError, match="exists"):
        conversion.save_pretrained(place)
    assert conversion.save_pretrained(place, overwrite=True, verify=False) == place


def test_a_folder_is_the_same_object(tmp_path):
    data = drawn_tokens(ROWS, LENGTH)
    gpt2(heads=4, n_positions=32).save_pretrained(tmp_path / "source")
    conversion = convert(tmp_path / "source", 2, 1, calibration=None, output=tmp_path / "out", verify=False)
    assert conversion.model.config.n_head == 2
    loaded = load(str(tmp_path / "out"))
    assert loaded.report == json.loads(json.dumps(conversion.report)) and loaded.output == conversion.output
    assert loaded.evaluate(data)["model"] == conversion.evaluate(data)["model"]
    loaded.uptrain(data, keep_anyway=True, **TRAINED)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["uptraining"]["tokens"] == TRAINED["tokens"]
    assert not same_weights(loaded.model, conversion.model)
    loaded.uptrain(data, keep_anyway=True, output=tmp_path / "other", **TRAINED)
    assert loaded.output == tmp_path / "other"


def test_a_loaded_model_and_its_folder_are_trained_together(tmp_path):
    data = drawn_tokens(ROWS, LENGTH)
    gpt2(heads=4, n_positions=32).save_pretrained(tmp_path / "source")
    conversion = convert(tmp_path / "source", 2, 1, calibration=None, output=tmp_path / "out", verify=False)
    model = conversion.model
    conversion.uptrain(data, keep_anyway=True, **TRAINED)
    assert conversion.model is model and same_weights(load(tmp_path / "out").model, model)
    with pytest.raises(RecipeError, match="no run that was stopped"):
        convert(gpt2(heads=4), 2, 1, calibration=None).uptrain(data, resume=True)


def test_another_source_is_told_apart(source):
    model = convert(source, 2, 1, calibration=None).model
    for other in (gpt2(heads=8, n_positions=32), gpt2(heads=4, layers=3), t5(heads=4, layers=2)):
        with pytest.raises(CheckpointError, match="not what the model was made from"):
            load(model, other)


def test_functions_take_objects_as_the_methods_do(source, tmp_path):
    data = drawn_tokens(ROWS, LENGTH)
    conversion = convert(source, 2, 1, calibration=None)
    found = evaluate(conversion, source, data=data)
    assert found["model"] == evaluate(conversion.model, conversion.source, data=data)["model"]
    recipe = Recipe(data="given", **TRAINED)
    report = uptrain(conversion.model, recipe, source=source, data=data, keep_anyway=True)
    assert report["quality"]["uptrained"]["kl"] > 0
    rows = bench(conversion, QUICK)["rows"]
    assert {row["model"] for row in rows} == {"source", "converted"}
    assert bench({"it": conversion.model}, QUICK)["rows"]


def test_what_transformers_saved_is_trained_and_loaded(source, tmp_path):
    """A folder of `model.save_pretrained` has no report: it is made anew from config and source."""
    data = drawn_tokens(ROWS, LENGTH)
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", 2, 1, calibration=None).model.save_pretrained(tmp_path / "saved")
    conversion = load(tmp_path / "saved")
    assert conversion.report["cost"]["after"]["query_heads"] == {"decoder": 2}
    assert "in memory" not in repr(conversion) and "query heads" in repr(conversion)
    recipe = Recipe(data="given", **TRAINED)
    report = uptrain(tmp_path / "saved", recipe, data=data, keep_anyway=True)
    assert report["quality"]["uptrained"]["kl"] > 0 and (tmp_path / "saved" / "README.md").is_file()
    source.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not made by sqa-convert"):
        load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not made by sqa-convert"):
        load(source)


def test_an_encoder_decoder_too(tmp_path):
    source = t5(heads=4, layers=2)
    pairs = [{"input_ids": torch.tensor(drawn_tokens(ROWS, LENGTH)), "labels": torch.tensor(drawn_tokens(ROWS, 9))}]
    conversion = convert(source, 2, 1, sites="encoder", calibration=None)
    before = conversion.evaluate(pairs)["model"]["kl"]
    conversion.uptrain(pairs, keep_anyway=True, **TRAINED)
    assert conversion.evaluate(pairs)["model"]["kl"] != before
    conversion.save_pretrained(tmp_path / "saved", verify=False)
    assert load(tmp_path / "saved", source).model.config.heads("encoder") == (2, 1)


def test_a_tokenizer_goes_with_a_model_in_memory(tokenizer, tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 40 for i in range(60)]
    source = gpt2(heads=4, n_positions=32, vocab_size=len(tokenizer))
    how = Calibration(texts, tokens=600, refine_steps=1)
    conversion = convert(source, 2, 1, "svd", calibration=how, tokenizer=tokenizer)
    assert "a given list of 60" in conversion.report["calibration"]["text"]
    found = conversion.evaluate(texts, tokens=256)
    assert found["model"]["kl"] > 0
    place = conversion.save_pretrained(tmp_path / "saved", verify=False)
    assert AutoTokenizer.from_pretrained(place).get_vocab() == tokenizer.get_vocab()
    written = convert(source, 2, 1, calibration=None, tokenizer=tokenizer, output=tmp_path / "out", verify=False).output
    assert AutoTokenizer.from_pretrained(written).get_vocab() == tokenizer.get_vocab()
    source.save_pretrained(tmp_path / "source")  # without a tokenizer
    for given in (source, tmp_path / "source"):
        measured = convert(
            given, 2, 1, calibration=None, tokenizer=tokenizer, output=tmp_path / "out", overwrite=True, verify=False,
            evaluate=True, data=texts,
        ).report["quality"]  # fmt: skip
        plain = evaluate(source, data=texts, tokenizer=tokenizer)["model"]
        assert measured["source"]["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    with pytest.raises(CheckpointError, match="tokenizer is a int"):
        convert(source, 2, 1, calibration=None, tokenizer=3)


def test_a_conversion_shows_itself(source):
    conversion = convert(source, 2, 1, calibration=None)
    shown, page = repr(conversion), conversion._repr_html_()
    assert shown.startswith("SQAGPT2ForCausalLM from GPT2LMHeadModel, in memory")
    assert "query heads" in shown and len(shown.splitlines()) < 20 and max(map(len, shown.splitlines())) <= 100
    assert page.count("<table>") == 1 and "<script" not in page and "query heads" in page


def test_what_uptrain_does_not_know_is_said(source):
    with pytest.raises(RecipeError, match="uptrain has no learning_speed"):
        convert(source, 2, 1, calibration=None).uptrain(learning_speed=1)


def test_a_model_in_memory_is_published(source, tmp_path, monkeypatch):
    sent = {}

    def push(folder, repo_id, private):
        sent[repo_id] = {path.name for path in folder.iterdir()}
        return f"https://hub/{repo_id}"

    monkeypatch.setattr("sqa_convert.publish.push_to_hub", push)
    conversion = convert(source, 2, 1, calibration=None)
    monkeypatch.setattr("sqa_convert.pipeline.verify.verify", lambda folder: {})  # which has a test of its own
    assert conversion.push_to_hub("me/it") == "https://hub/me/it"
    assert {"model.safetensors", "config.json", "modeling_sqa_gpt2.py", "README.md", "report.json"} <= sent["me/it"]
