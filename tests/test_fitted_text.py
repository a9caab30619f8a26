"""Which text heads are fitted to: the user's, beginnings, pairs, the model's own; and what is said of it."""

import json

import pytest
import torch
from helpers import gpt2
from safetensors.torch import load_file, save_file

from sqa_convert import Calibration, convert
from sqa_convert.calibration.load_source import load_source
from sqa_convert.calibration.text import calibration_text
from sqa_convert.checkpoints.find import SAMPLES, open_source
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import DataError, RecipeError
from sqa_convert.text.documents import Columns
from sqa_convert.text.suitability import fitted_elsewhere
from sqa_convert.text.tokenize_documents import Encoder, control_tokens
from sqa_convert.text.tokenized_rows import document_rows, up_to
from sqa_convert.text.tokenizers import load_tokenizer
from sqa_convert.uptraining import self_generated_rows
from sqa_convert.uptraining.data import with_text_named
from sqa_convert.uptraining.recipe import Recipe
from sqa_convert.uptraining.run_folder import Run

CPU = torch.device("cpu")


class Framed:
    """Characters, each text between 1 and 2."""

    eos_token_id, sep_token_id = 2, None

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def text_of(name, **asked):
    source = open_source(f"sample:{name}")
    plan = make_plan(source, Request(8, 4, calibration=Calibration(**{"tokens": 1024} | asked)))
    return calibration_text(load_source(plan, source), plan, source, CPU, torch.Generator().manual_seed(0))


def rows_of(text):
    for batch in text.batches + text.held_out:
        yield from zip(batch["input_ids"], batch["labels"], strict=True)


def test_a_document_is_encoded_as_its_tokenizer_does_and_closed_once():
    encoder = Encoder(Framed())
    assert list(encoder.stream("ab")) == [1, 97, 98, 2]
    assert list(encoder.stream("\1ab\2")) == [1, 97, 98, 2]  # it has them already
    assert list(encoder.stream("b", whole=False)) == [98, 2] and encoder.beginning("ab") == [1, 97, 98]
    assert encoder.whole("ab", 4) == [1, 97, 98, 2] and encoder.whole("ab", 3) is None


@pytest.mark.parametrize(("name", "ends"), [("gpt2", [0]), ("t5", [1])])
def test_the_samples_documents_end_with_their_end_token(name, ends):
    assert list(Encoder(load_tokenizer(SAMPLES / name)).stream("x = 1"))[-1:] == ends


def test_short_documents_are_whole_rows_and_long_ones_give_one_each_at_a_time():
    texts = ["ab", "cd", *("line\n" * 40 for _ in range(6))]
    rows = up_to(document_rows(texts, Framed(), 32), 400, len)
    assert rows[0].tolist() == [1, 97, 98, 2] and rows[1].tolist() == [1, 99, 100, 2]
    assert {len(row) for row in rows[2:8]} <= {8, 16, 32} and len(rows) > 8


def test_control_tokens_are_special_tokens_that_texts_may_begin_with():
    assert control_tokens(load_tokenizer(SAMPLES / "gpt2"), 2048) == []
    sentinels = control_tokens(load_tokenizer(SAMPLES / "t5"), 2048)
    assert len(sentinels) == 100 and control_tokens(load_tokenizer(SAMPLES / "t5"), 2000) == sentinels[:52]


def test_own_texts_go_on_from_the_beginnings_in_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("import os\n\ndef f(x):\n")
    text = text_of("gpt2", prompts=str(tmp_path / "prompts.txt"))
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    begun = [tokenizer.decode(row).startswith(("import os", "def f(x):")) for row, _ in rows_of(text)]
    assert sum(begun) >= 2 and text.name.endswith("prompts.txt")  # others are what comes later in a text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": "none.txt"}, "cannot be read"),
        ({"prompts": "empty.txt"}, "holds no text"),
        ({"prompts": "lines.txt", "text": "lines.txt"}, r"leave out calibration$"),
        ({"length": 4}, "give 8 or more"),
        ({"text": "lines.txt", "source_column": "a"}, r"needs Calibration\(target_column=…\)"),
        ({"text": "lines.txt", "source_column": "a", "target_column": "b"}, "for encoder-decoder models"),
    ],
)
def test_what_cannot_be_fitted_to_is_refused_first(asked, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "lines.txt").write_text("a\n" * 40)
    with pytest.raises((DataError, RecipeError), match=message):
        convert("sample:gpt2", 8, 4, calibration=Calibration(**asked))


def test_heads_are_fitted_to_the_training_part_of_the_data(tmp_path):
    (tmp_path / "own.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(600)))
    few = {"method": "svd", "data": tmp_path / "own.txt", "calibration": Calibration(tokens=512, refine_steps=0)}
    assert (
        convert("sample:gpt2", 8, 4, allocation="uniform", **few).report["calibration"]["text"]
        == f"{tmp_path}/own.txt, training part"
    )
    few["calibration"] = Calibration("self", tokens=512, refine_steps=0)
    assert (
        convert("sample:gpt2", 8, 4, allocation="uniform", **few).report["calibration"]["text"]
        == "sampled from the model"
    )


def test_a_t5_is_fitted_to_pairs(tmp_path):
    pairs = [{"q": f"add {i} and {i}", "a": f"{2 * i}"} for i in range(90)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = text_of("t5", text=str(tmp_path / "pairs.jsonl"), source_column="q", target_column="a", prefix="now: ")
    tokenizer = load_tokenizer(SAMPLES / "t5")
    asked = {tokenizer.decode(row, skip_special_tokens=True).split()[0] for row, _ in rows_of(text)}
    assert asked == {"now:"} and text.name.endswith("85 pairs") and text.answered < text.tokens
    assert Columns.named("", "", "") is None


def test_a_length_bounds_every_row():
    assert max(batch["input_ids"].shape[1] for batch in text_of("gpt2", length=40).batches) == 40


@pytest.mark.parametrize(
    ("kl", "fitted", "warned"), [(0.2, 0.05, True), (0.14, 0.05, False), (0.009, 0.001, False), (0.011, 0.001, True)]
)
def test_heads_fitted_to_other_text_are_warned_about(kl, fitted, warned):
    warnings = fitted_elsewhere(kl, fitted)
    assert bool(warnings) == warned and all("--calibration" in w["text"] for w in warnings)


@pytest.mark.integration
@pytest.mark.parametrize(("text", "warned"), [("digits.txt", True), ("stdlib", False)])
def test_a_conversion_fitted_to_other_text_says_so_where_it_is_measured(text, warned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.txt").write_text("0 1 2 3 4 5 6 7 8 9\n" * 4000)
    fitted = Calibration(text, tokens=4096, refit=True, refine_steps=0)
    report = convert("sample:gpt2", 6, 2, "svd", "out", calibration=fitted, evaluate=True, verify=False).report
    assert ("fitted_elsewhere" in [w["rule"] for w in report["quality"]["warnings"]]) == warned


def test_a_model_that_no_text_fits_is_trained_on_its_own(tmp_path):
    assert with_text_named(Recipe(), SAMPLES / "gpt2", False).data == "stdlib"
    for file in (SAMPLES / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].roll(700, 0)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert with_text_named(Recipe(), tmp_path, False).data == "self"
    assert with_text_named(Recipe(data="x.txt"), tmp_path, False).data == "x.txt"


def test_own_text_is_kept_and_what_is_missing_is_written_again_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(self_generated_rows, "PART", 512)
    gpt2(layers=1).save_pretrained(tmp_path / "source")
    recipe = Recipe(tokens=1024, sequence_length=32, batch_size=4, data="self")
    run = Run(tmp_path / "model", tmp_path / "source", tmp_path / "model", recipe, False)
    stages = []
    arguments = (load_tokenizer(SAMPLES / "gpt2"), CPU, lambda *stage: stages.append(stage))
    self_generated_rows.write_own_text(run, *arguments)
    blocks = self_generated_rows.read_own_text(run, pairs=False)
    assert all(sum(map(len, block)) <= 32 for block in blocks) and sum(len(r) for b in blocks for r in b) >= 1024
    first, second = self_generated_rows._parts(run)
    assert first.read_bytes() != second.read_bytes()
    content, stamp = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    self_generated_rows.write_own_text(run, *arguments)
    assert second.read_bytes() == content and first.stat().st_mtime_ns == stamp
    stages.clear()
    self_generated_rows.write_own_text(run, *arguments)
    assert stages == []
