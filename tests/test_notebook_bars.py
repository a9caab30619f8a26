"""What a notebook shows of work that takes a while: bars of ours, and none of others."""

import sys

import pytest
from helpers import gpt2
from test_given_data import LENGTH, ROWS, drawn_tokens
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sqa_convert import Calibration, convert
from sqa_convert.progress import in_notebooks


def test_bars_are_shown_in_a_notebook_and_nowhere_else(monkeypatch, capsys):
    source, how = gpt2(heads=4, n_positions=32), Calibration(drawn_tokens(ROWS, LENGTH), tokens=600, refine_steps=1)
    convert(source, 2, 1, "svd", calibration=how)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    convert(source, 2, 1, "svd", calibration=how)
    shown = capsys.readouterr().err
    assert "fit heads: 100%" in shown and "Loading weights" not in shown


@pytest.mark.integration
def test_no_bar_of_transformers_is_shown_where_models_are_written(tmp_path, capsys):
    source = gpt2(heads=4, n_positions=32)
    source.save_pretrained(tmp_path / "source")
    how = {"tokens": 256, "sequence_length": 16, "batch_size": 8, "held_out_tokens": 128, "evaluations": 1}
    enable_progress_bar()
    try:
        conversion = convert(tmp_path / "source", 2, 1, "mean", tmp_path / "out")
        conversion.uptrain(drawn_tokens(ROWS, LENGTH), keep_anyway=True, evaluate=False, **how)
        conversion.save_pretrained(tmp_path / "saved")
        assert "%|" not in capsys.readouterr().err
        source.save_pretrained(tmp_path / "source")
        assert "%|" in capsys.readouterr().err  # there is something to be silent about
    finally:
        disable_progress_bar()


def test_a_stage_that_begins_again_has_a_bar_of_its_own(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    for done in (1, 0, 2):
        in_notebooks("read", done, 2, "half" if done == 1 else "")
    shown = capsys.readouterr().err
    assert "half" in shown and shown.count("read: 100%") == 1
