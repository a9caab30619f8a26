import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_convert.batches import SpanCorruption, token_blocks
from sqa_convert.checkpoint import SAMPLES
from sqa_convert.data import check_data, documents
from sqa_convert.errors import DataError
from sqa_convert.evaluation import load_tokenizer, prepare


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


def test_tokenizers_without_sentinels_are_refused():
    with pytest.raises(DataError, match="extra_id_0"):
        SpanCorruption.of(load_tokenizer(SAMPLES / "gpt2"))


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
