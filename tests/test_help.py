"""Help: what a first user needs comes first, its examples run, and usual names of flags are understood."""

import re
import shlex

import pytest

from sqa_convert.cli import bench, convert, evaluate, report, sweep, uptrain

COMMANDS = {
    "sqa-convert": convert,
    "sqa-uptrain": uptrain,
    "sqa-eval": evaluate,
    "sqa-bench": bench,
    "sqa-sweep": sweep,
    "sqa-report": report,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_three_panels_of_what_is_needed_first_and_help_all_is_all(name, called):
    module = COMMANDS[name]
    code, brief, _ = called(module.main, "--help")
    _, everything, _ = called(module.main, "--help-all")
    assert code == 0
    assert len(re.findall("^╭─", brief, re.MULTILINE)) <= 3 < len(set(re.findall("--[a-z-]+", everything)))
    assert "<bool>" not in brief + everything and "--install-completion" not in brief
    rare, first = "--overwrite" if module is report else "--trust-remote-code", f"--{module.FIRST[0]}".replace("_", "-")
    assert first in brief and rare not in brief and rare in everything
    assert called(module.main, "--help")[1] == brief  # not changed by what was shown before


def test_help_says_that_numbers_of_heads_are_means(called):
    words = called(convert.main, "--help")[1].replace("│", " ").split()
    assert "Query heads that a layer keeps, on average." in " ".join(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bare_command_shows_its_help(name, called):
    code, out, err = called(COMMANDS[name].main)
    assert (code, out) == (2, "") and "Usage:" in err and "Examples" in err


@pytest.mark.parametrize(
    ("name", "flags", "here"),
    [
        ("sqa-convert", ["gpt2", "--q-heads", "8"], "No such option: --q-heads, here it is --q-groups."),
        ("sqa-convert", ["gpt2", "--num-kv-heads=4"], "here it is --kv-groups"),
        ("sqa-uptrain", ["x", "--lr", "1e-3"], "here it is --learning-rate"),
        ("sqa-eval", ["x", "--lr", "1e-3"], "No such option: --lr"),
        ("sqa-bench", ["x", "--seq-len", "8"], "here it is --lengths"),
    ],
)
def test_names_that_other_programs_use_are_told_what_they_are_here(name, flags, here, called):
    code, out, err = called(COMMANDS[name].main, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1) and here in err


def test_every_usual_name_is_for_a_flag_that_is_there():
    from test_public import FLAGS

    from sqa_convert.cli.brief_help import _USUAL

    assert set(_USUAL) <= {flag for flags in FLAGS.values() for flag in flags.split()}


def test_a_model_that_nobody_converted_is_to_be_converted_first(called):
    code, _, err = called(uptrain.main, "sample:gpt2")
    assert code == 3 and "convert it first (sqa-convert sample:gpt2 --q-groups N --kv-groups M)" in err


def test_all_heads_kept_is_told(called, tmp_path):
    code, out, _ = called(convert.main, "sample:gpt2", "--q-groups", 12, "--kv-groups", 12, "--dry-run")
    assert code == 0 and "every head was kept" in out


@pytest.mark.integration
def test_examples_run_in_their_order(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in COMMANDS.values():
        for example in module.EXAMPLES:
            name, *arguments = shlex.split(example)
            code, _, err = called(COMMANDS[name].main, *arguments)
            assert code == 0, (example, err)
