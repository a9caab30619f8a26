"""Runs that are stopped from outside."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import as_from_a_terminal
from helpers import plain_convert as convert
from safetensors.torch import load_file

from sqa_convert import uptrain
from sqa_convert.checkpoints.small_files import write_json
from sqa_convert.errors import InterruptedByUserError, RecipeError
from sqa_convert.report.report_json import read_report
from sqa_convert.uptraining.run_folder import conversion_id
from sqa_convert.uptraining.trainer import UptrainingTrainer

UPTRAIN = [sys.executable, "-m", "sqa_convert.cli.uptrain"]
RECIPE = (
    "tokens: 2_048\nsequence_length: 32\nbatch_size: 4\nlearning_rate: 1.0e-3\nevaluations: 4\nheld_out_tokens: 2_048\n"
)


@pytest.fixture
def folders(tmp_path):
    """Two copies of a converted model, and a recipe of 16 steps."""

    def make(name):
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        convert(f"sample:{name}", 6, 2, output=tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        return tmp_path / "one", tmp_path / "two"

    return make


def start(folder, *flags, **options):
    command = [*UPTRAIN, folder, *flags, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder.parent, env=environment, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return err


def wait_for(pattern, folder, process):
    end = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.integration
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_does(folders):
    one, two = folders("t5")
    uptrain(one, str(one.parent / "recipe.yaml"), device="cpu")
    killed = start(two, "--recipe", "recipe.yaml", "--quiet")
    wait_for("two.uptraining/uptrain/checkpoint-4/complete", two.parent, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = weights(two)
    assert read_report(two).get("uptraining") is None
    finish(start(two, "--resume", "--quiet"))
    expected, found = weights(one), weights(two)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(before[name], found[name]) for name in found)
    curves = [[{**point} for point in read_report(folder)["uptraining"]["curve"]] for folder in (one, two)]
    assert curves[0] == curves[1]
    assert sorted(p.name for p in two.parent.iterdir()) == ["one", "recipe.yaml", "two"]


def test_ctrl_c_saves_and_says_how_to_go_on(folders):
    one, _ = folders("gpt2")
    many = one.parent / "many.yaml"
    many.write_text(
        RECIPE.replace("2_048\nsequence", "512_000\nsequence").replace("evaluations: 4", "evaluations: 1000")
    )
    process = start(one, "--recipe", many, "--no-evaluate", preexec_fn=as_from_a_terminal)
    wait_for("one.uptraining/uptrain/checkpoint-8/complete", one.parent, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    found = re.fullmatch(
        r"error: interrupted; \S+ is still the converted model; "
        r"go on from step (\d+) of uptrain with: sqa-uptrain \S+ --resume",
        err.strip().splitlines()[-1],
    )
    assert found is not None, err
    assert int(found[1]) >= 8
    assert (one.parent / f"one.uptraining/uptrain/checkpoint-{found[1]}/complete").is_file()


def test_a_run_is_not_resumed_on_another_conversion(folders):
    one, _ = folders("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UptrainingTrainer, "save_model", interrupt_second_time())
        with pytest.raises(InterruptedByUserError, match="go on from step 4 of uptrain"):
            uptrain(one, str(one.parent / "recipe.yaml"), device="cpu", evaluate=False)
    with pytest.raises(RecipeError, match="leave out"):
        uptrain(one, "quick", resume=True)
    with pytest.raises(RecipeError, match="leave out"):
        uptrain(one, resume=True, restart=True)
    begun = conversion_id(one)
    write_json(one / "report.json", read_report(one) | {"speed": {"schema": 1}})  # as sqa-bench does
    assert conversion_id(one) == begun
    convert("sample:gpt2", 4, 2, output=one, overwrite=True)
    with pytest.raises(RecipeError, match="converted anew"):
        uptrain(one, resume=True)


def interrupt_second_time():
    save, calls = UptrainingTrainer.save_model, []

    def save_or_stop(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(self, *arguments, **options)

    return save_or_stop


@pytest.mark.integration
def test_a_control_that_was_stopped_goes_on_and_the_finished_training_is_not_done_again(folders):
    one, _ = folders("gpt2")
    train, calls = UptrainingTrainer.train, []

    def second_is_stopped(self, **options):
        calls.append(self.ce)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UptrainingTrainer, "train", second_is_stopped)
        with pytest.raises(InterruptedByUserError, match="step 16 of uptrain"):
            uptrain(one, str(one.parent / "recipe.yaml"), device="cpu", control=True)
        report = uptrain(one, resume=True, device="cpu")
    assert calls == [0.0, 1.0, 1.0]
    assert report["quality"]["control"]["kl"] > 0
    assert len(report["uptraining"]["curve"]) == 5 and report["uptraining"]["seconds"] > 0
