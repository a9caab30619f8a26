"""What is measured on text that a model was not made for looks perfect: it is noticed, and said with the way out."""

import json
import math
import random
import shutil

import pytest
import torch
from helpers import gpt2, t5
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

from sqa_convert import Calibration, convert, evaluate, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.convert import main as convert_command
from sqa_convert.errors import DataError, UnreadableTextError
from sqa_convert.evaluation.evaluate import compare
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_model
from sqa_convert.text.own_loss import own_loss
from sqa_convert.text.suitability import Fit, looked_at, misfits, unknown_share
from sqa_convert.text.tokenizers import load_tokenizer
from sqa_convert.uptraining.recipe import load_recipe

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
PYTHON = 'def f(x):\n    """Returns x."""\n    return [x for _ in range(3)]\n' * 40


def wrapped(model, **special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def protein_tokenizer():
    """A T5's, of one letter a residue."""
    names = ["<pad>", "</s>", "<unk>", *(f"▁{a}" for a in AMINO_ACIDS), *(f"<extra_id_{i}>" for i in range(30))]
    tokenizer = Tokenizer(Unigram([(name, -3.0) for name in names], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def protein(tmp_path):
    """A T5 whose tokenizer knows amino acids, and text that it reads."""
    folder = tmp_path / "protein"
    t5(n_positions=32, eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    protein_tokenizer().save_pretrained(folder)
    (tmp_path / "proteins.txt").write_text(" ".join(random.Random(0).choices(AMINO_ACIDS, k=9000)))
    (tmp_path / "code.txt").write_text(PYTHON)
    return folder


@pytest.fixture
def strange(tmp_path):
    """Text that no sample was made for."""
    path = tmp_path / "strange.txt"
    path.write_text("".join(chr(random.Random(i).randrange(0x4E00, 0x9000)) for i in range(6000)))
    return str(path)


def rules(warnings):
    return [warning["rule"] for warning in warnings]


@pytest.mark.parametrize(
    ("tokenizer", "share"),
    [
        (protein_tokenizer(), 1),
        (wrapped(BPE(vocab={a: i for i, a in enumerate(AMINO_ACIDS)}, merges=[])), 1),  # drops what it does not know
        (wrapped(BPE(vocab={"<e>": 0, "x": 1}, merges=[], unk_token="<e>"), unk_token="<e>", eos_token="<e>"), 1),
        (wrapped(WordLevel({"[UNK]": 0, "def": 1}, unk_token="[UNK]"), unk_token="[UNK]"), 1),
        (wrapped(BPE(vocab={c: i for i, c in enumerate(sorted(set(PYTHON)))}, merges=[])), 0),
        (load_tokenizer(SAMPLES / "gpt2"), 0),
        (load_tokenizer(SAMPLES / "t5"), 0),
    ],
    ids=["unigram", "dropped", "unknown-is-the-end", "words", "characters", "sample:gpt2", "sample:t5"],
)  # fmt: skip
def test_characters_that_become_no_token_of_their_own_are_unknown(tokenizer, share):
    assert unknown_share([PYTHON], tokenizer) == pytest.approx(share, abs=0.1)


def test_a_tokenizer_without_offsets_is_held_to_its_unknown_tokens():
    class Slow:
        is_fast, unk_token_id = False, 0

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) if c < "x" else 0 for c in text]}

    assert unknown_share(["abcx"], Slow()) == 0.25


def test_looking_at_a_text_takes_nothing_of_it_away():
    pairs = [("a b", "c"), ("d", "e f")]
    again, unknown = looked_at(iter(pairs), load_tokenizer(SAMPLES / "gpt2"), "the text", "--data")
    assert (list(again), unknown) == (pairs, 0)


@pytest.mark.parametrize(
    ("fit", "converted", "found"),
    [
        (Fit(2.7, 2048, 3.0), {"mean": 4.0, "converted": 2.9}, []),
        (Fit(2.7, 2048, 3.0), {"mean": 2.69}, []),
        (Fit(3.9, 2048, 3.0, counted=5.6), {}, []),
        (Fit(6.1, 2048, 5.6, counted=4.2), {}, ["counting"]),  # an encoder-decoder, unsure of its answers too
        (Fit(9.22, 4096, 4.5), {"converted": 9.2185}, ["guessing", "own_text"]),
        (Fit(9.22, 4096, None), {}, ["guessing"]),
        (Fit(3.91, 34, 2.3), {"mean": 3.8}, ["guessing", "own_text", "source_beaten"]),
        (Fit(3.2, 34, 2.3), {}, ["own_text"]),  # of few tokens a nat is much
        (Fit(4.5, 2048, 3.0), {}, ["own_text"]),
        (Fit(2.7, 2048, 3.0, unknown=0.2), {}, ["unknown"]),
        (Fit(None, 2048, None, unknown=0.2), {}, ["unknown"]),
        (Fit(8.0, 2048, 7.7), {}, ["guessing"]),  # it has learnt nothing
        (Fit(4.3, 2048, 3.0, predictions=63), {"converted": 4.2}, []),  # by chance
        (Fit(5.0, 2048, 3.0, predictions=63), {"converted": 4.8}, ["own_text", "source_beaten"]),
    ],
)  # fmt: skip
def test_what_makes_a_measurement_doubtful(fit, converted, found):
    warnings = misfits(fit, "--data", converted)
    assert rules(warnings) == found
    assert all(warning["text"].endswith("--data") and "\n" not in warning["text"] for warning in warnings)
    json.dumps(warnings, allow_nan=False)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_the_samples_fit_the_built_in_text(name, tokens):
    found = evaluate(f"sample:{name}", tokens=tokens)
    assert found["warnings"] == []


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_text_of_another_kind_is_warned_about(name, strange):
    found = evaluate(f"sample:{name}", data=strange, tokens=8192)
    assert "counting" in rules(found["warnings"]) and "built_in_text" not in rules(found["warnings"])
    assert all(warning["value"] > warning["bound"] for warning in found["warnings"])


def test_the_built_in_text_is_named_where_it_does_not_fit(tmp_path):
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].roll(700, 0)  # as if made for other words
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    found = evaluate(tmp_path / "other", tokens=512)
    assert found["data"] == "sampled from the source" and rules(found["warnings"]) == ["built_in_text"]
    found = evaluate(tmp_path / "other", tokens=512, data="stdlib")["warnings"]
    assert rules(found) == ["guessing", "own_text"]
    assert found[0]["bound"] == pytest.approx(math.log(2048), abs=1e-6)


def test_a_conversion_better_than_its_source_is_doubted():
    held_out = prepare(SAMPLES / "gpt2", tokens=256)
    damaged = load_model(SAMPLES / "gpt2")
    with torch.no_grad():
        damaged.transformer.h[1].attn.c_attn.weight.mul_(3)
    models = {"source": damaged, "converted": SAMPLES / "gpt2"}
    assert "source_beaten" in rules(compare(models, held_out, untrained={"converted"})["warnings"])
    assert "source_beaten" not in rules(compare(models, held_out)["warnings"])


def test_warnings_stand_above_the_table_in_the_report_and_on_the_card(tmp_path, monkeypatch, capsys, strange):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    flags = ["--q-groups", "8", "--kv-groups", "4", "--method", "mean", "--data", strange, "--no-verify", "-o", "out"]
    monkeypatch.setattr("sys.argv", ["sqa-convert", "sample:gpt2", *flags])
    with pytest.raises(SystemExit) as stop:
        convert_command()
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    warning = report["quality"]["warnings"][0]
    assert stop.value.code == 0 and set(warning) == {"rule", "value", "bound", "text"}
    assert 0 <= out.index(f"warning: {warning['text']}") < out.index("KL to source")
    assert warning["text"] in (tmp_path / "out/README.md").read_text()
    assert "far worse than what it writes itself" in (tmp_path / "out/report.html").read_text()


def test_text_that_cannot_be_read_is_not_measured_on(protein, tmp_path):
    few = {"calibration": Calibration(tokens=64, refit=True, refine_steps=0), "evaluate": True, "verify": False}
    report = convert(protein, 6, 2, "mean", tmp_path / "out", **few).report
    warning = report["quality"]["warnings"][0]
    assert report["quality"]["data"] == "answered by the source itself" and warning["rule"] == "built_in_text"
    assert "unknown to the model's tokenizer" in warning["text"]
    assert report["calibration"]["text"] == "random tokens and the model's answers"
    assert warning["text"] in (tmp_path / "out/README.md").read_text()
    for where in ({"data": str(tmp_path / "code.txt")}, {"calibration": str(tmp_path / "code.txt")}):
        with pytest.raises(UnreadableTextError, match="100% of its characters"):
            convert(protein, 6, 2, output=tmp_path / "refused", **few | where)
        assert not (tmp_path / "refused").exists()
    found = evaluate(protein, tmp_path / "out", data=str(tmp_path / "proteins.txt"), tokens=128)
    assert "unknown" not in rules(found["warnings"])


def test_nothing_is_trained_or_measured_on_text_that_cannot_be_read(protein, tmp_path):
    convert(protein, 6, 2, "mean", tmp_path / "out")
    recipe = load_recipe("quick", tokens=2048)
    for data in ("stdlib", str(tmp_path / "code.txt")):
        with pytest.raises(DataError, match=r"unknown to the model's tokenizer.*with data$"):
            uptrain(tmp_path / "out", recipe, data=data)
        with pytest.raises(DataError, match=r"unknown to the model's tokenizer.*with data$"):
            evaluate(tmp_path / "out", data=data)


def test_calibration_on_text_of_another_kind_is_warned_about(strange):
    few = Calibration(strange, tokens=1024, refit=True, refine_steps=0)
    found = convert(SAMPLES / "gpt2", 6, 2, "mean", calibration=few).report["calibration"]["warnings"]
    assert "own_text" in rules(found) and all("--calibration" in warning["text"] for warning in found)


def test_what_a_model_writes_itself_tells_how_it_ought_to_predict():
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    batch = {"input_ids": torch.randint(2, 61, (2, 32)), "labels": torch.randint(2, 61, (2, 9))}
    for model in (gpt2(), t5()):
        for parameter in model.get_output_embeddings().parameters():
            parameter.data.zero_()
        assert own_loss(model, batch, cpu, generator) == pytest.approx(math.log(61), abs=1e-4)
    model = gpt2()
    model.forward = lambda *args, **kwargs: 1 / 0
    assert own_loss(model, batch, cpu, generator) is None
