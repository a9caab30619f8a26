"""Results that are loaded, changed and saved again with transformers: what others then find in the folder."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from helpers import gpt2, plain_convert, t5, tokens
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
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
STRANGER = """
import sys, transformers
auto, *folders = sys.argv[1:]
for folder in folders:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
assert "sqa_convert" not in sys.modules
"""


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
            assert mapping[ours].__name__ == expected
            assert family.auto_map[auto].endswith(f".{expected}")
            compared.add(auto)
    main = "AutoModelForCausalLM" if model_type == "gpt2" else "AutoModelForSeq2SeqLM"
    assert {"AutoModel", main} <= compared


def test_a_folder_names_the_auto_classes_that_are_registered():
    for auto, place in {**FAMILIES["gpt2"].auto_map, **FAMILIES["t5"].auto_map}.items():
        named = getattr(models, place.partition(".")[2])
        if auto != "AutoConfig":
            assert getattr(transformers, auto)._model_mapping[named.config_class] is named


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
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    folders = (str(tmp_path / "trained"), str(tmp_path / "run" / "checkpoint-1"))
    command = [sys.executable, "-c", STRANGER, auto.__name__, *folders]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)


@pytest.mark.integration
def test_a_t5_writes_in_the_pipeline_that_its_source_writes_in(tmp_path):
    same = plain_convert("sample:t5", 12, 12, output=tmp_path / "out", verify=False).output
    written = [
        pipeline("text-generation", model=str(folder))("import <extra_id_0> def", max_new_tokens=4, do_sample=False)
        for folder in (SAMPLES / "t5", same)
    ]
    assert written[0] == written[1]
