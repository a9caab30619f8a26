"""Checkpoints whose special tokens or generation settings are not the usual ones: nothing crashes, nothing is lost."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import VOCABULARY, gpt2, plain_convert, t5
from transformers import AutoConfig, GenerationConfig

from sqa_convert import convert
from sqa_convert.calibration.load_source import load_source
from sqa_convert.checkpoints.find import GENERATION_CONFIG, SAMPLES, open_source
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.conversion.build_model import build_model
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Calibration, Request
from sqa_convert.evaluation import generation
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_model
from sqa_convert.families.special_tokens import SpecialTokens, token_ids
from sqa_convert.text.plain_generation import generate, refusal, settle
from sqa_convert.text.self_generated import answers, own_rows

CPU = torch.device("cpu")
SAID = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "several, greedily": {"num_return_sequences": 3},
    "temperature without sampling": {"temperature": 0.7, "top_p": 0.9},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "stop strings": {"stop_strings": ["x"]},
    "no length": {"max_new_tokens": 0},
    "a cache nobody has": {"cache_implementation": "quantized"},
    "ends beyond the vocabulary": {"eos_token_id": [3, 50256], "forced_eos_token_id": 50256, "pad_token_id": -1},
    "no object": [1, 2],
}


@pytest.mark.parametrize(
    ("value", "ids"), [(3, (3,)), ([3, 99, 4], (3, 4)), (None, ()), (99, ()), (-1, ()), (True, ()), ("3", ()), ([], ())]
)
def test_an_entry_may_be_a_number_a_list_or_nothing(value, ids):
    assert token_ids(value, 10) == ids


def test_what_the_config_does_not_say_its_generation_config_does():
    config = SimpleNamespace(vocab_size=10, bos_token_id=50256, eos_token_id=50256, pad_token_id=None)
    assert SpecialTokens.of(config) == SpecialTokens(None, (), 0, 0)
    said = {"eos_token_id": [4, 50256], "decoder_start_token_id": [7]}
    assert SpecialTokens.of(config, said) == SpecialTokens(4, (4,), 4, 7)


@pytest.mark.parametrize(
    ("bos", "eos", "starts"), [(None, [5, 3], {5}), (50256, 50256, None), (None, None, None), (2, None, {2})]
)
def test_a_model_is_sampled_from_a_token_that_it_knows(bos, eos, starts, monkeypatch):
    model = gpt2(layers=1, bos_token_id=bos, eos_token_id=eos)
    monkeypatch.setattr("sqa_convert.text.self_generated.FLAT", 0.0)
    rows = own_rows(model, 400, 8, CPU, torch.Generator().manual_seed(0))
    ids, first = torch.cat(rows), {int(row[0]) for row in rows}
    assert ids.min() >= 0 and ids.max() < VOCABULARY
    assert starts is None or starts <= first
    assert starts is not None or len(first) > 5


@pytest.mark.parametrize(
    "tokens",
    [
        {"decoder_start_token_id": None},
        {"pad_token_id": None, "decoder_start_token_id": None},
        {"decoder_start_token_id": 50256, "pad_token_id": 50256},
        {"eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_a_t5_without_a_start_that_it_knows_is_given_one_and_so_is_the_result(tokens):
    source = ModelSource(t5(layers=2, heads=4, **tokens))
    given = {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 3).long()}
    plan = make_plan(source, Request(2, 1, method="mean"))
    for model in (load_source(plan, source), build_model(plan, source, {})[0]):
        assert model.config.decoder_start_token_id == 0
        assert torch.isfinite(model(**given).loss)


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_a_model_with_odd_special_tokens_is_calibrated(make):
    odd = {"eos_token_id": [1, 50256], "bos_token_id": None, "pad_token_id": 50256, "decoder_start_token_id": None}
    short = Calibration(tokens=64, refine_steps=0)
    model = make(layers=2, heads=2, n_positions=16, **odd)
    assert convert(model, 1, 1, method="first", calibration=replace(short, refit=True)).report["calibration"]


@pytest.mark.parametrize("name", SAID)
def test_whatever_a_generation_config_asks_for_the_model_loads_writes_and_is_saved(name, tmp_path):
    folder = tmp_path / "source"
    gpt2(layers=1).save_pretrained(folder)
    (folder / GENERATION_CONFIG).write_text(json.dumps(SAID[name]))
    model = load_model(folder)
    written = generate(model, {"input_ids": torch.ones(1, 4).long()}, max_new_tokens=4)
    assert written.shape[0] == 1 and 4 < written.shape[1] <= 8
    model.save_pretrained(tmp_path / "final")
    plain_convert(folder, 6, 3, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / GENERATION_CONFIG).read_text()) == SAID[name]


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
@pytest.mark.parametrize("said", [{"output_attentions": True, "output_hidden_states": True}, {"return_dict": False}])
def test_whatever_a_config_says_of_calls_the_model_computes_writes_and_is_saved(said, make, tmp_path):
    folder, ids = tmp_path / "source", torch.ones(1, 4).long()
    make(layers=2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    model = load_model(folder)
    assert generate(model, {"input_ids": ids}, max_new_tokens=2).shape[0] == 1
    returned = model(input_ids=ids, decoder_input_ids=ids) if make is t5 else model(input_ids=ids)
    assert returned.logits.shape == (1, 4, VOCABULARY) and "attentions" not in returned
    model.save_pretrained(tmp_path / "final")
    result = plain_convert(folder, 6, 3).model
    assert result.config.return_dict and result.config.output_attentions == ("output_attentions" in said)


def test_a_model_in_memory_keeps_settings_that_transformers_refuses_to_save(tmp_path):
    model = gpt2(layers=1)
    model.generation_config.temperature = 0.7
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    conversion = plain_convert(model, 6, 3, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / GENERATION_CONFIG).read_text())["temperature"] == 0.7
    assert conversion.model.generation_config.temperature == 0.7
    assert plain_convert(model, 6, 3).model.generation_config.temperature == 0.7


def test_a_model_that_cannot_write_has_no_samples_and_loses_nothing_else(monkeypatch):
    def fails(*arguments, **settings):
        raise IndexError

    monkeypatch.setattr(generation, "generate", fails)
    held_out = prepare(SAMPLES / "gpt2", tokens=64)
    assert generation.continuations({"source": SAMPLES / "gpt2"}, held_out) == []


def test_settings_of_a_folder_stay_in_memory_too(tmp_path):
    gpt2(layers=1).save_pretrained(tmp_path)
    (tmp_path / GENERATION_CONFIG).write_text('{"penalty_alpha": 0.6, "eos_token_id": [0, 3]}')
    settings = plain_convert(tmp_path, 6, 3).model.generation_config
    assert (settings.penalty_alpha, settings.eos_token_id) == (0.6, [0, 3])


@pytest.mark.parametrize("said", ["several, greedily", "no object"])
def test_a_result_whose_settings_transformers_refuses_is_verified_and_its_model_given(said, tmp_path):
    gpt2(layers=1).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / GENERATION_CONFIG).write_text(json.dumps(SAID[said]))
    conversion = plain_convert(tmp_path / "source", 6, 3, output=tmp_path / "out")
    assert refusal(tmp_path / "out")
    assert conversion.model.config.n_head == 6


def test_generation_leaves_a_models_own_settings_as_they_were():
    model = settle(gpt2(layers=1))
    model.generation_config = GenerationConfig(num_beams=3, repetition_penalty=9.0, eos_token_id=None)
    before = copy.deepcopy(model.generation_config)
    generate(model, {"input_ids": torch.ones(1, 4).long()}, max_new_tokens=2)
    assert model.generation_config == before


@pytest.mark.parametrize("layers", [(1, 3), (3, 1)], ids=["more in the decoder", "fewer in the decoder"])
def test_a_t5_of_unequal_stacks_answers_before_and_after(layers):
    model = t5(layers=layers[0], num_decoder_layers=layers[1], n_positions=16)
    ids = torch.ones(2, 8).long()
    for one in (model, plain_convert(model, 6, 3).model):
        assert generate(one, {"input_ids": ids}, max_new_tokens=3).shape[0] == 2
        written = answers(one, list(ids), 2, CPU, torch.Generator().manual_seed(0))
        assert len(written) == 2 and all(0 < len(text) <= 2 for text in written)


def test_a_decoder_start_that_is_a_list_is_its_first(tmp_path):
    t5(layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": [4, 5]}))
    source = open_source(str(tmp_path))
    plan = make_plan(source, Request(6, 3))
    assert plan.config["decoder_start_token_id"] == 4
    assert load_source(plan, source).config.decoder_start_token_id == 4
    assert not isinstance(source, ModelSource) and AutoConfig.from_pretrained(tmp_path).vocab_size == VOCABULARY
