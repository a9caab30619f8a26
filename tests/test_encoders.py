"""Text encoders, which predict nothing: measured by their hidden states."""

import json
import textwrap

import pytest
import torch
from helpers import gpt2, randomize, t5
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModelForTextEncoding,
    AutoTokenizer,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from sqa_convert import Calibration, convert, evaluate, load_recipe, resolve, uptrain
from sqa_convert.cli import convert as convert_command
from sqa_convert.cli import evaluate as eval_command
from sqa_convert.cli import uptrain as uptrain_command
from sqa_convert.errors import DataError, QualityError, RecipeError, UnreadableTextError, UnsupportedModelError
from sqa_convert.models import SQAT5EncoderModel
from sqa_convert.text.documents import documents
from sqa_convert.text.one_text_a_line import has_a_text_a_line
from sqa_convert.uptraining.hidden_state_text import TextsCollator

ROWS = 60


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The encoder of a sample, with its tokenizer, and captions."""
    folder = tmp_path_factory.mktemp("encoders")
    T5EncoderModel.from_pretrained(resolve("sample:t5")).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(resolve("sample:t5")).save_pretrained(folder / "source")
    captions = [
        {"text": f"def caption_{i}(self, width={i}): return self.rows[{i} : width]" * (1 + i % 3)} for i in range(ROWS)
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    how = Calibration(str(folder / "captions.jsonl"), tokens=1500, refine_steps=2)
    convert(folder / "source", 8, 4, output=folder / "out", calibration=how, evaluate=True, verify=False)
    return folder


def test_an_encoder_is_measured_on_the_held_out_part_of_what_it_is_fitted_to(encoder):
    report = json.loads((encoder / "out" / "report.json").read_text())
    quality = report["quality"]
    assert "held-out part" in quality["data"] and "captions.jsonl" in quality["data"] and quality["tokens"] > 0
    source, converted, mean = (quality[name] for name in ("source", "converted", "mean"))
    assert source == {"error": None, "cosine": None, "layer_errors": None}
    assert 0 < converted["error"] < mean["error"] and mean["cosine"] < converted["cosine"] < 1
    assert len(converted["layer_errors"]) == 4 and converted["layer_errors"][-1] == converted["error"]
    share, cosine = f"{converted['error']:.2%}", f"{converted['cosine']:.4f}"
    card, page = ((encoder / "out" / name).read_text() for name in ("README.md", "report.html"))
    for text in (card, page):
        assert share in text and cosine in text
    assert "squared error of the hidden state" in card and "with heads averaged" in card


def test_the_figures_are_what_they_are_said_to_be(encoder):
    result = evaluate(encoder / "out", encoder / "source", data=str(encoder / "captions.jsonl"), tokens=300)
    models = [
        c.from_pretrained(encoder / n).eval() for c, n in ((T5EncoderModel, "source"), (SQAT5EncoderModel, "out"))
    ]
    tokenizer = AutoTokenizer.from_pretrained(encoder / "source")
    found, states = 0, ([], [])
    cosines = []
    for text in documents(str(encoder / "captions.jsonl"), "heldout", shuffled=True):
        ids = tokenizer(str(text), return_tensors="pt").input_ids
        with torch.no_grad():
            pair = [model(ids).last_hidden_state[0].double() for model in models]
        for kept, state in zip(states, pair, strict=True):
            kept.append(state)
        cosines.append(cosine_similarity(*(state.mean(0) for state in pair), dim=0))
        found += ids.numel()
        if found >= 300:
            break
    wanted, made = map(torch.cat, states)
    error = (made - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert result["tokens"] == found
    assert result["model"]["error"] == pytest.approx(error.item(), rel=1e-4)
    assert result["model"]["cosine"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-6)


def test_the_gate_of_an_encoder(encoder, called):
    given = ("--data", encoder / "captions.jsonl", "--tokens", 128)
    code, said, _ = called(eval_command.main, encoder / "out", *given, "--max-error", 100)
    assert code == 0 and "hidden" in said and "cosine" in said
    code, _, err = called(eval_command.main, encoder / "out", *given, "--max-error", 1e-6)
    assert code == 4 and "is more than --max-error 1e-06" in err
    code, said, _ = called(eval_command.main, encoder / "out", *given, "--json")
    assert len(json.loads(said)["quality"]["model"]["layer_errors"]) == 4
    for flags, wanted in (
        (("--max-kl", 1), "--max-error in place of --max-kl"), (("--max-error", -1), "give 0 or more"),
    ):  # fmt: skip
        code, _, err = called(eval_command.main, encoder / "out", *given, *flags)
        assert code == 2 and wanted in err
    code, _, err = called(eval_command.main, "sample:gpt2", "--against", "sample:gpt2", "--max-error", 1)
    assert code == 2 and "predicts tokens: --max-kl" in err


def test_at_all_heads_nothing_is_lost(encoder):
    same = convert(encoder / "source", 12, 12, calibration=None).model
    source = T5EncoderModel.from_pretrained(encoder / "source").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder / "source")
    found = evaluate(same, source, data=str(encoder / "captions.jsonl"), tokens=128, tokenizer=tokenizer)
    assert found["model"]["error"] == 0 and found["model"]["cosine"] == pytest.approx(1)


def test_a_gpt2_without_a_head_is_measured_too():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve("sample:gpt2"))
    config.n_layer = 2
    source = randomize(GPT2Model(config), 0.1).eval()
    rows = [{"input_ids": list(range(i, i + 20))} for i in range(1, 100)]
    fewer = convert(source, 6, 3, calibration=None).model
    found = evaluate(fewer, source, data=rows, tokens=100)
    assert found["model"]["error"] > 0 and len(found["model"]["layer_errors"]) == 2
    other = GPT2Model(config.__class__(**{**config.to_dict(), "n_layer": 1})).eval()
    with pytest.raises(RecipeError, match="number of layers"):
        evaluate(other, source, data=rows, tokens=100)
    with pytest.raises(RecipeError, match="the against model is a T5ForConditionalGeneration"):
        evaluate(source, t5(), data=rows, tokens=100)


def test_a_whole_umt5_is_refused_where_transformers_lets_its_decoder_see_the_tokens_to_come(monkeypatch):
    whole = UMT5ForConditionalGeneration(UMT5Config(d_model=8, d_kv=2, num_heads=4, d_ff=8, num_layers=1, vocab_size=9))
    encoder = UMT5EncoderModel(whole.config)
    how = {"q_groups": 2, "kv_groups": 1, "method": "mean", "calibration": None}
    for release in ("5.18.0", "5.17.2"):
        monkeypatch.setattr("sqa_convert.families.umt5.version", lambda _, release=release: release)
        assert convert(encoder, **how).model.config.heads("encoder", 0) == (2, 1)
        if release == "5.18.0":
            assert convert(whole, **how).model.config.heads("decoder", 0) == (2, 1)
        else:
            with pytest.raises(UnsupportedModelError, match="decoder of transformers 5"):
                convert(whole, **how)


def test_a_umt5_encoder_is_fitted_with_a_table_in_each_layer(tmp_path):
    source = randomize(UMT5EncoderModel(t5(family="umt5").config), 0.2).eval()
    how = Calibration([{"input_ids": list(range(i, i + 20))} for i in range(1, 40)], tokens=400, refine_steps=2)
    conversion = convert(source, 6, 3, calibration=how, output=tmp_path / "out")
    assert conversion.report["architecture"] == "SQAT5EncoderModel"
    tables = [block.layer[0].SelfAttention.relative_attention_bias.weight for block in conversion.model.encoder.block]
    assert {tuple(table.shape) for table in tables} == {(32, 6)}
    same = convert(source, 12, 12, calibration=None).model
    ids = torch.randint(1, 60, (2, 70))
    assert torch.equal(same(ids)[0], source(ids)[0])
    loaded = AutoModelForTextEncoding.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(ids)[0], conversion.model(ids)[0])


def short(folder, **changes):
    """Recipe `encoder`, for a few steps on captions."""
    sizes = {"tokens": 1024, "sequence_length": 64, "batch_size": 4, "micro_batch": 2, "evaluations": 2}
    return load_recipe("encoder", data=str(folder / "captions.jsonl"), held_out_tokens=256, **sizes | changes)


def test_an_encoder_is_trained_towards_the_hidden_states_of_its_source(encoder, tmp_path):
    recipe = short(encoder, learning_rate=1e-3)
    convert(encoder / "source", 6, 3, method="mean", output=tmp_path / "out", calibration=None, verify=False)
    report = uptrain(tmp_path / "out", recipe, output=tmp_path / "trained")
    quality, curve = report["quality"], report["uptraining"]["curve"]
    assert quality["uptrained"]["error"] < 0.9 * quality["converted"]["error"]
    assert [point["tokens"] for point in curve] == [0, 512, 1024]
    assert curve[0]["error"] == pytest.approx(quality["converted"]["error"], rel=1e-3)
    assert min(point["error"] for point in curve) == pytest.approx(quality["uptrained"]["error"], rel=1e-3)
    assert "samples" not in report and report["uptraining"]["flops_per_token"] > 0
    card, page = ((tmp_path / "trained" / name).read_text() for name in ("README.md", "report.html"))
    for text in (card, page):
        assert "took back" in text and "of the error of the hidden state" in text
    again = evaluate(tmp_path / "trained", encoder / "source", data=recipe.data, tokens=256)
    assert again["model"]["error"] == pytest.approx(quality["uptrained"]["error"], rel=1e-3)


def test_what_training_made_worse_is_not_taken(encoder, tmp_path, called):
    with pytest.raises(QualityError, match=r"error of the hidden state .* at best; .* is as it was"):
        uptrain(encoder / "out", short(encoder, learning_rate=1e-3))
    with pytest.raises(QualityError, match=r"rate is too high: held-out error 0\.\d+% at the start, \d{2,}"):
        uptrain(encoder / "out", short(encoder, learning_rate=0.3, warmup=0), restart=True)
    given = ("--recipe", "encoder", "--data", encoder / "captions.jsonl", "--restart", "--dry-run")
    code, said, _ = called(uptrain_command.main, encoder / "out", *given)
    assert code == 0 and "loss: hidden" in said


def test_recipes_that_do_not_go_with_a_model_are_refused(encoder, tmp_path, called):
    captions = encoder / "captions.jsonl"
    for flags, wanted in (
        ((), "T5EncoderModel has no language model head to train: recipe encoder"),
        (("--recipe", "encoder", "--control"), "control: a source without"),
        (("--recipe", "encoder", "--data", "self"), "data: 'self' is for models that write"),
    ):
        code, _, err = called(uptrain_command.main, encoder / "out", *flags, "--restart")
        assert code == 2 and wanted in err and err.count("\n") == 1
    asked = ("--q-groups", 6, "--kv-groups", 3, "--output", tmp_path / "o", "--dry-run", "--uptrain")
    code, _, err = called(convert_command.main, "sample:t5", *asked, "encoder", "--data", captions)
    assert code == 2 and "for models without a language model head; a T5ForConditionalGeneration predicts tokens" in err
    code, _, err = called(convert_command.main, encoder / "source", *asked, "encoder", "--data", captions)
    assert code == 0, err
    with pytest.raises(RecipeError, match="source_column: what is answered is not trained on"):
        load_recipe("encoder", source_column="a", target_column="b")


@pytest.mark.parametrize("family", ["t5", "umt5", "gpt2"])
def test_texts_in_one_sequence_do_not_read_each_other(family):
    if family == "gpt2":
        model = randomize(GPT2Model(gpt2().config))
    else:
        model = randomize((T5EncoderModel if family == "t5" else UMT5EncoderModel)(t5(family=family).config))
    rows = [torch.randint(1, 60, (length,)) for length in (9, 14, 20)]
    for read in (model, convert(model, 6, 3, method="mean", calibration=None).model):
        batch = TextsCollator(25, 0, causal=family == "gpt2")([(0, rows[:2]), (1, rows[2:])])
        labels = batch.pop("labels")
        found = read(**batch, **({"use_cache": False} if family == "gpt2" else {})).last_hidden_state[labels >= 0]
        alone = torch.cat([read(row[None]).last_hidden_state[0] for row in rows])
        assert torch.equal(labels[labels >= 0], torch.cat(rows)) and len(found) == 43
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_a_gpt2_without_a_head_is_trained_from_token_rows(tmp_path):
    source = randomize(GPT2Model(gpt2().config), 0.2).eval()
    rows = [{"input_ids": [1 + (i * k) % 59 for k in range(1, 22)]} for i in range(1, 200)]
    conversion = convert(source, 6, 3, method="mean", calibration=None)
    before = evaluate(conversion, source, data=rows, tokens=200)["model"]["error"]
    how = {"tokens": 4096, "sequence_length": 64, "batch_size": 4, "micro_batch": 0, "evaluations": 1}
    conversion.uptrain(rows, "encoder", learning_rate=3e-3, held_out_tokens=200, **how)
    after = evaluate(conversion, source, data=rows, tokens=200)["model"]["error"]
    assert after < 0.9 * before
    assert conversion.report["quality"]["uptrained"]["error"] == pytest.approx(after, rel=1e-3)
    with pytest.raises(DataError, match="sequence_length 512 is more than"):
        conversion.uptrain(rows, "encoder", tokens=50_000)


LINES = {
    "captions": (["a cat " + "sits on a mat " * (i % 6) for i in range(40)], True),
    "proteins of one length": (["MKT" * 20] * 40, True),
    "paragraphs": (["It was a dark night, and the rain fell. " * 4] * 40, True),
    "prose in lines": (textwrap.wrap("It was a dark night, and the rain fell in torrents. " * 80, 72), False),
    "captions of one kind": ([f"def f_{i}(x): return x + {i}" for i in range(60)], True),
    "verses and blank lines": (["Tyger tyger", "burning bright", ""] * 20, False),
    "a few lines": (["a cat", "a dog and a cat on a mat"] * 5, False),
}


@pytest.mark.parametrize("kind", LINES)
def test_files_with_a_text_a_line_are_told_from_prose(kind):
    lines, told = LINES[kind]
    assert has_a_text_a_line("\n".join(lines) + "\n") is told


def test_each_line_of_a_file_of_captions_is_a_text(encoder, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"def f_{i}(x): return x + {i}\n" * (1 + (i == 3)) for i in range(60)))
    found = evaluate(encoder / "out", encoder / "source", data=str(file), tokens=1000)
    assert found["data"].endswith("captions.txt, a text a line, held-out part, 4 texts")
    how = Calibration(str(file), tokens=512, refine_steps=0)
    report = convert(encoder / "source", 8, 4, method="svd", calibration=how).report
    assert report["calibration"]["text"].endswith("captions.txt, a text a line, training part")
    for column, count in (("line", 57), ("text", 1)):  # by name, whatever the model is
        assert sum(1 for _ in documents(str(file), "train", column=column)) == count


def test_a_tokenizer_that_reads_residues_with_spaces_says_so(tmp_path):
    amino = "ACDEFGHIKLMNPQRSTVWY"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{letter}", -3.0) for letter in amino)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "source")
    config = T5Config(vocab_size=24, d_model=24, d_kv=4, num_heads=6, d_ff=16, num_layers=1)
    T5EncoderModel(config).save_pretrained(tmp_path / "source")
    proteins = [amino[i % 20 :] + amino[: 7 + i % 11] for i in range(60)]
    for name, between in (("plain", ""), ("spaced", " ")):
        (tmp_path / f"{name}.txt").write_text("\n".join(between.join(line) for line in proteins))
    how = {"method": "svd", "q_groups": 3, "kv_groups": 3}
    with pytest.raises(UnreadableTextError, match="reads them with a space between: M K T for MKT; put the spaces in"):
        convert(tmp_path / "source", **how, calibration=Calibration(str(tmp_path / "plain.txt"), tokens=512))
    spaced = Calibration(str(tmp_path / "spaced.txt"), tokens=512, refine_steps=0)
    report = convert(tmp_path / "source", **how, calibration=spaced).report["calibration"]
    assert report["warnings"] == [] or {w["rule"] for w in report["warnings"]} == {"few_tokens"}
