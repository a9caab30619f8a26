import json
import string
from itertools import pairwise

import pytest
import torch
from helpers import t5
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from sqa_convert.calibration.text import calibration_text
from sqa_convert.checkpoints.find import SAMPLES, open_source
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Calibration, Request
from sqa_convert.errors import DataError
from sqa_convert.evaluation.evaluate import evaluate
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_model
from sqa_convert.text.blocks import token_blocks
from sqa_convert.text.documents import check_data, documents
from sqa_convert.text.spans import SpanCorruption, denoising
from sqa_convert.text.tokenizers import load_tokenizer
from sqa_convert.uptraining.data import training_data
from sqa_convert.uptraining.recipe import Recipe


class Characters:
    """A tokenizer of single characters; 0 ends a document."""

    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text]}


def test_built_in_corpus_splits_by_file_and_covers_everything():
    train, held_out = (list(documents(None, split)) for split in ("train", "heldout"))
    assert len(train) > 5 * len(held_out) > 0
    assert not set(train) & set(held_out)
    import json.decoder as module
    from pathlib import Path

    assert Path(module.__file__).read_text() in train + held_out


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "folder", "glob"])
def test_files_of_every_kind_split_without_overlap(kind, tmp_path):
    texts = [f"document {i}\n" for i in range(60)]
    if kind == "jsonl":
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif kind == "parquet":
        from datasets import Dataset

        data = tmp_path / "data.parquet"
        Dataset.from_dict({"text": texts}).to_parquet(str(data))
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i:02}.txt").write_text(text)
        data = {"folder": tmp_path, "glob": tmp_path / "*.txt", "text": tmp_path / "0*.txt"}[kind]
        texts = texts[:10] if kind == "text" else texts
    train, held_out = (list(documents(str(data), split)) for split in ("train", "heldout"))
    assert held_out
    assert not set(train) & set(held_out)
    if kind == "text":  # fewer than 20 documents: the tail of each
        assert sorted("".join(pair) for pair in zip(train, held_out, strict=True)) == texts
    else:
        assert sorted(train + held_out) == sorted(texts)


def test_one_long_text_holds_out_its_tail_at_a_line_break(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    train, held_out = ("".join(documents(str(tmp_path / "a.txt"), split)) for split in ("train", "heldout"))
    assert train + held_out == text
    assert held_out.startswith("line ")
    assert 0.08 < len(held_out) / len(text) < 0.12


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "no text"), ('{"content": "x"}\n', 'no column "text"'), ("{broken", "cannot be read")],
)
def test_bad_files_are_named(content, says, tmp_path):
    path = tmp_path / ("a.jsonl" if content else "a.txt")
    path.write_text(content)
    with pytest.raises(DataError, match=says):
        check_data(str(path))


def test_files_of_two_kinds_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(DataError, match="several kinds"):
        check_data(str(tmp_path))


def test_blocks_hold_the_documents_in_order_each_closed_by_the_end_token():
    blocks = token_blocks(["abc", "de"], Characters(), 3)
    assert blocks.tolist() == [[97, 98, 99], [0, 100, 101]]
    assert token_blocks(["abcdefgh"] * 9, Characters(), 4, max_tokens=11).shape == (2, 4)
    with pytest.raises(DataError, match="less than one block of 4 tokens"):
        token_blocks(["ab"], Characters(), 4)


def rows(*texts, lines=1):
    return ["".join(f"{c * 9}\n" for _ in range(lines)) for c in texts]


def test_drawn_blocks_are_of_as_many_documents_as_there_are():
    drawn = token_blocks(iter(rows(*"abcdefgh", lines=50)), Characters(), 40, 5 * 40, drawn=True)
    assert [chr(max(block)) for block in drawn.tolist()] == list("abcde")
    packed = token_blocks(rows(*"abcdefgh", lines=50), Characters(), 40, 5 * 40)
    assert {chr(max(block)) for block in packed.tolist()} == {"a"}


def test_drawing_goes_on_in_the_documents_it_began_when_there_are_no_others():
    drawn = token_blocks(rows("a", "b", lines=20), Characters(), 40, drawn=True)
    assert len(drawn) == 400 // 40 and [chr(max(block)) for block in drawn[:4].tolist()] == list("abab")
    assert sorted(drawn.flatten().tolist())[-380:] == sorted(ord(c) for c in "".join(rows("a", "b", lines=20)))[20:]


def test_a_document_is_drawn_from_a_line_within_it_always_the_same():
    text = "".join(f"{chr(200 + i)}23456789\n" for i in range(100))
    drawn = [token_blocks([text] * 20, Characters(), 30, 600, drawn=True).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]
    starts = [block[0] for block in drawn[0]]
    assert all(start >= 200 for start in starts) and len(set(starts)) > 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab\n", min_size=1, max_size=40), min_size=1, max_size=30), st.integers(2, 12))
def test_between_two_documents_of_a_block_is_always_an_end(texts, length):
    texts = [text.replace("a", chr(100 + i)).replace("b", chr(100 + i)) for i, text in enumerate(texts)]
    try:
        blocks = token_blocks(texts, Characters(), length, drawn=True).tolist()
    except DataError:
        return
    for block in blocks:
        plain = [token for token in block if token != 10]
        assert all(0 in pair or pair[0] == pair[1] for pair in pairwise(plain))


@pytest.mark.parametrize("drawn", [True, False])
def test_text_is_encoded_as_far_as_tokens_are_wanted(drawn):
    given = []

    class Counting(Characters):
        def __call__(self, text, **options):
            given.append(len(text))
            return super().__call__(text)

    token_blocks(["a line of text\n" * 100_000] * 9, Counting(), 128, 4 * 128, drawn=drawn)
    assert sum(given) < 200_000


def test_the_order_of_the_built_in_corpus_depends_on_its_names_alone(tmp_path, monkeypatch):
    for root, others in (("a", []), ("b", [f"site-packages/x{i}.py" for i in range(30)] + ["test/y.py", "notes.txt"])):
        for name in [*others, *(f"{c}/{c}{i}.py" for c in "mnop" for i in range(20))]:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    orders = []
    for root in ("a", "b"):
        monkeypatch.setattr("sysconfig.get_path", lambda _, root=root: str(tmp_path / root))
        orders.append([list(documents(None, split, shuffled=True)) for split in ("train", "heldout")])
    assert orders[0] == orders[1] and sum(map(len, orders[0])) == 80
    assert orders[0][0] != sorted(orders[0][0])


def test_held_out_text_is_drawn_across_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {i}\n" * 900}) + "\n" for i in range(400)))
    held_out = prepare(SAMPLES / "gpt2", str(tmp_path / "a.jsonl"), tokens=16 * 256)
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    texts = [tokenizer.decode(row) for batch in held_out.batches for row in batch["input_ids"]]
    assert len({text.split()[1] for text in texts}) == 16


def test_short_documents_are_measured_each_alone_however_few_there_are(tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model, tokenizer = load_model(SAMPLES / "gpt2", dtype="float32"), load_tokenizer(SAMPLES / "gpt2")
    held_out = list(documents(str(tmp_path / "a.jsonl"), "heldout"))
    rows = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in held_out]
    losses = [model(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    measured = evaluate(SAMPLES / "gpt2", data=str(tmp_path / "a.jsonl"), device="cpu")
    assert len(rows) > 1 and measured["tokens"] == sum(len(row) - 1 for row in rows) < 256
    assert measured["model"]["loss"] == pytest.approx(sum(losses) / measured["tokens"], rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_skipped_rows_are_told_with_the_name_of_the_text(name, tmp_path):
    content = [None] * 7 + ["a line of text\n" * 90] * 60
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in content))
    held_out = prepare(SAMPLES / name, str(tmp_path / "a.jsonl"), text_column="content", tokens=512)
    assert held_out.name.startswith(f"{tmp_path}/a.jsonl, held-out part, 7 rows without text skipped")
    measured = evaluate(SAMPLES / name, data=str(tmp_path / "a.jsonl"), text_column="content", tokens=512)
    assert measured["data"] == held_out.name


def test_a_column_of_the_built_in_corpus_is_refused():
    with pytest.raises(DataError, match="stdlib has no column content: text_column is for tables"):
        prepare(SAMPLES / "gpt2", text_column="content")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(8, 300), st.integers(0, 10))
def test_span_corruption_is_the_definition(batch, length, seed):
    """Noise density 0.15, mean span 3, sentinels in order, and inputs and labels together give the text back."""
    sentinels = tuple(range(1000, 1100))
    tokens = torch.randint(2, 999, (batch, length))
    inputs, labels = SpanCorruption(sentinels, eos=1)(tokens, torch.Generator().manual_seed(seed))
    noise = max(1, round(0.15 * length))
    spans = max(1, round(noise / 3))
    assert inputs.shape == (batch, length - noise + spans + 1)
    assert labels.shape == (batch, noise + spans + 1)
    for row in range(batch):
        assert inputs[row, -1] == labels[row, -1] == 1
        assert [t for t in inputs[row].tolist() if t >= 1000] == list(sentinels[:spans])
        pieces, current = {}, None
        for token in labels[row, :-1].tolist():
            if token >= 1000:
                current = pieces.setdefault(token, [])
            else:
                current.append(token)
        assert all(pieces.values())  # no span is empty
        rebuilt = []
        for token in inputs[row, :-1].tolist():
            rebuilt += pieces[token] if token >= 1000 else [token]
        assert rebuilt == tokens[row].tolist()


def test_span_corruption_draws_other_spans_for_each_row_and_seed():
    corrupt = SpanCorruption(tuple(range(1000, 1100)), eos=1)
    tokens = torch.arange(2, 202).expand(4, -1)
    first = corrupt(tokens, torch.Generator().manual_seed(0))[0]
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert torch.equal(first, corrupt(tokens, torch.Generator().manual_seed(0))[0])
    assert not torch.equal(first, corrupt(tokens, torch.Generator().manual_seed(1))[0])


class Words:
    """A tokenizer of a list of words."""

    def __init__(self, *words, **special):
        self.words = {word: i for i, word in enumerate(words)}
        self.eos_token_id, self.sep_token_id = special.get("eos"), special.get("sep")

    def get_vocab(self):
        return self.words


@pytest.mark.parametrize("form", ["<extra_id_{}>", "▁<extra_id_{}>", "extra{}", "[extra_id_{}]", "<extra_token_{}>"])
def test_sentinels_are_found_as_a_tokenizer_writes_them(form):
    words = [form.format(i) for i in range(12)]
    tokenizer = Words("a", *reversed(words), "b", eos=13)
    assert SpanCorruption.of(tokenizer).sentinels == tuple(tokenizer.words[word] for word in words)
    assert SpanCorruption.of(tokenizer).eos == 13
    # those that the model does not know are not used
    assert len(SpanCorruption.of(Words(*words), 5).sentinels) == 5


def test_the_sentinels_of_bytes_are_the_last_of_them():
    corrupt = SpanCorruption.of(ByT5Tokenizer(), 384)
    assert corrupt.sentinels[:3] == (258, 257, 256) and len(corrupt.sentinels) == 100
    inputs, labels = corrupt(torch.full((2, 200), 100), torch.Generator().manual_seed(0))
    assert labels.max() == 258 and (inputs >= 257).any() and labels.shape[1] == 30 + 2 + 1  # spans of 20 bytes or less


def test_a_separator_closes_texts_where_there_is_no_end_token_and_else_nothing_does():
    tokens = torch.arange(10, 50)[None]
    closed, bare = (SpanCorruption.of(Words("extra0", **end))(tokens) for end in ({"sep": 7}, {}))
    assert closed[0][0, -1] == closed[1][0, -1] == 7
    assert [t.shape[1] + 1 for t in bare] == [t.shape[1] for t in closed]


@pytest.mark.parametrize("tokenizer", [Words("a", "extra", "extra1", eos=0), Words("<extra_id_1>")])
def test_a_t5_without_sentinels_is_asked_for_second_halves(tokenizer):
    with pytest.raises(DataError, match="extra_id_0"):
        SpanCorruption.of(tokenizer)
    inputs, labels = denoising(tokenizer, 100)(torch.arange(22).view(2, 11))
    assert torch.equal(torch.cat([inputs, labels], 1), torch.arange(22).view(2, 11)) and inputs.shape == (2, 5)


def test_a_t5_with_the_tokenizer_of_bert_is_measured_calibrated_and_has_training_data(tmp_path):
    letters = [*string.printable.split(" ")[0].lower(), *(f"##{c}" for c in string.printable.lower() if c.strip())]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    model = t5(layers=2, heads=2, n_positions=32, vocab_size=200)
    model.save_pretrained(tmp_path)
    held_out = prepare(tmp_path, "stdlib", tokens=256)
    assert held_out.name.endswith("second halves from the first, for want of sentinels")
    assert held_out.batches[0]["labels"].shape == (8, 16)
    assert torch.isfinite(model(**held_out.batches[0]).loss)
    recipe = Recipe(data="stdlib", tokens=256, sequence_length=32, batch_size=4)
    assert training_data(tmp_path, recipe).example()["input_ids"].shape == (1, 16)
    source = open_source(str(tmp_path))
    plan = make_plan(source, Request(1, 1, calibration=Calibration("stdlib", tokens=256)))
    text = calibration_text(model, plan, source, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert text.name == "stdlib, training part, and the model's answers" and text.batches[0]["labels"].shape[0] > 1


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    config = json.loads((SAMPLES / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(DataError, match="the model knows 100 tokens"):
        prepare(tmp_path, tokens=2048)


@pytest.mark.parametrize("data", [None, "rows.jsonl"])
def test_shuffled_documents_are_the_same_ones_in_another_order_always_the_same(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1500)))
    plain = list(documents(data, "train"))
    shuffled = [list(documents(data, "train", shuffled=True)) for _ in range(2)]
    assert shuffled[0] == shuffled[1] != plain
    assert sorted(shuffled[0]) == sorted(plain)


def test_training_text_is_of_many_documents_and_of_all_where_those_are_few(tmp_path):
    for name in "xyz":
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n" * 400)
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    how = {"data": str(tmp_path / "*.py"), "sequence_length": 32, "batch_size": 1}
    few = training_data(SAMPLES / "gpt2", Recipe(tokens=96, **how)).content
    assert {tokenizer.decode(row).strip()[0] for row in few} == set("xyz")
    everything = training_data(SAMPLES / "gpt2", Recipe(tokens=1_000_000, **how)).content
    texts = tokenizer.decode(everything.flatten())
    assert all(texts.count(f"{name} = 1") > 300 for name in "xyz")
