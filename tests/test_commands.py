"""sqa-uptrain and sqa-eval as a user meets them."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers import gpt2
from helpers import plain_convert as convert

from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli import evaluate, uptrain
from sqa_convert.uptraining.recipe import load_recipe

RECIPE = (
    "tokens: 1_024\nsequence_length: 32\nbatch_size: 8\nlearning_rate: 1.0e-3\nevaluations: 2\nheld_out_tokens: 2_048\n"
)


@pytest.fixture
def run(monkeypatch, called, tmp_path):
    """Runs a command inside a folder with a recipe; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("few.yaml").write_text(RECIPE)

    return lambda module, *arguments: called(module.main, *arguments)


@pytest.fixture
def out(tmp_path):
    convert("sample:gpt2", 6, 2, output=tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.integration
def test_uptraining_a_folder_ends_with_four_rows_and_a_plot(run, out):
    code, said, err = run(uptrain, "out", "--recipe", "few.yaml", "--control", "--seed", 3)
    assert code == 0, err
    rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert rows == ["source", "converted", "uptrained", "control"]
    assert "report: out/report.html" in said and "It lost much: loss +" in said
    assert "heads that are fitted lose less" in " ".join(said.split())
    assert "uptrain 2/4: loss" in err and "control 4/4: loss" in err and "tokens/s" in err
    report = json.loads((out / "report.json").read_text())
    weights = out / "model.safetensors"
    assert report["sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert report["uptraining"]["seed"] == 3 and report["uptraining"]["control"] is True
    assert sorted(os.listdir()) == ["few.yaml", "out"]


def test_json_is_one_object_and_nothing_else(run, out):
    code, said, err = run(uptrain, "out", "--recipe", "few.yaml", "--json", "--no-evaluate")
    assert (code, err) == (0, "")
    assert json.loads(said)["uptraining"]["steps"] == 4


def test_recipes_are_listed_and_can_be_looked_at(run, out):
    code, said, _ = run(uptrain, "--list-recipes")
    assert code == 0 and len(said.splitlines()) >= 9 and "gqa-5pct" in said
    code, said, _ = run(uptrain, "out", "--recipe", "quick", "--tokens", "458.752k", "--dry-run")
    assert code == 0 and "tokens: 458752" in said and "# 224 steps" in said


def test_a_packaged_recipe_runs_dry_where_it_would_run(run, out):
    code, said, err = run(uptrain, "out", "--recipe", "quick", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(said)["steps"] == load_recipe("quick").steps
    for name, says in {"gpt2-small": "sequence_length 1024 is more than", "seq2seq": "encoder-decoder"}.items():
        code, said, err = run(uptrain, "out", "--recipe", name, "--dry-run", "--json")
        assert (code, said, err.count("\n")) == (2, "", 1) and says in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 3, "nowhere: no such folder"),
        ([SAMPLES / "gpt2"], 3, "not made by sqa-convert"),
        (["out", "--recipe", "quikc"], 2, "quick"),
        (["out", "--recipe", "few.yaml", "--tokens", "5"], 2, "tokens: 5 must be at least"),
        (["out", "--recipe", "few.yaml", "--loss", "mse"], 2, "kl or ce or mix"),
        (["out", "--recipe", "few.yaml", "--data", "no/such/data"], 2, "--data no/such/data"),
        (["out", "--recipe", "few.yaml", "--data", "empty.txt"], 2, "--data"),
        (["out", "--recipe", "few.yaml", "--source", "sample:t5"], 3, "T5ForConditionalGeneration"),
        (["out", "--recipe", "few.yaml", "--source", "out"], 3, "is a converted model"),
        (["out", "--recipe", "few.yaml", "--control", "--no-evaluate"], 2, "--control"),
        (["out", "--resume"], 2, "no run that was stopped"),
        (["out", "--resume", "--tokens", "4096"], 2, "leave out --tokens"),
        (["out", "--resume", "--restart"], 2, "leave out --restart"),
        (["out", "--recipe", "few.yaml", "--seed", "-1"], 2, "seed: -1 must be between"),
        ([".", "--recipe", "few.yaml"], 3, "holds no report.json"),
        (["out", "--recipe", "pairs.yaml"], 2, "encoder-decoder"),
        (["out", "--recipe", "few.yaml", "--device", "tpu"], 2, "--device tpu"),
        (["out", "--recipe", "tracked.yaml"], 2, "report_to: nowhere is no tracker"),
        (["out", "--recipe", "gpt2-small"], 2, "sequence_length 1024 is more than"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_cannot_be_trained_is_one_line_and_changes_nothing(arguments, code, says, run, out, dry):
    Path("empty.txt").write_text("")
    Path("pairs.yaml").write_text(RECIPE + "data: pairs.jsonl\nsource_column: a\ntarget_column: b\n")
    Path("tracked.yaml").write_text(RECIPE + "report_to: nowhere\n")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    found, said, err = run(uptrain, *arguments, *dry)
    assert (found, said) == (code, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(os.listdir()) == ["empty.txt", "few.yaml", "out", "pairs.yaml", "tracked.yaml"]


def test_a_tokenizer_that_does_not_fit_the_model_is_named(run, tmp_path):
    gpt2(vocab_size=300, n_positions=64).save_pretrained(tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    convert(tmp_path / "source", 6, 2, output=tmp_path / "out")
    code, _, err = run(uptrain, "out", "--recipe", "few.yaml")
    assert code == 2 and "the model knows 300 tokens" in err


def test_a_converted_model_is_held_against_what_it_was_made_from(run, out):
    code, said, err = run(evaluate, "out", "--tokens", 2048, "--samples", 1)
    assert code == 0, err
    assert "sample:gpt2" in said and "[given]" in said and said.count("[sample:gpt2]") == 1
    code, said, err = run(evaluate, "out", "--tokens", "2k", "--json", "--samples", 1)
    result = json.loads(said)
    assert (code, err, result["schema"]) == (0, "", 1)
    assert result["models"] == {"against": "sample:gpt2", "model": "out"}
    assert result["quality"]["model"]["kl"] > 1
    assert set(result["samples"][0]) == {"given", "against", "model"}


def test_a_quality_gate_has_its_own_exit_code(run, out):
    code, said, err = run(evaluate, "out", "--tokens", 2048, "--samples", 0, "--max-kl", 0.5)
    assert code == 4 and "is more than --max-kl 0.5" in err and "sample:gpt2" in said
    code, _, err = run(evaluate, "sample:gpt2", "--against", "sample:gpt2", "--tokens", 2048, "--max-kl", 1e-6)
    assert code == 0, err
    code, _, err = run(evaluate, "sample:gpt2", "--max-kl", 0.5)
    assert code == 2 and "--against" in err
    code, _, err = run(evaluate, "out", "--max-kl", "nan")
    assert code == 2 and "--max-kl nan: give 0 or more" in err


def test_models_that_cannot_be_compared_are_named(run):
    code, _, err = run(evaluate, "sample:gpt2", "--against", "sample:t5", "--tokens", 256)
    assert code == 2 and "other kind or vocabulary" in err


def test_what_a_model_writes_ends_where_its_positions_do(run, monkeypatch):
    monkeypatch.setattr("sqa_convert.evaluation.generation.WRITTEN", 48)
    gpt2(vocab_size=2048, n_positions=64).save_pretrained("short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLES / "gpt2" / name, "short")
    code, said, err = run(evaluate, "short", "--tokens", 256, "--samples", 1, "--json")
    assert code == 0, err
    assert json.loads(said)["samples"][0].keys() == {"given", "model"}


def test_an_encoder_decoder_answers_side_by_side(run):
    code, said, err = run(evaluate, "sample:t5", "--tokens", 1024, "--samples", 1)
    assert code == 0, err
    assert "extra_id_0" in said and "[sample:t5]" in said


def test_tasks_without_the_harness_say_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run(evaluate, "sample:gpt2", "--tokens", 256, "--samples", 0, "--tasks", "hellaswag")
    assert code == 2 and "sqa-convert[eval]" in err


@pytest.mark.integration
@pytest.mark.parametrize("model", ["out", "sample:t5"])
def test_a_local_task_of_the_harness_runs_offline(model, run, out):
    pytest.importorskip("lm_eval")
    rows = [
        {"q": "import", "choices": [" os", " zebra"], "right": 0},
        {"q": "def f(x):", "choices": ["q", "\n"], "right": 1},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(Path("rows.jsonl").resolve())},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{right}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    Path("words.yaml").write_text(json.dumps(task))  # JSON is YAML
    code, said, err = run(evaluate, model, "--tokens", 256, "--samples", 0, "--json", "--tasks", "words.yaml")
    assert code == 0, err
    scores = json.loads(said)["tasks"]
    assert set(scores) == ({"model", "against"} if model == "out" else {"model"})
    assert scores["model"]["words acc"] in (0.0, 0.5, 1.0)
    code, _, err = run(evaluate, model, "--tokens", 256, "--samples", 0, "--tasks", "no_such_task_here")
    assert code == 2 and "no such task" in err
