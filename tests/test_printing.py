"""Printing never changes the exit code of finished work, whatever takes what is printed."""

import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import plain_convert as convert

from sqa_convert.cli.console import Out, run_app, visible
from sqa_convert.cli.streams import NARROWEST, ForgivingStream

ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]
HEADS = ["--q-groups", "6", "--kv-groups", "2", "--method", "mean"]
CONVERT = ["sample:gpt2", *HEADS, "--no-evaluate"]
BENCH = ["sample:gpt2", "--lengths", "8", "--repeats", "1", "--parts", "model", "--modes", "prefill"]
RECIPE = "tokens: 512\nsequence_length: 32\nbatch_size: 8\nevaluations: 1\nheld_out_tokens: 256\n"
OUTPUTS = {
    "convert --help": ("convert", ["--help"]),
    "convert": ("convert", CONVERT),
    "convert --dry-run": ("convert", [*CONVERT, "--dry-run", "--verbose"]),
    "convert --list-methods": ("convert", ["--list-methods"]),
    "convert, an error": ("convert", ["sample:→"]),
    "uptrain --help": ("uptrain", ["--help"]),
    "uptrain --list-recipes": ("uptrain", ["--list-recipes"]),
    "uptrain --dry-run": ("uptrain", ["OUT", "--dry-run"]),
    "eval --help": ("evaluate", ["--help"]),
    "eval": ("evaluate", ["sample:gpt2", "--tokens", "64", "--samples", "1"]),
    "bench --help": ("bench", ["--help"]),
    "bench": ("bench", BENCH),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert("sample:gpt2", 6, 2, output=tmp_path_factory.mktemp("converted") / "out").output


@pytest.fixture
def run(monkeypatch, tmp_path, converted):
    """Runs a command with these streams in the place of stdout and stderr; returns its exit code."""

    def run(module, arguments, stdout, stderr):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module, *(a.replace("OUT", str(converted)) for a in arguments)])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            importlib.import_module(f"sqa_convert.cli.{module}").main()
        return stop.value.code

    return run


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def text_of(stream):
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_fits_every_encoding(run, output, encoding):
    out, err = stream(encoding), stream(encoding)
    code = run(*OUTPUTS[output], out, err)
    assert code == (3 if "error" in output else 0), text_of(err)
    said = text_of(err) if "error" in output else text_of(out)
    assert len(said) > 20 and "Traceback" not in text_of(err)
    if output == "convert":
        assert ("sample:gpt2 → gpt2" if encoding == "utf-8" else "sample:gpt2 -> gpt2") in said


@pytest.mark.integration
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("flags", [["--control"], ["--json"]])
def test_a_trained_model_is_told_of_in_every_encoding(run, encoding, flags, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "trained")
    (tmp_path / "few.yaml").write_text(RECIPE)
    out, err = stream(encoding), stream(encoding)
    assert run("uptrain", ["trained", "--recipe", "few.yaml", *flags], out, err) == 0, text_of(err)
    assert "uptrained" in text_of(out)


class Failing(io.StringIO):
    """A stream that takes so many writes and then no more."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.after = error, after

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.after < 0:
            raise self.error


FAULTS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "nobody reads": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "failing": OSError(errno.EIO, "Input/output error"),
    "would block": BlockingIOError(errno.EAGAIN, "write could not complete without blocking"),
    "closed": ValueError("I/O operation on closed file"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after", [0, 3])
def test_a_stdout_that_fails_leaves_the_exit_code(run, fault, after, tmp_path):
    err = io.StringIO()
    assert run("convert", ["sample:gpt2", *HEADS, "--no-evaluate"], Failing(FAULTS[fault], after), err) == 0
    assert (tmp_path / "gpt2-sqa-q6kv2" / "report.json").is_file()
    told = "" if fault == "nobody reads" else f"the rest cannot be printed: {FAULTS[fault]}\n"
    assert err.getvalue() == told
    assert sys.stdout is not None and not isinstance(sys.stdout, ForgivingStream)


@pytest.mark.parametrize("stderr", [Failing(FAULTS["full"]), None], ids=["full", "closed"])
def test_an_error_that_cannot_be_told_keeps_its_exit_code(run, stderr):
    assert run("convert", ["nowhere", *HEADS], io.StringIO(), stderr) == 3


def test_without_stdout_the_work_is_done(run, tmp_path):
    assert run("convert", CONVERT, None, None) == 0
    assert (tmp_path / "gpt2-sqa-q6kv2").is_dir()


SIZES = [{"COLUMNS": "0"}, {"COLUMNS": "1"}, {"COLUMNS": "²"}, {"LINES": "0", "COLUMNS": "0"}]


@pytest.mark.parametrize(
    ("output", "sizes"), [("convert --help", SIZES[0]), ("eval", SIZES[0]), *(("convert", sizes) for sizes in SIZES)]
)
def test_a_terminal_of_no_width_is_not_believed(run, output, sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setenv(name, value)
    out = stream("utf-8")
    assert run(*OUTPUTS[output], out, io.StringIO()) == 0
    words = {"convert": "key/value heads", "convert --help": "--kv-groups", "eval": "perplexity"}
    assert words[output] in text_of(out)
    assert all(os.environ[name] == value for name, value in sizes.items())


def test_a_narrow_terminal_is_kept_to(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(NARROWEST))
    out = stream("utf-8")
    assert run("convert", ["--help"], out, io.StringIO()) == 0
    assert max(map(len, text_of(out).splitlines())) <= NARROWEST


def test_what_would_be_markup_an_emoji_or_an_escape_sequence_is_text(capsys):
    out = Out(as_json=False, quiet=False, verbose=False)
    out.table("[red]:car:\x1b[31m", ["[b]"], [("a:warning:b\\[",), ("\udcff",)])
    out.result(":car: [link] \x1b]0;title\x07 \udcff")
    said = capsys.readouterr().out
    for shown in ("[red]:car:?[31m", "[b]", "a:warning:b\\[", ":car: [link] ?]0;title? ?"):
        assert shown in said
    assert visible("a\n\tb\x00") == "a\n\tb?"


def test_json_holds_no_number_that_is_not_finite(capsys):
    Out(as_json=True, quiet=False, verbose=False).json({"a": [1.5, float("nan")], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": {"c": None}}


def test_a_python_without_docstrings_is_told_since_transformers_fails_there(monkeypatch, capsys):
    def app(**options):
        raise ValueError("no docstring")

    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(SystemExit) as ended:
        run_app(app, "sqa-convert")
    assert ended.value.code == 2 and "unset PYTHONOPTIMIZE" in capsys.readouterr().err


SHELLS = {
    "full": "{command} >/dev/full",
    "both full": "{command} >/dev/full 2>&1",
    "closed": "{command} >&-",
    "all closed": "{command} >&- 2>&- <&-",
    "nobody reads": "{{ {command}; echo $? >code; }} | true; exit $(cat code)",
    "no locale": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {command}",
}


@pytest.mark.integration
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("arguments", [CONVERT, ["--help"]], ids=lambda a: a[0])
def test_processes_end_well_wherever_they_print(shell, arguments, tmp_path):
    command = " ".join([sys.executable, "-m", "sqa_convert", *arguments])
    result = subprocess.run(["sh", "-c", SHELLS[shell].format(command=command)], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr
