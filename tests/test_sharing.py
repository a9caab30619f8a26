"""Results that are loaded, changed and saved again with transformers: what others then find in the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import gpt2, plain_convert, randomize, t5, tokens
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2Model,
    T5EncoderModel,
    T5Model,
    Trainer,
    TrainingArguments,
    pipeline,
)

from sqa_convert import models
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.conversion.write import MODELS
from sqa_convert.families import FAMILIES

BUILD = {"gpt2": gpt2, "t5": t5}
AUTO_CLASSES = [name for name in dir(transformers) if name.startswith("AutoModelFor")]
ELSEWHERE = Path(__file__).with_name("stranger.py")


def elsewhere(cwd, what, *folders):
    """Runs `stranger.py`, which says on stderr what it found wrong."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(cwd / "modules")
    ended = subprocess.run(
        [sys.executable, ELSEWHERE, what, *folders],
        env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended


def chosen(registered):
    """Of several classes, the one that is loaded where no `architectures` name another."""
    return registered[0] if isinstance(registered, tuple) else registered


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_auto_class_that_loads_the_source_loads_the_result(model_type):
    family = FAMILIES[model_type]
    ours = getattr(models, family.auto_map["AutoConfig"].partition(".")[2])
    compared = set()
    for auto in ("AutoModel", *AUTO_CLASSES):
        mapping = getattr(transformers, auto)._model_mapping
        stock = mapping.get(CONFIG_MAPPING[model_type], None)
        if getattr(stock, "__name__", None) in family.architectures:
            expected = family.architectures[stock.__name__]
            assert chosen(mapping[ours]).__name__ == expected
            assert family.auto_map[auto].endswith(f".{expected}")
            compared.add(auto)
    main = "AutoModelForCausalLM" if model_type == "gpt2" else "AutoModelForSeq2SeqLM"
    assert {"AutoModel", main} <= compared


def test_a_folder_names_the_auto_classes_that_are_registered():
    for auto, place in {**FAMILIES["gpt2"].auto_map, **FAMILIES["t5"].auto_map}.items():
        named = getattr(models, place.partition(".")[2])
        if auto != "AutoConfig":
            assert chosen(getattr(transformers, auto)._model_mapping[named.config_class]) is named


@pytest.mark.parametrize("name", BUILD)
def test_a_converted_model_that_is_saved_again_brings_its_code(name, tmp_path):
    model = plain_convert(BUILD[name](), 8, 4).model
    model.save_pretrained(tmp_path)
    family = FAMILIES[name]
    assert {path.name for path in tmp_path.glob("*.py")} == set(family.model_files)
    for file in family.model_files:
        assert (tmp_path / file).read_bytes() == (MODELS / file).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == family.auto_map


def test_a_model_of_its_own_config_brings_its_code(tmp_path):
    models.SQAGPT2Model(models.SQAGPT2Config(n_layer=1, n_embd=48, vocab_size=9)).save_pretrained(tmp_path)
    places = {"AutoConfig": "configuration_sqa_gpt2.SQAGPT2Config", "AutoModel": "modeling_sqa_gpt2.SQAGPT2Model"}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == places
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_sqa_gpt2.py", "modeling_sqa_gpt2.py"}


def saved_config(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_an_encoder_taken_from_a_t5_is_saved_as_one(tmp_path):
    t5().save_pretrained(tmp_path / "source")
    out = plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output
    encoder = models.SQAT5EncoderModel.from_pretrained(out)
    named = saved_config(encoder, tmp_path / "encoder")["auto_map"]
    place = "modeling_sqa_t5.SQAT5EncoderModel"
    assert named == {
        "AutoConfig": "configuration_sqa_t5.SQAT5Config", "AutoModel": place, "AutoModelForTextEncoding": place
    }  # fmt: skip


@pytest.mark.parametrize("cls", [T5Model, T5EncoderModel])
def test_auto_model_loads_what_was_converted(cls, tmp_path):
    cls(t5().config).save_pretrained(tmp_path / "source")
    out = plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output
    loaded, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert (type(loaded).__name__, list(info["missing_keys"])) == (f"SQA{cls.__name__}", [])


def test_auto_model_builds_a_t5_of_a_config_that_names_no_class():
    config = models.SQAT5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=4, num_key_value_heads=2
    )
    assert type(AutoModel.from_config(config)) is models.SQAT5Model


def classifier(cls, **options):
    settings = gpt2().config.to_dict() | {"pad_token_id": 0, "architectures": None}
    return randomize(cls(transformers.GPT2Config(**settings | options)))


EVERY_CLASS = {
    "gpt2": gpt2,
    "gpt2-base": lambda: classifier(GPT2Model),
    "gpt2-classifier": lambda: classifier(GPT2ForSequenceClassification, num_labels=3),
    "gpt2-double": lambda: classifier(GPT2DoubleHeadsModel),
    "t5": t5,
    "t5-untied": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-base": lambda: randomize(T5Model(t5().config)),
    "t5-encoder": lambda: randomize(T5EncoderModel(t5().config)),
    "mt5": lambda: t5(family="mt5"),
}


def loaded_with_the_package(folder):
    """The folder's model by the Auto class that its `auto_map` names for it."""
    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    auto = next(auto for auto, place in config["auto_map"].items() if place.endswith(f".{name}"))
    model = getattr(transformers, auto).from_pretrained(folder)
    assert type(model) is getattr(models, name)
    return model


@pytest.mark.integration
def test_every_class_goes_round_between_those_who_have_the_package_and_those_who_do_not(tmp_path):
    pytest.importorskip("peft")
    folders = []
    for name, build in EVERY_CLASS.items():
        source = build()
        plain_convert(source, 8, 4).model.save_pretrained(tmp_path / f"{name}.memory")
        source.save_pretrained(tmp_path / "source" / name)
        out = plain_convert(tmp_path / "source" / name, 8, 4, output=tmp_path / "out" / name).output
        loaded_with_the_package(out).save_pretrained(tmp_path / f"{name}.package")
        folders += [tmp_path / f"{name}.memory", tmp_path / f"{name}.package"]
    part = tmp_path / "t5.part"
    models.SQAT5EncoderModel.from_pretrained(tmp_path / "out" / "t5").save_pretrained(part)
    trained = tmp_path / "trained"
    elsewhere(tmp_path, "train", *folders, part, trained)
    folders = [trained / folder.name for folder in (*folders, part)]
    computed = [torch.load(folder / "outputs.pt") for folder in folders]
    elsewhere(tmp_path, "load", *folders)
    for folder, expected in zip(folders, computed, strict=True):
        assert torch.equal(torch.load(folder / "outputs.pt"), expected), folder.name
        loaded_with_the_package(folder)


@pytest.mark.integration
@pytest.mark.parametrize("name", BUILD)
def test_strangers_load_what_a_user_trained_further(name, tmp_path):
    BUILD[name]().save_pretrained(tmp_path / "source")
    auto = AutoModelForCausalLM if name == "gpt2" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    elsewhere(tmp_path, "load", tmp_path / "trained", tmp_path / "run" / "checkpoint-1")


SHARED_OUT = """
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sqa_convert import models
place, folder, name = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
model = getattr(models, name).from_pretrained(folder)
fully_shard(model)
made = type(model)
model.save_pretrained(f"{folder}-saved", state_dict={n: t.full_tensor() for n, t in model.state_dict().items()})
assert type(model) is made and made.__name__ == f"FSDP{name}"
"""


@pytest.mark.integration
@pytest.mark.parametrize("name", BUILD)
def test_a_model_shared_out_by_fsdp_is_saved_with_its_own_code(name, tmp_path):
    model = plain_convert(BUILD[name](), 8, 4).model
    config = saved_config(model, tmp_path / "out")
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path / "out"), type(model).__name__)
    subprocess.run([sys.executable, "-c", SHARED_OUT, *arguments], check=True)
    saved = tmp_path / "out-saved"
    assert {path.name for path in saved.glob("*.py")} == set(FAMILIES[name].model_files)
    assert json.loads((saved / "config.json").read_text())["auto_map"] == config["auto_map"]


@pytest.mark.integration
def test_tokenizers_load_elsewhere_without_a_question_or_a_warning(tmp_path):
    folders = [plain_convert(f"sample:{name}", 8, 4, output=tmp_path / name, verify=False).output for name in BUILD]
    ended = elsewhere(tmp_path, "tokenize", *folders)
    assert (ended.stdout, ended.stderr) == ("", "")


@pytest.mark.parametrize("name", BUILD)
def test_with_the_package_a_tokenizer_loads_without_a_question_or_a_warning(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    folder = plain_convert(f"sample:{name}", 8, 4, output=tmp_path / name, verify=False).output
    assert AutoTokenizer.from_pretrained(folder)("def f")["input_ids"]
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.integration
def test_a_t5_writes_in_the_pipeline_that_its_source_writes_in(tmp_path):
    same = plain_convert("sample:t5", 12, 12, output=tmp_path / "out", verify=False).output
    written = [
        pipeline("text-generation", model=str(folder))("import <extra_id_0> def", max_new_tokens=4, do_sample=False)
        for folder in (SAMPLES / "t5", same)
    ]
    assert written[0] == written[1]
