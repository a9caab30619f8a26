"""The same text or tokens, however they are given: by name or as an object, to calibrate, measure and train."""

import json

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import VOCABULARY, gpt2, t5
from pyarrow import parquet

import sqa_convert
from sqa_convert import Calibration, Recipe, evaluate, uptrain
from sqa_convert.cli.evaluate import main as eval_main
from sqa_convert.errors import DataError, RecipeError
from sqa_convert.text.documents import documents
from sqa_convert.text.python_data import repeatable

ROWS, LENGTH = 60, 24
FEW = Recipe(data="given", tokens=8 * 64, sequence_length=16, batch_size=4, evaluations=1, held_out_tokens=64)


def drawn_tokens(*shape):
    return np.random.default_rng(0).integers(2, VOCABULARY, shape)


def as_parquet(path, **columns):
    parquet.write_table(pyarrow.table({name: [list(row) for row in rows] for name, rows in columns.items()}), path)
    return str(path)


def as_lines(path, **columns):
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_npy(path, ids):
    np.save(path, ids)
    return str(path)


def padded(ids):
    """Rows as a batch of a DataLoader has them: padded on both sides, the padding masked."""
    mask = torch.nn.functional.pad(torch.ones(ids.shape, dtype=torch.long), (3, 2))
    return {"input_ids": torch.nn.functional.pad(torch.tensor(ids), (3, 2), value=1), "attention_mask": mask}


def loader(rows):
    return torch.utils.data.DataLoader([{"input_ids": torch.tensor(row)} for row in rows], batch_size=7)


TOKEN_ROWS = {
    "array": lambda ids, folder: ids.astype(np.uint16),
    "tensor": lambda ids, folder: torch.tensor(ids),
    "lists": lambda ids, folder: ids.tolist(),
    "iterator": lambda ids, folder: iter(ids.tolist()),
    "rows": lambda ids, folder: [{"input_ids": row} for row in ids.tolist()],
    "Dataset": lambda ids, folder: Dataset.from_dict({"input_ids": ids.tolist()}),
    "IterableDataset": lambda ids, folder: Dataset.from_dict({"input_ids": ids.tolist()}).to_iterable_dataset(),
    "Dataset of tensors": lambda ids, folder: Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"),
    "DataLoader": lambda ids, folder: loader(ids),
    "DataLoader of tensors": lambda ids, folder: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(ids)), batch_size=7
    ),
    "padded batches": lambda ids, folder: [padded(ids[:40]), padded(ids[40:])],
    "one batch": lambda ids, folder: padded(ids),
    "Parquet": lambda ids, folder: as_parquet(folder / "rows.parquet", input_ids=ids.tolist()),
    "JSON lines": lambda ids, folder: as_lines(folder / "rows.jsonl", input_ids=ids.tolist()),
    "npy": lambda ids, folder: as_npy(folder / "rows.npy", ids),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 without a tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "gpt2"
    gpt2(heads=4, n_positions=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(folder):
    return sqa_convert.convert(folder, 2, 1, output=folder.parent / "converted", calibration=None, verify=False).output


@pytest.fixture(scope="module")
def expected(folder):
    return evaluate(folder, data=drawn_tokens(ROWS, LENGTH))


@pytest.mark.parametrize("kind", TOKEN_ROWS)
def test_token_rows_give_the_same_numbers_however_they_are_given(kind, folder, converted, expected, tmp_path):
    ids = drawn_tokens(ROWS, LENGTH)
    found = evaluate(folder, data=TOKEN_ROWS[kind](ids, tmp_path))
    assert found["model"] == expected["model"] and found["tokens"] == expected["tokens"] == 3 * (LENGTH - 1)


def test_a_mask_may_be_of_any_type(folder, expected):
    ids = drawn_tokens(ROWS, LENGTH)
    for dtype in (torch.bool, torch.float32):
        batch = padded(ids)
        assert (
            evaluate(folder, data=batch | {"attention_mask": batch["attention_mask"].to(dtype)})["model"]
            == expected["model"]
        )
    with pytest.raises(DataError, match="attention_mask of shape"):
        evaluate(folder, data=[{"input_ids": [5, 6, 7], "attention_mask": [1, 1]}] * 40)


def test_a_loader_that_shuffles_holds_out_what_it_does_not_train_on():
    rows = [{"input_ids": torch.tensor([i, i])} for i in range(100)]
    data = repeatable(torch.utils.data.DataLoader(rows, batch_size=7, shuffle=True))
    split = {name: {int(ids[0]) for ids in documents(data, name)} for name in ("train", "heldout")}
    assert split["train"] | split["heldout"] == set(range(100)) and not split["train"] & split["heldout"]
    parts = repeatable({"train": iter(rows[:50]), "validation": iter(rows[50:])})
    assert [len(list(documents(parts, name))) for name in ("train", "train", "heldout")] == [50, 50, 50]


def test_batches_may_hold_more_than_tokens(folder, expected):
    batch = padded(drawn_tokens(ROWS, LENGTH))
    more = batch | {"task": "lm", "number": torch.tensor(3), "id": [str(i) for i in range(ROWS)]}
    assert evaluate(folder, data=[more])["model"] == expected["model"]


def test_rows_are_measured_as_they_are(folder, expected):
    """What a user would compute: the mean cross-entropy of the held-out rows, one in 20."""
    model = sqa_convert.evaluation.load.load_model(folder)
    ids = torch.tensor(drawn_tokens(ROWS, LENGTH))[::20]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert expected["model"]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["DataLoader", "Parquet"])
def test_token_rows_calibrate_and_train_the_same(kind, folder, converted, tmp_path):
    ids = drawn_tokens(ROWS, LENGTH)

    def weights(data):
        how = Calibration(data, tokens=600, refine_steps=2)
        model = sqa_convert.convert(folder, 2, 1, "svd", calibration=how).model
        return model.state_dict()

    def curve(data, name):
        report = uptrain(converted, FEW, data=data, output=tmp_path / name, keep_anyway=True)
        assert report["uptraining"]["data"] == ("given" if not isinstance(data, str) else data)
        return [point["kl"] for point in report["uptraining"]["curve"]]

    plain, other = weights(ids), weights(TOKEN_ROWS[kind](ids, tmp_path))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert curve(ids, "plain") == curve(TOKEN_ROWS[kind](ids, tmp_path), "other")


def test_a_stream_of_tokens_is_the_same_in_memory_and_on_disk(folder, converted, tmp_path):
    ids = drawn_tokens(300_000)
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())
    kinds = [
        ids, torch.tensor(ids), as_npy(tmp_path / "ids.npy", ids.astype(np.int32)), f"{tmp_path}/train.bin:uint16",
        str(tmp_path / "llm.bin"),
    ]  # fmt: skip
    found = [evaluate(folder, data=data, tokens=500)["model"] for data in kinds]
    assert found == found[:1] * len(kinds)
    fits = [
        sqa_convert.convert(folder, 2, 1, "svd", calibration=Calibration(data, tokens=600, refine_steps=1)).report
        for data in kinds[::3]
    ]
    assert fits[0]["calibration"]["kl"] == fits[1]["calibration"]["kl"]
    report = uptrain(converted, FEW, data=kinds[3], output=tmp_path / "out", keep_anyway=True)
    assert report["quality"]["uptrained"]["kl"] > 0


def test_parts_of_a_stream_have_nothing_in_common():
    ids = np.arange(30 * 65_536)
    parts = {split: np.concatenate(list(documents(ids, split))) for split in ("train", "heldout")}
    assert sorted(np.concatenate(list(parts.values()))) == ids.tolist()
    assert len(parts["heldout"]) == 2 * 65_536
    again = {split: np.concatenate(list(documents(ids, split, shuffled=True))) for split in parts}
    assert all((np.sort(again[split]) == parts[split]).all() for split in parts)
    assert (again["train"] != parts["train"]).any()


def test_texts_give_the_same_numbers_however_they_are_given(tmp_path):
    texts = list(documents(None, "heldout"))[:40]
    kinds = [
        as_lines(tmp_path / "texts.jsonl", text=texts),
        texts,
        (text for text in texts),
        Dataset.from_dict({"text": texts}),
        [{"text": text} for text in texts],
        torch.utils.data.DataLoader([{"text": text} for text in texts], batch_size=7),
    ]
    found = [evaluate("sample:gpt2", data=data, tokens=512)["model"] for data in kinds]
    assert found == found[:1] * len(kinds)
    other = Dataset.from_dict({"body": texts})
    assert evaluate("sample:gpt2", data=other, text_column="body", tokens=512)["model"] == found[0]


def test_parts_by_name_are_held_out_as_named(folder):
    ids = drawn_tokens(ROWS, LENGTH)
    parts = DatasetDict(
        train=Dataset.from_dict({"input_ids": ids[:40].tolist()}),
        validation=Dataset.from_dict({"input_ids": ids[40:].tolist()}),
    )
    assert evaluate(folder, data=parts)["tokens"] == 20 * (LENGTH - 1)


PAIRS = {
    "batches": lambda a, b, folder: [{"input_ids": torch.tensor(a), "labels": torch.tensor(b)}],
    "Dataset": lambda a, b, folder: Dataset.from_dict({"input_ids": a.tolist(), "labels": b.tolist()}),
    "Parquet": lambda a, b, folder: as_parquet(folder / "pairs.parquet", input_ids=a.tolist(), labels=b.tolist()),
    "JSON lines": lambda a, b, folder: as_lines(folder / "pairs.jsonl", input_ids=a.tolist(), labels=b.tolist()),
}


def test_an_encoder_decoder_takes_labels_however_they_are_given(tmp_path):
    t5(heads=4, layers=2).save_pretrained(tmp_path / "t5")
    inputs, labels = drawn_tokens(ROWS, LENGTH), drawn_tokens(ROWS, 9)
    found = [evaluate(tmp_path / "t5", data=make(inputs, labels, tmp_path))["model"] for make in PAIRS.values()]
    assert found == found[:1] * len(PAIRS)


@pytest.mark.integration
def test_an_encoder_decoder_takes_labels_and_no_tokenizer(tmp_path):
    t5(heads=4, layers=2).save_pretrained(tmp_path / "t5")
    data = PAIRS["Parquet"](drawn_tokens(ROWS, LENGTH), drawn_tokens(ROWS, 9), tmp_path)
    conversion = sqa_convert.convert(
        tmp_path / "t5", 2, 1, "svd", output=tmp_path / "out", evaluate=True, data=data,
        calibration=Calibration(tokens=2000, refine_steps=1),
    )  # fmt: skip
    quality = conversion.report["quality"]
    assert quality["tokens"] == 3 * 9 and quality["converted"]["kl"] > 0 and conversion.report["samples"] == []
    assert "57 pairs" in conversion.report["calibration"]["text"]
    report = uptrain(tmp_path / "out", FEW, data=data, output=tmp_path / "trained", keep_anyway=True)
    assert report["quality"]["data"].endswith("3 pairs")


def test_one_pair_is_too_few(tmp_path):
    t5(heads=4, layers=2).save_pretrained(tmp_path / "t5")
    with pytest.raises(DataError, match="no pairs"):
        evaluate(tmp_path / "t5", data=[{"input_ids": [5, 6, 7], "labels": [-100, -100]}] * 40)


def test_labels_of_padding_are_no_answer(tmp_path):
    t5(heads=4, layers=2).save_pretrained(tmp_path / "t5")
    inputs, labels = torch.tensor(drawn_tokens(ROWS, LENGTH)), torch.tensor(drawn_tokens(ROWS, 9))
    plain = evaluate(tmp_path / "t5", data=[{"input_ids": inputs, "labels": labels}])
    long = torch.nn.functional.pad(labels, (0, 4), value=-100)
    assert evaluate(tmp_path / "t5", data=[{"input_ids": inputs, "labels": long}])["model"] == plain["model"]


def test_pairs_of_tokens_keep_their_end():
    """A series of Chronos has as many values as the config has positions, and then the end token."""
    source, long = t5(heads=4, layers=2, n_positions=16), 520
    data = {"input_ids": torch.tensor(drawn_tokens(4, long)), "labels": torch.tensor(drawn_tokens(4, 9))}
    parts = {"train": [data], "validation": [data]}
    how = Calibration(parts, tokens=4 * long, refine_steps=1)
    found = sqa_convert.convert(source, 2, 1, "svd", calibration=how).report["calibration"]
    assert found["tokens"] + found["held_out_tokens"] == 4 * long
    with torch.no_grad():
        loss = source(**data).loss.item()
    assert evaluate(source, data=parts)["model"]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda folder: str(folder / "t.bin"), "t.bin:uint16"),
        (lambda folder: f"{folder}/absent.bin:uint16", "No such file"),
        (lambda folder: as_npy(folder / "x.npy", np.zeros((4, 4))), "holds float64 of shape (4, 4)"),
        (lambda folder: as_npy(folder / "x.npy", np.full((40, 8), 10_000)), "token 10000, the model knows 61 tokens"),
        (lambda folder: np.full((40, 8), -1), "token -1"),
        (lambda folder: np.full((40, 8), 2**40), f"token {2**40}"),
        (lambda folder: 3, "data is a int"),
        (lambda folder: [3.5, 2.5], "data holds a float"),
        (lambda folder: [object()], "data holds a object"),
        (lambda folder: [], "holds no text"),
        (lambda folder: [[5]] * 40, "holds 0 tokens, in rows of two or more: give 64"),
        (lambda folder: {"train": "a.txt", "validation": "b.txt"}, "not by names"),
        (lambda folder: [{"body": "x"}] * 30, 'no column "text"'),
        (lambda folder: b"bytes", "data is a bytes"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_said_in_one_line(data, said, folder, tmp_path):
    (tmp_path / "t.bin").write_bytes(bytes(1000))
    with pytest.raises(DataError) as error:
        evaluate(folder, data=data(tmp_path))
    assert any(part in str(error.value) for part in said.split("|")) and "\n" not in str(error.value)


def test_data_given_from_python_are_given_again_to_go_on(converted, tmp_path):
    with pytest.raises(RecipeError, match="given from Python"):
        uptrain(converted, FEW, output=tmp_path / "out")


def test_the_command_reads_tokens_without_a_tokenizer(called, folder, tmp_path):
    drawn_tokens(40_000).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    code, out, err = called(eval_main, folder, "--data", f"{tmp_path}/tokens.bin:uint16", "--tokens", "500", "--json")
    assert code == 0, err
    assert json.loads(out)["quality"]["tokens"] > 400


def test_a_model_in_memory_is_measured_and_left_as_it_was(folder, expected):
    model = sqa_convert.evaluation.load.load_model(folder).train()
    model.transformer.h[0].eval()
    found = evaluate(model, data=drawn_tokens(ROWS, LENGTH))
    assert found["model"] == expected["model"] and found["warnings"] == expected["warnings"]
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training


def test_a_conversion_is_measured_against_its_source(folder):
    conversion = sqa_convert.convert(folder, 2, 1, calibration=None)
    found = evaluate(conversion, folder, data=drawn_tokens(ROWS, LENGTH))
    assert found["model"]["kl"] > 0 and found["against"]["kl"] is None
    assert evaluate(conversion.model, folder, data=drawn_tokens(ROWS, LENGTH))["model"] == found["model"]
