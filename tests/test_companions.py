"""What lies beside the weights: files that come along, files that are left behind, and adapters."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from helpers import gpt2, plain_convert, t5
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel

from sqa_convert.checkpoints import small_files as writing
from sqa_convert.checkpoints.companions import companions, has_tokenizer, left_behind
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.convert import main
from sqa_convert.errors import CheckpointError, UnsupportedModelError

POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MODEL = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


@pytest.fixture
def source(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def put(folder, files):
    """Text, or what is written as JSON, by the names of files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def sentence_model(folder, modules=(MODEL, POOLING, DENSE), activation="torch.nn.modules.activation.Tanh"):
    files = {
        "modules.json": list(modules),
        "config_sentence_transformers.json": {"prompts": {"query": "to find: "}},
        "sentence_bert_config.json": {"max_seq_length": 64},
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 48, "activation_function": activation},
    }
    put(folder, files)
    save_file({"linear.weight": torch.ones(4, 48)}, folder / "2_Dense" / "model.safetensors")
    torch.save({"linear.weight": torch.ones(4, 48)}, folder / "2_Dense" / "pytorch_model.bin")
    return {*files, "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"}


def converted(source, **how):
    return plain_convert(source, 8, 4, output=source.parent / "out", **how)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_vocabulary_that_a_tokenizer_class_names_comes_along(tmp_path):
    named = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES[^=]*=\s*{(.*?)}", path.read_text(), re.DOTALL):
            named.update(re.findall(r':\s*"([^"]+)"', block))
    assert len(named) > 15 and "sentencepiece.bpe.model" in named
    for name in named:
        (tmp_path / name).touch()
    assert set(companions(tmp_path)) == named
    for name in named - {"merges.txt"}:
        assert has_tokenizer(tmp_path), name


def test_a_tokenizer_of_another_family_makes_the_same_tokens(tmp_path):
    """As Japanese GPT-2s and Vietnamese T5s have it: XLM-R's tokenizer, and its vocabulary under XLM-R's name."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    t5(vocab_size=64).save_pretrained(tmp_path / "source")
    (tmp_path / "spm.model").rename(tmp_path / "source" / "sentencepiece.bpe.model")
    put(tmp_path / "source", {"tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"}})
    out = converted(tmp_path / "source").output
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "source", out))
    ids = theirs("the lazy dog").input_ids
    assert ours("the lazy dog").input_ids == ids
    assert ids.count(theirs.unk_token_id) == 0


def test_a_tokenizer_that_lost_a_file_is_found(tmp_path, monkeypatch):
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "source")
    monkeypatch.setattr(writing, "companions", lambda folder: ["tokenizer_config.json"])
    with pytest.raises(CheckpointError, match=r"its tokenizer .*save_pretrained first, or --no-verify|does not load"):
        converted(tmp_path / "source")
    assert converted(tmp_path / "source", verify=False).output.is_dir()


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_the_source_that_does_not_load_stops_nothing(damaged, source):
    put(source, {"tokenizer.json": {}, "tokenizer_config.json": {}, damaged: "{"})
    assert converted(source).output.is_dir()


def test_all_chat_templates_come_along(tmp_path):
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "source")
    templates = {
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
    }
    put(tmp_path / "source", templates)
    out = converted(tmp_path / "source", verify=False).output
    assert templates.keys() <= files_of(out)
    assert AutoTokenizer.from_pretrained(out).get_chat_template("tool_use") == "{{ tools }}"


def test_the_layers_of_sentence_transformers_come_along(source):
    files = sentence_model(source)
    (source / "1_Pooling" / "notes.doc").write_text("x")
    conversion = converted(source)
    assert files <= files_of(conversion.output)
    for name in files:
        assert (conversion.output / name).read_bytes() == (source / name).read_bytes()
    assert conversion.report["source"]["left_behind"] == ["1_Pooling/notes.doc"]
    assert ModelCard.load(conversion.output / "README.md").data.library_name == "sentence-transformers"


def test_sentence_transformers_is_told_how_to_load_a_converted_t5(tmp_path):
    T5EncoderModel(t5().config).save_pretrained(tmp_path / "source")
    files = sentence_model(tmp_path / "source") - {"modules.json"}
    out = converted(tmp_path / "source").output
    modules = json.loads((out / "modules.json").read_text())
    assert modules == [MODEL | {"type": "sentence_sqa_t5.SQAT5Transformer"}, POOLING, DENSE]
    assert {*files, "sentence_sqa_t5.py", "modeling_sqa_t5.py"} <= files_of(out)


@pytest.mark.integration
def test_sentence_transformers_loads_a_converted_t5(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    T5EncoderModel.from_pretrained(SAMPLES / "t5").save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(SAMPLES / "t5").save_pretrained(tmp_path / "encoder")
    layers = [Transformer(str(tmp_path / "encoder")), Pooling(128, "mean"), Dense(128, 24), Normalize()]
    sentences = library.SentenceTransformer(modules=layers)
    sentences.save(str(tmp_path / "source"))
    texts = ["def add(a, b): return a + b", "import os", "class Reader: pass"]
    wanted = sentences.encode(texts)
    for name, heads in (("same", (12, 12)), ("fewer", (6, 3))):
        plain_convert(tmp_path / "source", *heads, output=tmp_path / name)
    code = (
        "import sys; from sentence_transformers import SentenceTransformer; import numpy\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "assert type(model[0].auto_model).__name__ == 'SQAT5EncoderModel' and 'sqa_convert' not in sys.modules\n"
        "model.save(sys.argv[1] + '-again')\n"
        f"numpy.save(sys.argv[1] + '.npy', model.encode({texts!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "fewer")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # in a process that has not this package
    found = {"fewer": numpy.load(tmp_path / "fewer.npy")}
    for name in ("same", "fewer-again"):
        found[name] = library.SentenceTransformer(str(tmp_path / name), trust_remote_code=True).encode(texts)
    assert found["same"].shape == (3, 24) and abs(found["same"] - wanted).max() < 1e-5
    assert abs(found["fewer"] - wanted).max() > 1e-3 and abs(found["fewer-again"] - found["fewer"]).max() < 1e-6


@pytest.mark.parametrize(
    "spoiled",
    [
        {"modules": [MODEL, POOLING, DENSE | {"type": "mine.Dense"}]},
        {"modules": [MODEL, DENSE | {"path": "../source/2_Dense"}]},
        {"modules": [MODEL, DENSE | {"path": "3_Gone"}]},
        {"modules": [MODEL, 5]},
        {"activation": "os.abort"},
    ],
)
def test_layers_that_name_code_or_lie_elsewhere_are_left_behind(spoiled, source):
    files = sentence_model(source, **spoiled)
    conversion = converted(source)
    assert not files & files_of(conversion.output)
    assert {"modules.json", "2_Dense/"} <= set(conversion.report["source"]["left_behind"])


def test_a_layer_that_is_a_link_elsewhere_is_refused(source, tmp_path):
    sentence_model(source)
    (source / "1_Pooling").rename(tmp_path / "1_Pooling")
    (source / "1_Pooling").symlink_to(tmp_path / "1_Pooling")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json is a link to .*cp -rL"):
        converted(source)


def test_code_in_the_weights_of_a_layer_is_refused(source):
    sentence_model(source)
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n(X\x05\x00\x00\x00falsetR.")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model.bin"):
        converted(source)


def test_what_is_left_behind_is_said(source, monkeypatch, capsys):
    put(
        source,
        {"optimizer.pt": "", "onnx/model.onnx": "", "modeling_mine.py": "", ".gitattributes": "", "README.md": ""},
    )
    expected = ["modeling_mine.py", "onnx/", "optimizer.pt"]
    arguments = ["--q-groups", "8", "--kv-groups", "4", "--method", "mean", "--no-evaluate", "--no-verify"]
    for last in ("--dry-run", "--overwrite"):
        output = str(source.parent / "out")
        monkeypatch.setattr("sys.argv", ["sqa-convert", str(source), *arguments, "-o", output, last])
        with pytest.raises(SystemExit):
            main()
        assert f"left behind of the source's folder: {', '.join(expected)}\n" in capsys.readouterr().out
    assert json.loads((source.parent / "out/report.json").read_text())["source"]["left_behind"] == expected


@pytest.mark.parametrize(
    ("read", "left"),
    [
        (["model-1-of-1.safetensors"], ["pytorch_model.bin.index.json"]),
        (["model.safetensors"], ["model.safetensors.index.json", "pytorch_model.bin.index.json"]),
        (["pytorch_model-1-of-1.bin"], ["model.safetensors.index.json"]),
    ],
)
def test_the_index_of_what_was_read_is_not_left_behind(read, left, tmp_path):
    for name in (*read, "model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / name).touch()
    assert left_behind(tmp_path, read) == left


def test_a_long_list_of_what_is_left_behind_is_cut(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:03}.log").touch()
    (tmp_path / "a\nb").touch()
    listed = left_behind(tmp_path, ())
    assert listed[0] == "000.log" and listed[-1] == "and 11 more" and len(listed) == 51
    assert left_behind(tmp_path, [f"{number:03}.log" for number in range(60)]) == [repr("a\nb")]


@pytest.mark.parametrize(
    ("metadata", "language"),
    [
        ("language: no", "no"),
        ("language:\n- en\n- no\n- nb", ["en", "no", "nb"]),
        ("language: [sv, {of: mine}, no]", ["sv", "no"]),
        ("language: [no]\r\nlicense: mit", ["no"]),
    ],
)
def test_norwegian_is_a_language(metadata, language, source):
    (source / "README.md").write_bytes(f"---\n{metadata}\n---\n# Theirs\n".encode())
    card = ModelCard.load(converted(source, verify=False).output / "README.md")
    assert card.data.language == language


def test_the_task_that_the_source_is_for_is_kept(source):
    put(source, {"README.md": "---\npipeline_tag: summarization\ndatasets: [1984, c4]\n---\n"})
    data = ModelCard.load(converted(source, verify=False).output / "README.md").data
    assert (data.pipeline_tag, data.datasets, data.library_name) == ("summarization", ["1984", "c4"], "transformers")


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("files", [{"adapter_config.json": ADAPTER}, {"adapter_model.safetensors": ""}])
def test_an_adapter_beside_the_model_is_merged_first(files, source):
    put(source, files)
    says = r"holds an adapter \(LORA, adapter_\w+\.\w+\) beside the model; merge it first .*merge_and_unload"
    with pytest.raises(UnsupportedModelError, match=says):
        plain_convert(source, 8, 4)


def test_an_adapter_alone_names_its_base(tmp_path):
    put(tmp_path, {"adapter_config.json": ADAPTER | {"task_type": "SEQ_2_SEQ_LM"}, "adapter_model.bin": ""})
    says = r"and no model; merge it first .*AutoModelForSeq2SeqLM.from_pretrained\('gpt2'\)"
    with pytest.raises(UnsupportedModelError, match=says):
        plain_convert(tmp_path, 8, 4)


def test_an_adapter_that_is_no_change_of_weights_cannot_be_merged(source):
    put(source, {"adapter_config.json": ADAPTER | {"peft_type": "PREFIX_TUNING"}})
    with pytest.raises(UnsupportedModelError, match=r"cannot be merged into weights"):
        plain_convert(source, 8, 4)
