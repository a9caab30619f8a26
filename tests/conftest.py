import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from sqa_convert import flags_as_arguments


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs one process a core


@pytest.fixture(autouse=True, scope="session")
def brief():
    """What models write for people to read: a few words will do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqa_convert.evaluation.generation.WRITTEN", 8)
        patch.setattr("sqa_convert.text.own_loss._OWN_LENGTH", 16)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_flags_in_python():
    """No error that a test gets from a public function names a flag, but in what the user or a library has written."""
    spelled = flags_as_arguments.in_arguments

    def looked_at(message, function, given, foreign=()):
        said = spelled(message, function, given, foreign)
        assert (
            not re.search(r"(?<![\w/-])--[a-z]", said)
            or foreign
            or any("--" in text for text in flags_as_arguments._texts(given))
        ), said
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags_as_arguments, "in_arguments", looked_at)
        yield


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Drawing takes a third of a short uptraining, so only the tests that look at pictures draw them."""
    if request.module.__name__ not in ("test_page", "test_calibrate", "test_speed"):
        monkeypatch.setattr("sqa_convert.report.pictures.rendered", lambda figure, kind: BLANK[kind])


BLANK = {"svg": b"<svg><path/></svg>", "page": b"<svg><path/></svg>", "png": b"\x89PNG"}


@pytest.fixture
def called(monkeypatch, capsys):
    """Runs a command's entry point with arguments; returns exit code, stdout, stderr."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return call


def pytest_configure():
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
