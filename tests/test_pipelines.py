"""Models that are a part of something larger, and tokenizers that lie elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import gpt2, t5, tokens
from helpers import plain_convert as convert
from transformers import T5EncoderModel

from sqa_convert.checkpoints.diffusers_folders import assembled
from sqa_convert.checkpoints.find import SAMPLES, open_source
from sqa_convert.cli.convert import main
from sqa_convert.errors import CheckpointError, RecipeError
from sqa_convert.text.tokenizers import load_tokenizer

COMMIT = "a" * 40


def pipeline(folder):
    """As diffusers stores one: a text encoder that converts, a model of another kind, a tokenizer."""
    encoder = T5EncoderModel(t5().config).eval()
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "tokenizer").mkdir()
    for path in (SAMPLES / "t5").iterdir():
        if "token" in path.name:
            shutil.copyfile(path, folder / "tokenizer" / path.name)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return encoder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of someone/pipe in the hub's cache."""
    repository = tmp_path / "hub" / "models--someone--pipe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / COMMIT


PARTS = r"subfolder text_encoder \(and tokenizer tokenizer\)"


def test_the_parts_of_a_pipeline_that_convert_are_named(tmp_path):
    pipeline(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=PARTS):
        convert(tmp_path / "pipe", 8, 4)
    shutil.rmtree(tmp_path / "pipe" / "text_encoder")
    with pytest.raises(CheckpointError, match="none of its parts"):
        convert(tmp_path / "pipe", 8, 4)


@pytest.mark.parametrize("where", ["folder", "hub", "part of the name"])
def test_a_part_converts_with_the_tokenizer_beside_it(where, hub, tmp_path):
    encoder = pipeline(hub)
    if where == "folder":
        shutil.copytree(hub, tmp_path / "pipe")
    name = {"folder": str(tmp_path / "pipe"), "hub": "someone/pipe", "part of the name": "someone/pipe/text_encoder"}
    options = {"subfolder": "text_encoder"} if where != "part of the name" else {}
    conversion = convert(name[where], 12, 12, output=tmp_path / "out", tokenizer="tokenizer", **options)
    source = conversion.report["source"]
    assert source["name"].endswith("pipe/text_encoder") and source["files"] == ["model.safetensors"]
    assert source["revision"] == (None if where == "folder" else COMMIT)
    ids = tokens()
    assert torch.equal(conversion.model(ids)[0], encoder(ids)[0])
    assert load_tokenizer(tmp_path / "out")("a b")["input_ids"] == load_tokenizer(SAMPLES / "t5")("a b")["input_ids"]


def test_the_parts_of_a_pipeline_on_the_hub_are_named(hub):
    pipeline(hub)
    with pytest.raises(CheckpointError, match=PARTS):
        convert("someone/pipe", 8, 4)


@pytest.mark.parametrize("place", ["a folder", "a sample", "a hub id"])
def test_a_tokenizer_may_be_any_folder_or_on_the_hub(place, hub, tmp_path):
    gpt2(vocab_size=4096).save_pretrained(tmp_path / "source")
    shutil.copytree(SAMPLES / "gpt2", hub)
    named = {"a folder": str(SAMPLES / "gpt2"), "a sample": "sample:gpt2", "a hub id": "someone/pipe"}[place]
    source = open_source(str(tmp_path / "source"), tokenizer=named)
    assert load_tokenizer(source.folder)("a b")["input_ids"] == load_tokenizer(SAMPLES / "gpt2")("a b")["input_ids"]
    assert json.loads((source.folder / "config.json").read_text())["n_embd"] == 48  # the model's
    convert(tmp_path / "source", 8, 4, output=tmp_path / "out", tokenizer=named)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_embd"] == 48
    assert load_tokenizer(tmp_path / "out")("a b") == load_tokenizer(SAMPLES / "gpt2")("a b")


def test_a_folder_without_a_tokenizer_is_none(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"--tokenizer empty: .* holds no tokenizer"):
        open_source(str(tmp_path / "source"), tokenizer="empty")


@pytest.mark.parametrize(
    ("name", "says"),
    [("~no-such-user/x", "cannot be looked at"), ("a" * 300, "cannot be looked at"), ("config.json", "is a file")],
)
def test_a_tokenizer_by_no_possible_name_is_refused(name, says, tmp_path, monkeypatch):
    gpt2(layers=1).save_pretrained(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source")
    with pytest.raises(CheckpointError, match=says):
        open_source(".", tokenizer=name)


def test_a_licence_beside_the_model_stays_its_own(tmp_path):
    for place in ("model", "tokenizer"):
        (tmp_path / place).mkdir()
        for name in ("LICENCE.txt", "NOTICE", "vocab.json"):
            (tmp_path / place / name).write_text(place)
    with assembled(tmp_path / "model", tmp_path / "tokenizer") as folder:
        written = {path.name: path.read_text() for path in Path(folder).iterdir()}
    assert written == {"LICENCE.txt": "model", "NOTICE": "model", "vocab.json": "tokenizer"}


@pytest.mark.parametrize("subfolder", ["..", "/etc", "", "a/../.."])
def test_a_subfolder_lies_inside(subfolder, tmp_path):
    with pytest.raises(RecipeError, match="--subfolder"):
        open_source(str(tmp_path), subfolder=subfolder)


@pytest.mark.parametrize("holds", ["nothing", "a config"])
def test_a_folder_that_hides_a_model_of_the_hub_is_said(holds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    if holds == "a config":
        gpt2().config.save_pretrained("gpt2")
    with pytest.raises(CheckpointError, match="the folder gpt2 here was taken: for gpt2 on the hub"):
        convert("gpt2", 8, 4)


def test_the_command_takes_a_part_and_its_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline(tmp_path / "pipe")
    flags = ["--subfolder", "text_encoder", "--tokenizer", "tokenizer", "--q-groups", "8", "--kv-groups", "4"]
    monkeypatch.setattr("sys.argv", ["sqa-convert", "pipe", *flags, "--method", "mean", "--no-evaluate", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    report = json.loads(capsys.readouterr().out)
    assert not stop.value.code and report["output"] == "text_encoder-sqa-q8kv4"
    assert (tmp_path / "text_encoder-sqa-q8kv4" / "tokenizer.json").is_file()
