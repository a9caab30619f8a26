"""What is told of work while it goes on: the plan, the stages, their seconds."""

import io
import json
import time
from pathlib import Path

import pytest
from helpers import gpt2, plain_convert
from rich.console import Console
from test_given_data import LENGTH, ROWS, drawn_tokens

from sqa_convert import Calibration, convert
from sqa_convert.cli.convert import main
from sqa_convert.cli.stage_display import clock, showing
from sqa_convert.progress import Stages, step_done, told_within

LONGEST_SILENCE = 5.0  # seconds


class Recorder:
    """A Progress that keeps the plan and the order of the stages."""

    def __init__(self):
        self.planned, self.entered, self.last, self.longest = None, [], time.perf_counter(), 0.0

    def plan(self, stages):
        self.planned = stages

    def __call__(self, stage, done, total, news=""):
        assert 0 <= done <= total
        self.within(0)
        if stage not in self.entered:
            self.entered.append(stage)

    def within(self, share):
        assert 0 <= share < 1
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now


def on_a_terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_stages_come_as_they_were_planned_and_the_report_has_their_seconds(method):
    told, how = Recorder(), Calibration(drawn_tokens(ROWS, LENGTH), tokens=600, refine_steps=1)
    report = convert(gpt2(heads=4, n_positions=32), 2, 1, method, calibration=how, progress=told).report
    assert told.planned == told.entered
    assert [stage["name"] for stage in report["stages"]] == told.entered
    assert 0 < sum(stage["seconds"] for stage in report["stages"]) <= report["seconds"]["convert"] + 0.1


@pytest.mark.integration
def test_a_sample_is_converted_without_a_long_silence(tmp_path):
    told = Recorder()
    convert("sample:gpt2", 8, 4, output=tmp_path / "out", evaluate=True, progress=told)
    assert told.longest < LONGEST_SILENCE
    assert set(told.entered) - {"sample text"} == set(told.planned) - {"sample text"}


@pytest.mark.integration
def test_a_log_has_the_plan_and_a_line_for_each_stage(called, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = called(main, "sample:gpt2", "--variant", "gqa", "--method", "mean")
    assert code == 0
    lines = err.splitlines()
    assert lines[0] == "sample:gpt2 → gpt2-sqa-q12kv3, 12 heads become 12 query and 3 key/value heads, method mean"
    stages = json.loads(Path("gpt2-sqa-q12kv3/report.json").read_text())["stages"]
    assert lines[1] == f"{len(stages)} stages: {', '.join(stage['name'] for stage in stages)}"
    assert [line.rpartition(": ")[0] for line in lines[2:]] == [
        f"{number}/{len(stages)} {stage['name']}" for number, stage in enumerate(stages, 1)
    ]


def test_a_plan_of_one_stage_needs_no_words(called, tmp_path):
    code, _, err = called(
        main, "sample:gpt2", "--variant", "gqa", "--method", "mean", "--no-evaluate", "-o", tmp_path / "o"
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_stage_bar_clock_and_memory_in_one_line(width):
    console = on_a_terminal(width)
    with showing(console, "a → b", quiet=False) as progress:
        stages = Stages(progress, ["sample text", "measure sensitivity"])
        stages("sample text", 0, 4)
        stages("measure sensitivity", 1, 4, "loss 1.2345")
        with told_within(stages):
            step_done(0.5)
        before = console.file.tell()
        progress.refresh()
    shown = console.file.getvalue()
    live = next(line for line in shown[before:].splitlines() if "2/2 measure sensitivity" in line)
    assert "37%" in live or "38%" in live
    assert " s" in live and "GB" in live and "loss 1.2345" in shown
    assert shown.index("a → b") < shown.index("1/2 sample text: ") < shown.index("2/2 measure sensitivity: ")


def test_until_the_first_stage_a_terminal_shows_that_it_starts():
    console = on_a_terminal()
    with showing(console, "a → b", quiet=False) as progress:
        progress.refresh()
        early = console.file.getvalue()
        Stages(progress, ["x", "y"])("x", 0, 1)
        before = console.file.tell()
        progress.refresh()
    assert "starting" in early and "starting" not in console.file.getvalue()[before:]


def test_quiet_shows_nothing():
    console = on_a_terminal()
    with showing(console, "a → b", quiet=True) as progress:
        Stages(progress, ["x", "y"])("x", 0, 1, "news")
    assert console.file.getvalue() == ""


def test_a_stage_that_nobody_planned_is_counted_in():
    console = Console(file=io.StringIO(), width=80)
    with showing(console, "", quiet=False) as progress:
        stages = Stages(progress, ["first", "last"])
        for name in ("first", "between", "last"):
            stages(name, 0, 1)
    assert [line.partition(":")[0] for line in console.file.getvalue().splitlines()[1:]] == [
        "1/2 first", "2/3 between", "3/3 last",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), [(7.44, "7.4 s"), (185.2, "3 min 5 s"), (8040, "2 h 14 min")])
def test_seconds_are_written_for_people(seconds, said):
    assert clock(seconds) == said


def test_nothing_of_other_libraries_is_printed_from_python(tmp_path, capfd):
    converted = plain_convert("sample:gpt2", 6, 2, output=tmp_path / "out")
    recipe = tmp_path / "few.yaml"
    recipe.write_text("tokens: 512\nsequence_length: 32\nbatch_size: 8\nevaluations: 1\nheld_out_tokens: 256\n")
    converted.uptrain(recipe=recipe)
    out, err = capfd.readouterr()
    assert out + err == ""
