"""Every packaged recipe runs: two steps of it, on a tiny random model of its family and local text of its columns."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers import plain_convert as convert
from helpers import randomize
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel, T5EncoderModel, T5ForConditionalGeneration

from sqa_convert import load_recipe, resolve, uptrain
from sqa_convert.report.report_json import read_report
from sqa_convert.uptraining.recipe import recipe_names

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BATCH = 4
STEPS = 2


def tiny(family, folder):
    """A random model with a sample's tokenizer."""
    name = resolve("sample:gpt2" if family == "gpt2" else "sample:t5")
    classes = {"gpt2": GPT2LMHeadModel, "t5": T5ForConditionalGeneration, "encoder": T5EncoderModel}
    sizes = {"n_layer": 1, "n_embd": 24, "n_head": 6, "n_positions": 1024} if family == "gpt2" else {
        "num_layers": 1, "num_decoder_layers": 1, "d_model": 24, "d_kv": 4, "num_heads": 6, "d_ff": 32
    }  # fmt: skip
    config = AutoConfig.from_pretrained(name)
    config = type(config)(**(config.to_dict() | sizes))
    model = randomize(classes[family](config), 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    return folder


def text_for(recipe, file):
    """Rows with the columns that a recipe names."""
    columns = [recipe.source_column, recipe.target_column] if recipe.source_column else [recipe.text_column]
    rows = [{c: f"def {c}_{i}(x):\n    return x + {i % 7}\n" * (1 + i % 20) for c in columns} for i in range(2000)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.integration
@pytest.mark.parametrize("name", recipe_names())
def test_two_steps_of_every_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = load_recipe(name)
    tokens = STEPS * BATCH * whole.sequence_length
    shorter = {
        "data": text_for(whole, tmp_path / "text.jsonl"), "tokens": tokens, "batch_size": BATCH,
        "micro_batch": min(2, whole.micro_batch), "held_out_tokens": 512, "evaluations": 1,
    }  # fmt: skip
    recipe = load_recipe(name, **shorter)
    family = "encoder" if name == "encoder" else "t5" if "t5" in name or "seq2seq" in name else "gpt2"
    convert(tiny(family, tmp_path / "source"), 3, 3, output="out", evaluate=False, verify=False)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    if recipe.fsdp:
        lines = [f"{key}: {json.dumps(value)}" for key, value in dataclasses.asdict(recipe).items()]
        (tmp_path / "recipe.yaml").write_text("\n".join(lines))
        command = [*TORCHRUN, "-m", "sqa_convert.cli.uptrain", "out", "--recipe", "recipe.yaml", "--device", "cpu"]
        done = subprocess.run([*command, "--keep-anyway"], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    else:
        uptrain("out", recipe, device="cpu", keep_anyway=True)
    report = read_report(tmp_path / "out")
    assert report["uptraining"]["steps"] == STEPS and report["uptraining"]["tokens"] == tokens
    assert report["quality"]["uptrained"]["error" if name == "encoder" else "loss"] > 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != before
