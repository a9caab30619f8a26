"""A name is a name: of a model, a recipe or an output, whatever stands in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import plain_convert as convert

from sqa_convert import evaluate, load_recipe, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.convert import main as convert_main
from sqa_convert.cli.uptrain import main as uptrain_main
from sqa_convert.errors import CheckpointError, OutputError, RecipeError
from sqa_convert.report.report_json import read_report

NAMES = [f"a{character}b" for character in "[]*?{}~ :%#'\"\\\n\t\udcff"] + ["~x", "-", "ü→", "[red]", ":car:"]
RECIPE = "tokens: 512\nsequence_length: 32\nbatch_size: 8\nevaluations: 1\nheld_out_tokens: 256\n"


@pytest.fixture
def run(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)
    return called


@pytest.mark.parametrize("name", NAMES)
def test_as_model_recipe_and_output(run, tmp_path, name):
    place = tmp_path / "models"
    shutil.copytree(SAMPLES / "gpt2", place / name)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / name).write_text(RECIPE)
    flags = ["--q-groups", "6", "--kv-groups", "2", "--method", "mean", "--no-evaluate", "--no-verify"]
    code, said, err = run(convert_main, place / name, *flags, "-o", tmp_path / "outputs" / name)
    assert (code, err) == (0, ""), err
    assert "report:" in said
    assert os.listdir(tmp_path / "outputs") == [name]
    report = read_report(tmp_path / "outputs" / name)
    assert (report["source"]["name"], report["output"]) == (str(place / name), str(tmp_path / "outputs" / name))
    recipe = tmp_path / "recipes" / name
    code, said, err = run(uptrain_main, tmp_path / "outputs" / name, "--recipe", recipe, "--dry-run", "--json")
    if code in (2, 3):  # libraries that read the tokenizer want UTF-8
        assert "\udcff" in name and err.count("\n") == 1
    else:
        assert (code, json.loads(said)["recipe"]["sequence_length"]) == (0, 32), err
    assert load_recipe(str(recipe)).batch_size == 8


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_measured_and_trained(tmp_path, name):
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "models" / name)
    (tmp_path / "recipe").write_text(RECIPE)
    out = tmp_path / "outputs" / name
    convert(tmp_path / "models" / name, 6, 2, output=out)
    if "\udcff" in name:  # the library that reads weights wants UTF-8
        with pytest.raises(CheckpointError, match="not valid UTF-8"):
            evaluate(out, tmp_path / "models" / name, tokens=128)
        return
    assert evaluate(out, tmp_path / "models" / name, tokens=128)["model"]["kl"] > 0
    assert "uptrained" in uptrain(out, str(tmp_path / "recipe"))["quality"]
    assert os.listdir(tmp_path / "outputs") == [name]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "home" / "model")
    (tmp_path / "home" / "few.yaml").write_text(RECIPE)
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_everywhere(run, home):
    assert load_recipe("~/few.yaml").batch_size == 8
    convert("~/model", 6, 2, output="~/out")
    assert (home / "out" / "report.json").is_file()
    os.chdir(home.parent / "work")
    flags = ["--q-groups", "6", "--kv-groups", "2", "--method", "mean", "--no-evaluate", "--no-verify"]
    code, _, err = run(convert_main, "~/model", *flags, "-o", "~/two")
    assert code == 0 and (home / "two").is_dir(), err
    code, _, err = run(uptrain_main, "~/out", "--recipe", "~/few.yaml", "--dry-run")
    assert code == 0, err
    assert not Path("~").exists() and not (home.parent / "work" / "~").exists()


def test_a_user_that_is_not_there_is_named():
    for call in (lambda: convert("sample:gpt2", 6, 2, output="~nobody-of-this-name/x"), lambda: uptrain("~nobody-x/x")):
        with pytest.raises(OutputError, match="~nobody"):
            call()
    with pytest.raises(RecipeError, match="~nobody"):
        load_recipe("~nobody-of-this-name/x.yaml")


def test_a_working_directory_that_was_deleted_is_said(tmp_path, run):
    gone = tmp_path / "gone"
    gone.mkdir()
    before = os.getcwd()
    os.chdir(gone)
    gone.rmdir()
    try:
        with pytest.raises(OutputError, match="not there any more"):
            convert("sample:gpt2", 6, 2, output="out")
        code, said, err = run(convert_main, "sample:gpt2", "--variant", "sqa")
    finally:
        os.chdir(before)
    assert (code, said, err.count("\n")) == (2, "", 1) and "not there any more" in err


@pytest.mark.integration
def test_a_process_in_a_deleted_directory_says_so(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && {sys.executable} -P -m sqa_convert sample:gpt2 --variant sqa"
    result = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: the folder you are in is not there any more")
