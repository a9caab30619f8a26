"""Conversions that are stopped while they calibrate, and go on."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
from helpers import gpt2, t5
from test_given_data import LENGTH, ROWS, drawn_tokens

from sqa_convert import METHODS, Calibration, convert
from sqa_convert.calibration import kept_for_resume, memory_budget
from sqa_convert.checkpoints.staging import hold
from sqa_convert.cli import convert as command
from sqa_convert.errors import InterruptedByUserError, OutputError, QualityError, RecipeError
from sqa_convert.pipeline import go_on_with_calibration
from sqa_convert.report.report_json import read_report

MOMENTS = 10
SHORT = {"tokens": 1_000, "refine_steps": 2, "polish_steps": 2, "length": 16}


class Told:
    """A Progress that keeps what it is told, and interrupts the work when that is so much, or is of a stage."""

    def __init__(self, calls=-1, stage="", error=KeyboardInterrupt):
        self.calls, self.stage, self.error, self.stages = calls, stage, error, []

    def __call__(self, stage, done, total, news=""):
        self.stages.append(stage)
        if len(self.stages) == self.calls or stage == self.stage:
            raise self.error


def bits(folder):
    """The weights of an output, and its report without what tells of the run."""
    of_the_run = ("seconds", "stages", "date", "command", "output")
    report = {key: value for key, value in read_report(folder).items() if key not in of_the_run}
    del report["calibration"]["memory"]
    told = json.dumps(report, sort_keys=True).replace(str(folder), "OUT").replace(f" {folder.name} ", " OUT ")
    return (folder / "model.safetensors").read_bytes(), told


def run(source, output, progress, resume=False, **options):
    given = {"calibration": Calibration(**SHORT), "seed": 3, "progress": progress, "verify": False} | options
    return convert(source, 2, 1, output=output, resume=resume, **given)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: gpt2(heads=4, n_positions=32), {}),
        (lambda: gpt2(heads=4, n_positions=32), {"allocation": "adaptive"}),
        (lambda: t5(heads=4, layers=2), {}),
    ],
    ids=["gpt2", "adaptive", "t5"],
)
def test_a_run_interrupted_again_and_again_ends_bit_for_bit_where_an_uninterrupted_one_does(model, options, tmp_path):
    source, whole = model(), Told()
    run(source, tmp_path / "one", whole, **options)
    calls, step = [], len(whole.stages) // 5
    for attempt in range(6):
        told = Told((attempt + 1) * step)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # it goes on with what there is
                run(source, tmp_path / "two", told, resume=attempt > 0, **options)
            break
        except InterruptedByUserError as error:
            assert "repeat the command with resume" in str(error)
        assert sorted(os.listdir(tmp_path)) == [".two.calibration", "one"]
        calls.append(len(told.stages))
    assert calls and "sample text" not in told.stages
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def interrupted(source, output, **options):
    with pytest.raises(InterruptedByUserError):
        run(source, output, Told(stage="polish"), **options)


@pytest.fixture
def source():
    return gpt2(heads=4, n_positions=32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, "seed 3, now 4"),
        ({"calibration": Calibration(**SHORT | {"refine_steps": 3})}, "refine steps 2, now 3"),
    ],
)
def test_what_was_left_of_other_work_is_not_used_and_a_line_says_why(source, change, says, tmp_path):
    interrupted(source, tmp_path / "out")
    told = Told()
    with pytest.warns(UserWarning, match=f"had other settings: {says}; calibration begins anew"):
        run(source, tmp_path / "out", told, resume=True, **change)
    assert "sample text" in told.stages
    assert os.listdir(tmp_path) == ["out"]


def test_a_warning_names_arguments_and_points_at_the_callers_line(source, tmp_path):
    few = Calibration(tokens=600, refine_steps=0, polish_steps=0, length=16)
    with pytest.warns(UserWarning, match=f"^resume=True: no run to {tmp_path / 'out'} was stopped") as told:
        convert(source, 2, 1, output=tmp_path / "out", resume=True, calibration=few, verify=False)
    assert [warning.filename for warning in told] == [__file__]


def test_memory_that_is_too_little_by_now_for_float32_is_told(source, tmp_path, monkeypatch):
    source.save_pretrained(tmp_path / "source")
    interrupted(tmp_path / "source", tmp_path / "out", device="cpu")
    found, told = memory_budget.memory_budget, Told()
    monkeypatch.setattr(memory_budget, "memory_budget", lambda *given: dataclasses.replace(found(*given), lean=True))
    with pytest.warns(UserWarning, match="other settings: source in float32, now bfloat16; calibration begins anew"):
        run(tmp_path / "source", tmp_path / "out", told, resume=True, device="cpu")
    assert "sample text" in told.stages and sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_other_weights_are_told(source, tmp_path):
    interrupted(source, tmp_path / "out")
    with pytest.warns(UserWarning, match="another source weights"):
        run(gpt2(heads=4, n_positions=32), tmp_path / "out", Told(), resume=True)


def test_without_resume_what_was_left_is_thrown_away(source, tmp_path):
    interrupted(source, tmp_path / "out")
    told = Told()
    run(source, tmp_path / "out", told)
    assert "sample text" in told.stages and os.listdir(tmp_path) == ["out"]


def test_text_that_others_wrote_is_read_again(source, tmp_path):
    rows = drawn_tokens(ROWS, LENGTH)
    settings = {name: value for name, value in SHORT.items() if name != "length"} | {"tokens": 600}
    text = [Calibration(given, **settings) for given in (rows, [row[::-1] for row in rows])]
    run(source, tmp_path / "one", Told(), calibration=text[1])
    interrupted(source, tmp_path / "two", calibration=text[0])
    run(source, tmp_path / "two", Told(), resume=True, calibration=text[1])
    assert bits(tmp_path / "one") == bits(tmp_path / "two")


def test_damaged_parts_are_made_again(source, tmp_path):
    run(source, tmp_path / "one", Told())
    interrupted(source, tmp_path / "two")
    for number, part in enumerate(sorted((tmp_path / ".two.calibration").glob("*.safetensors"))):
        content = bytearray(part.read_bytes())
        content[-1 if number % 2 else 3] ^= 1
        part.write_bytes(content)
    run(source, tmp_path / "two", Told(), resume=True)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")


def test_what_would_fail_again_leaves_nothing(source, tmp_path):
    with pytest.raises(QualityError, match=r"^$"):
        run(source, tmp_path / "out", Told(stage="polish", error=QualityError()))
    assert os.listdir(tmp_path) == []


def test_an_error_after_calibration_leaves_what_was_calibrated(source, tmp_path):
    run(source, tmp_path / "one", Told())
    with pytest.raises(QualityError, match=r"^not finite; calibration is kept: with resume=True it is not done again"):
        run(source, tmp_path / "two", Told(stage="convert", error=QualityError("not finite")))
    told = Told()
    run(source, tmp_path / "two", told, resume=True)
    assert not {"sample text", "sensitivity", "polish"} & {*told.stages}
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_where_the_disk_gets_full_what_was_kept_before_stays(source, tmp_path, monkeypatch):
    kept = []

    def save(*given, save=kept_for_resume.save_file):
        kept.append(given)
        if len(kept) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*given)

    monkeypatch.setattr(kept_for_resume, "save_file", save)
    interrupted(source, tmp_path / "out")
    assert len(list((tmp_path / ".out.calibration").glob("*.safetensors"))) == 3
    told = Told()
    run(source, tmp_path / "out", told, resume=True)
    assert "sample text" not in told.stages and os.listdir(tmp_path) == ["out"]


def test_parts_go_when_the_output_is_there_and_no_other_run_has_them_before(source, tmp_path, monkeypatch):
    seen = []

    def forget(folder, forget=go_on_with_calibration._forget):
        with pytest.raises(BlockingIOError):
            hold(folder)
        seen.append((tmp_path / "out" / "model.safetensors").exists())
        forget(folder)

    monkeypatch.setattr(go_on_with_calibration, "_forget", forget)
    run(source, tmp_path / "out", Told())
    assert seen == [True] and os.listdir(tmp_path) == ["out"]


def test_parts_that_another_run_has_are_left_alone(source, tmp_path):
    interrupted(source, tmp_path / "out")
    lock = hold(tmp_path / ".out.calibration")
    with pytest.raises(OutputError, match=r"another run is writing it$"):
        run(source, tmp_path / "out", Told())
    os.close(lock)
    assert (tmp_path / ".out.calibration" / "text.safetensors").exists()


def test_with_a_function_of_ones_own_nothing_is_kept(source, tmp_path):
    """It may be another the next time, under the same name."""

    def mine(heads, partition, statistics):
        return METHODS["first"].convert(heads, partition, statistics)

    how = {"method": mine, "calibration": Calibration(**SHORT, refit=True)}
    with (
        pytest.warns(UserWarning, match="^resume=True: mine is a method of your own, .* with it nothing is kept"),
        pytest.raises(KeyboardInterrupt, match=r"^$"),
    ):
        run(source, tmp_path / "out", Told(stage="polish"), resume=True, **how)
    with pytest.raises(QualityError, match=r"^no$"):
        run(source, tmp_path / "out", Told(stage="convert", error=QualityError("no")), **how)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_others_is_left_alone(source, tmp_path):
    (tmp_path / ".out.calibration").mkdir()
    (tmp_path / ".out.calibration" / "mine").touch()
    run(source, tmp_path / "out", Told())
    assert os.listdir(tmp_path / ".out.calibration") == ["mine"]


def test_nothing_to_go_on_with_is_said(source, tmp_path, called):
    with pytest.raises(RecipeError, match="resume=True goes on beside an output folder"):
        run(source, None, Told(), resume=True)
    with pytest.raises(RecipeError, match="this conversion has none"):
        run(source, tmp_path / "out", Told(), resume=True, calibration=None)
    source.save_pretrained(tmp_path / "source")
    flags = ("--q-groups", 2, "--kv-groups", 1, "-o", tmp_path / "out", "--resume", "--no-evaluate", "--no-verify")
    short = ("--calibration-tokens", 600, "--refine-steps", 1, "--polish-steps", 0, "--calibration-length", 16)
    code, _, err = called(command.main, tmp_path / "source", *flags, *short)
    assert code == 0 and f"--resume: no run to {tmp_path / 'out'} was stopped" in " ".join(err.split())


@pytest.mark.integration
def test_a_run_killed_at_random_moments_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path):
    """Killed outright, ten times, wherever it is."""
    gpt2(heads=8, head_dim=16, layers=4, n_positions=128, vocab_size=1_000).save_pretrained(tmp_path / "source")
    tokens = ("--calibration-tokens", "12k", "--refine-steps", "20", "--polish-steps", "20", "--no-evaluate", "--quiet")
    base = [sys.executable, "-m", "sqa_convert.cli.convert", "source", "--q-groups", "4", "--kv-groups", "2", *tokens]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output, *flags):
        return subprocess.Popen([*base, "-o", output, *flags], cwd=tmp_path, env=environment, start_new_session=True)

    begun = time.monotonic()
    assert start("one").wait(240) == 0
    lasted = time.monotonic() - begun
    draw, left, killed = random.Random(0), set(), 0
    while killed < MOMENTS:
        process = start("two", "--resume")
        try:
            process.wait(draw.uniform(0.2, 0.5) * lasted)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            left |= {path.name.split("-")[0] for path in tmp_path.glob(".two.calibration/*.safetensors")}
        else:
            assert process.returncode == 0
            assert sorted(os.listdir(tmp_path)) == ["one", "source", "two"]
        if (tmp_path / "two").exists():  # the work was over
            assert bits(tmp_path / "one") == bits(tmp_path / "two")
            shutil.rmtree(tmp_path / "two")
    assert start("two", "--resume").wait(240) == 0
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "source", "two"]
    assert len(left) > 3  # stages that something was kept of
