"""Files of text as users have them: their formats, their names, what lies beside them."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import feather

from sqa_convert.errors import DataError
from sqa_convert.text.documents import Columns, Skipped, check_data, documents, pairs
from sqa_convert.text.formats import PIECE, kind_of, pieces

TEXTS = [f"document {i}\nin two lines, né\n" for i in range(40)]


def everything(data, **options):
    return sorted(text for split in ("train", "heldout") for text in documents(str(data), split, **options))


def json_lines(texts=TEXTS, column="text"):
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts).encode()


def csv(separator=","):
    return "".join(f'{a}{separator}"{b}"\n' for a, b in [("id", "text"), *enumerate(TEXTS)]).encode()


def arrow_bytes(suffix, compression=None):
    table, sink = pyarrow.table({"id": range(40), "text": TEXTS}), pyarrow.BufferOutputStream()
    if suffix == "parquet":
        from pyarrow.parquet import write_table

        write_table(table, sink, row_group_size=7)
    elif suffix == "feather":
        feather.write_feather(table, sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 7)
    return sink.getvalue().to_pybytes()


def compressed(content, codec):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.json": json_lines(),
    "a.jsonl": json_lines(),
    "a.JSONL": json_lines(),
    "a.ndjson": json_lines(),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "columns.json": json.dumps({"text": TEXTS, "id": list(range(40))}).encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + json_lines(),
    "a.json.gz": gzip.compress(json_lines()),
    "a.jsonl.gz": gzip.compress(json_lines()[:500]) + gzip.compress(json_lines()[500:]),
    "a.jsonl.zst": compressed(json_lines()[:500], "zstd") + compressed(json_lines()[500:], "zstd"),
    "a.NDJSON.BZ2": bz2.compress(json_lines()),
    "a.jsonl.xz": lzma.compress(json_lines()),
    "a.jsonl.lz4": compressed(json_lines(), "lz4"),
    "a.csv": csv(),
    "a.Csv": b"\xef\xbb\xbf" + csv(),
    "utf16.csv": csv().decode().encode("utf-16"),
    "a.csv.gz": gzip.compress(csv()),
    "a.tsv": csv("\t"),
    "a.parquet": arrow_bytes("parquet"),
    "a.parquet.zst": compressed(arrow_bytes("parquet"), "zstd"),
    "a.arrow": arrow_bytes("arrow"),
    "a.feather": arrow_bytes("feather"),
    "a.arrow.gz": gzip.compress(arrow_bytes("arrow")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_tables_of_every_format_are_read_as_such(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    assert everything(path) == sorted(TEXTS)


@pytest.mark.parametrize(
    "name", ["a.txt", "A.TXT", "a.md", "a.py", "a.rst", "a.html", "a", "a.txt.gz", "a.gz", "a.txt.zst"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_is_read_without_its_byte_order_mark(name, encoding, tmp_path):
    text = "".join(f"line {i}, né\r\n" for i in range(100))
    content = text.encode(encoding)
    if name.endswith((".gz", ".zst")):
        content = gzip.compress(content) if name.endswith(".gz") else compressed(content, "zstd")
    (tmp_path / name).write_bytes(content)
    train, held_out = ("".join(documents(str(tmp_path / name), split)) for split in ("train", "heldout"))
    assert train + held_out == text.replace("\r\n", "\n")


@pytest.mark.parametrize("name", ["a.png", "a.jsonl.zip", "a.tar.gz", "a.safetensors", "a.xlsx", "a.pkl.gz"])
def test_files_that_are_not_read_are_refused_with_those_that_are(name, tmp_path):
    (tmp_path / name).write_bytes(json_lines())
    with pytest.raises(DataError, match=r"are not read \(these are: .*\.jsonl.*\.txt.*\.gz"):
        check_data(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines())[:-20]),
        ("a.jsonl.zst", compressed(json_lines(), "zstd")[:-20]),
        ("a.jsonl.gz", json_lines()),
        ("a.parquet", json_lines()),
        ("a.arrow", json_lines()),
        ("a.jsonl", json_lines()[:-9]),
    ],
)
def test_damaged_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read: "):
        everything(tmp_path / name)


def test_text_of_another_encoding_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("né à".encode("latin-1"))
    with pytest.raises(DataError, match=r"no UTF-8 text .*iconv"):
        check_data(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("character", [*"[]*?{}~ :%#'\"\\\n", "::", "é", "[1]", "**"])
@pytest.mark.parametrize("where", ["file", "folder", "first"])
def test_what_exists_under_a_name_is_meant_by_it(character, where, tmp_path):
    name = f"{character}.txt" if where == "first" else f"train{character}.txt"
    path = tmp_path / name
    if where == "folder":
        path = tmp_path / f"a{character}b" / "train.txt"
        path.parent.mkdir()
    (tmp_path / "train1.txt").write_text("another\nfile\n")  # what some of the names are patterns for
    path.write_text("this\n" * 20)
    assert set("".join(everything(path)).split()) == {"this"}
    if where == "folder":
        assert set("".join(everything(path.parent)).split()) == {"this"}


def test_names_that_are_no_utf_8_are_read_and_told(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("this\n" * 20)
    assert set("".join(everything(path)).split()) == {"this"}
    Path(path).write_text("")
    with pytest.raises(DataError, match="no text in its train part") as caught:
        check_data(path)
    str(caught.value).encode()


@pytest.mark.parametrize("data", ["~/a.txt", "~/*.txt", "~"])
def test_a_tilde_is_the_home_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("this\n" * 20)
    assert set("".join(everything(data)).split()) == {"this"}


def test_a_name_that_no_file_can_have_is_told(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: .*too long"):
        check_data("the text itself " * 40)


def test_only_what_does_not_exist_is_a_pattern(tmp_path):
    for i in range(3):
        (tmp_path / f"train{i}.jsonl").write_bytes(json_lines([f"{i}"] * 20))
    assert set(everything(tmp_path / "train[12].jsonl")) == {"1", "2"}
    (tmp_path / "train[12].jsonl").write_bytes(json_lines(["itself"] * 20))
    assert set(everything(tmp_path / "train[12].jsonl")) == {"itself"}


def test_what_lies_beside_data_is_no_data(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:20]))
    (tmp_path / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[20:])))
    beside = ["README.md", "LICENSE", "_SUCCESS", "_metadata", ".metadata", ".a.jsonl.crc", "dataset_infos.json"]
    hidden = [".git/a.jsonl", ".ipynb_checkpoints/a.jsonl", ".cache/huggingface/download/a.jsonl", "deep/.x/a.jsonl"]
    for name in beside + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("what is no data")
    assert everything(tmp_path) == everything(tmp_path / "**" / "*") == sorted(TEXTS)


@pytest.mark.parametrize("name", ["", "**/*"])
def test_linked_files_and_folders_are_read_once_and_links_that_lead_back_are_not_followed(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_bytes(json_lines(TEXTS[20:]))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(json_lines(TEXTS[:20]))
    (tmp_path / "corpus" / "z.jsonl").symlink_to("a.jsonl")
    for link, target in {"linked": "../elsewhere", "again": "../elsewhere", "self": "."}.items():
        (tmp_path / "corpus" / link).symlink_to(target)
    if not name:
        (tmp_path / "corpus" / "up").symlink_to("..")
        (tmp_path / "beside.jsonl").write_bytes(json_lines(["no part of the corpus"]))
    assert everything(tmp_path / "corpus" / name) == sorted(TEXTS)


def test_what_is_there_and_cannot_be_text_is_told_as_that(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("nowhere")
    for data, says in {"pipe.txt": "no regular file", "link.txt": "a broken link"}.items():
        with pytest.raises(DataError, match=f"--data .*{data} is {says}"):
            check_data(str(tmp_path / data))
    for data in ("", " "):
        with pytest.raises(DataError, match="--calibration is empty: give a file"):
            check_data(data, "--calibration")
    (tmp_path / "a.jsonl").write_text('"a line of text"\n' * 40)
    with pytest.raises(DataError, match=r"rows have no columns; of JSON each has to be \{\"text\""):
        check_data(str(tmp_path / "a.jsonl"))


def test_files_of_text_are_one_kind_and_may_be_called_readme(tmp_path):
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("this\n" * 20)
    assert set("".join(everything(tmp_path)).split()) == {"this"}
    (tmp_path / "README.md").unlink()
    (tmp_path / "LICENSE").unlink()
    with pytest.raises(DataError, match="folder without files"):
        check_data(str(tmp_path))


@pytest.mark.parametrize("others", [["b.txt"], ["b.png", "c"]])
def test_of_several_kinds_one_is_chosen_by_a_pattern(others, tmp_path):
    for name in ["a.jsonl", "a.JSONL.gz", *others]:
        (tmp_path / name).write_bytes(gzip.compress(json_lines()) if name.endswith("gz") else json_lines())
    with pytest.raises(DataError, match="several kinds") as caught:
        check_data(str(tmp_path))
    check_data(str(caught.value).split("'")[1])


@pytest.mark.parametrize("parts", [None, ["train"], ["train", "validation"], ["train", "test"]])
def test_a_folder_of_save_to_disk_is_a_data_set(parts, tmp_path):
    if parts is None:
        Dataset.from_dict({"id": range(40), "text": TEXTS}).save_to_disk(tmp_path / "[set]", num_shards=3)
    else:
        each = {part: Dataset.from_dict({"text": [f"{part} {text}" for text in TEXTS]}) for part in parts}
        DatasetDict(each).save_to_disk(tmp_path / "[set]")
    train, held_out = (list(documents(str(tmp_path / "[set]"), split)) for split in ("train", "heldout"))
    if parts is None or len(parts) == 1:
        assert len(train) == 38 and len(held_out) == 2
    else:
        assert {text.split()[0] for text in train} == {"train"}
        assert {text.split()[0] for text in held_out} == {parts[1]}
        assert len(held_out) == 40


def test_a_data_set_without_a_part_for_training_names_its_parts(tmp_path):
    DatasetDict({"dev": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no part named train \(its parts: dev\)"):
        check_data(str(tmp_path / "set"))
    assert everything(tmp_path / "set" / "dev") == sorted(TEXTS)


BAD = [None, 7, ["a", "list"], {"a": "table"}, True]


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.parquet", "a.csv", "set"])
def test_rows_without_text_are_skipped_and_counted(name, tmp_path):
    path, bad = tmp_path / name, [None] * 5 if name in ("a.parquet", "set", "a.csv") else BAD
    rows = [{"id": "1", "text": text} for text in (*bad[:3], *TEXTS, *bad[3:])]
    if name == "a.parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif name == "set":
        Dataset.from_list(rows).save_to_disk(path)
    elif name == "a.csv":
        path.write_text("id,text\n" + "".join(f'1,"{row["text"]}"\n' if row["text"] else "1\n" for row in rows))
    elif name == "list.json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"other": 1}\n"text alone"\n')
        bad = [*bad, None, None]
    for split, count in (("train", 38), ("heldout", 2)):
        skipped = Skipped()
        texts = list(documents(str(path), split, skipped=skipped))
        assert set(texts) <= set(TEXTS) and len(texts) == count
        assert str(skipped) == f", {len(bad)} rows without text skipped"


def test_pairs_with_half_a_row_are_skipped_and_counted(tmp_path):
    rows = [{"a": "question", "b": "answer"}] * 30 + [{"a": None, "b": "x"}, {"a": "y"}, {"a": "z", "b": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = Skipped()
    assert set(pairs(str(tmp_path / "a.jsonl"), Columns("a", "b"), "train", skipped=skipped)) == {
        ("question", "answer")
    }
    assert skipped.rows == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": None}] * 30, 'none of its 30 rows holds text in "text"'),
        ([{"text": 3}] * 30, 'none of its 30 rows holds text in "text"'),
        ([{"content": "x"}] * 5000, r'no column "text" of text \(columns: content\); --text-column names another'),
    ],
)
def test_a_table_without_text_is_refused(rows, says, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=says):
            check_data(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_column_of_the_text_has_any_name(name, tmp_path):
    table, path = Dataset.from_dict({"text": ["no"] * 40, "a.b c": TEXTS}), tmp_path / name
    {"a.jsonl": table.to_json, "a.csv": table.to_csv, "a.parquet": table.to_parquet}[name](path)
    assert everything(path, column="a.b c") == sorted(TEXTS)


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("this\n" * 20)
    with pytest.raises(DataError, match='no column "content"'):
        everything(tmp_path / "a.txt", column="content")


def test_halves_of_characters_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 and \\ud83d"}\n' * 20)
    assert set(everything(tmp_path / "a.jsonl")) == {"\U0001f600 and \ufffd"}


@pytest.mark.parametrize("line", ["a line of text\n", "no line ends here, "])
def test_a_large_file_of_text_is_read_in_pieces_as_far_as_it_is_needed(line, tmp_path):
    (tmp_path / "a.txt").write_text(line * (40 * PIECE // len(line)))
    tracemalloc.start()
    first = next(documents(str(tmp_path / "a.txt"), "train", shuffled=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert PIECE <= len(first) <= 2 * PIECE and first.endswith("\n") == line.endswith("\n")
    assert peak < 20e6


@pytest.mark.parametrize("text", ["", "a", "a\nbc\n" * 9, "abcdefg" * 9, "\n" * 30, "é\r\n" * 9])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_pieces_together_are_the_text(text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 2 * size for part in parts)


def test_the_ending_of_a_name_says_the_kind_and_nothing_else_does():
    named = {"v1.2": None, "a.JSONL.GZ": "json", "x/y.z/name": "text", "a.gz.txt": "text", ".gz": "text", "a.": "text"}
    assert {name: kind_of(Path(name)) for name in named} == named
