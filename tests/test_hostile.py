"""Checkpoints that mean harm get one line and exit code 3: every one found, and the fuzzers' shortest runs.

What they cost is measured by benchmarks/hostile.py, in processes of their own.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import hostile
import pytest
import torch
from fuzzing import KINDS, Checkpoints, digest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqa_convert import convert
from sqa_convert.checkpoints.find import open_source, resolve
from sqa_convert.cli.convert import main
from sqa_convert.errors import CheckpointError, SQAError, one_line, shown
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_config
from sqa_convert.text.tokenizers import load_tokenizer

SECONDS = 20
"""after which a test is taken for endless"""
ADDRESS_SPACE = 3 * 2**30
SLOW = {
    "zip bomb",
    "index of 100,001 files",
    "tokenizer of 18 MB of words",
    "no end",
    "config of a megabyte of lists",
}  # some to make
WHOLE = {name: case for name, case in hostile.CATALOGUE.items() if case.base != "sample" and name not in SLOW}
TOKENIZERS = {name: case for name, case in hostile.CARRIED.items() if case.base == "sample" and name not in SLOW}


@pytest.fixture(autouse=True)
def guarded():
    """No test harms the machine, whatever is not refused."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, before[1]))

    def stop(*_):
        raise AssertionError(f"not done after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def below(place):
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@pytest.mark.parametrize("name", WHOLE)
def test_hostile_checkpoints_are_refused_in_one_line(name, place, monkeypatch, capsys):
    case = WHOLE[name]
    hostile.build(place, case.base)
    case.spoil(place)
    before = below(place)
    arguments = ["--q-groups", "8", "--kv-groups", "4", "--method", "mean", "--no-evaluate", "-o", "out"]
    monkeypatch.setattr(sys, "argv", ["sqa-convert", str(place / "source"), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code or 0) == case.full, err
    assert not (place / "canary").exists()
    if case.full == hostile.REFUSED:
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert len(err) < 2000 and err[:-1].isprintable()
        assert below(place) == before
    else:
        assert err == "" and {name for name in below(place) if not name.startswith("work/out")} == before
        written = [path.read_text(errors="replace") for path in Path("out").iterdir()]
        assert not any(word in text for text in written for word in (hostile.SECRET, "evil.Evil"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizers_are_refused_when_they_are_used(name, place):
    case = TOKENIZERS[name]
    source = hostile.build(place, case.base)
    case.spoil(place)
    if case.evaluated == hostile.DONE:
        assert len(load_tokenizer(source)) > 100
    elif case.evaluated == hostile.REFUSED:
        with pytest.raises(CheckpointError):
            prepare(source)
    assert not (place / "canary").exists()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_nothing_but_our_own_errors_comes_out(kind, seed, tmp_path_factory):
    checkpoints = sound(tmp_path_factory)
    digest(checkpoints.write(kind, checkpoints.mutated(kind, random.Random(seed))))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.dictionaries(
        st.sampled_from([*hostile.GPT2, "num_labels", "n_inner", "layer_norm_epsilon", "dtype", "activation_function"]),
        anything,
        min_size=1,
        max_size=3,
    )
)
def test_any_value_in_a_config_is_taken_or_refused(changes, tmp_path_factory):
    checkpoints = sound(tmp_path_factory)
    digest(checkpoints.write("config of gpt2", json.dumps(hostile.GPT2 | changes).encode()))


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.fixed_dictionaries(
        {}, optional={"dtype": anything, "shape": st.lists(st.integers()) | anything, "data_offsets": anything}
    ),
    name=st.sampled_from([hostile.FIRST, hostile.ATTENTION]) | st.text(max_size=10),
)
def test_any_entry_of_a_header_is_taken_or_refused(fields, name, tmp_path_factory):
    checkpoints = sound(tmp_path_factory)
    header = checkpoints.header | {name: checkpoints.header.get(name, {}) | fields}
    digest(checkpoints.write("header", json.dumps(header).encode()))


_made: list[Checkpoints] = []


def sound(tmp_path_factory):
    if not _made:
        _made.append(Checkpoints(tmp_path_factory.mktemp("sound")))
    return _made[0]


@pytest.mark.parametrize("name", ["config is a device", "tokenizer is a FIFO", "tokenizer is a link outside"])
def test_every_command_looks_at_a_folder_before_a_library_does(name, place):
    source = hostile.build(place, "gpt2")
    hostile.CATALOGUE[name].spoil(place)
    for use in (resolve, load_config, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"no regular file|not the model's own"):
            use(str(source))


def test_every_command_looks_into_a_pickle_before_a_library_does(place):
    source = hostile.build(place, "gpt2")
    hostile.CATALOGUE["two gigabytes by one call"].spoil(place)
    for use in (resolve, load_config):
        with pytest.raises(CheckpointError, match="bytearray"):
            use(str(source))


@pytest.mark.parametrize(
    ("shape", "dtype"), [(["2", 2], "F32"), (None, "F32"), ([-1], "F32"), ([2**62], "F32"), ([2], None), ([2], 5)]
)
def test_headers_that_the_hub_tells_are_not_believed(shape, dtype, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub

    from sqa_convert.checkpoints import find as checkpoint

    tensors = {"a": SimpleNamespace(shape=shape, dtype=dtype)}
    told = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: told)
    with pytest.raises(CheckpointError, match="a "):
        checkpoint._hub_headers("x/y", None)


def test_pickles_keep_their_ties_and_gradients_do_no_harm(place):
    hostile.build(place, "bin")
    one = torch.ones(3)
    hostile.save_bin(place, {"a": one, "b": one, "c": torch.nn.Parameter(torch.ones(2))})
    source = open_source(str(place / "source"))
    assert "a" in source.index and "b" not in source.index
    assert source.read("c").tolist() == [1, 1]


def test_a_tokenizer_that_fails_on_a_text_is_refused(place):
    from sqa_convert.text.blocks import token_blocks

    def failing(text, **_):
        raise RuntimeError("Missing [UNK]\ntoken")

    with pytest.raises(CheckpointError, match="does not take the text: Missing"):
        token_blocks(["a"], failing, 4)


def test_what_is_shown_is_short_and_steers_nothing():
    assert shown("gpt2") == "gpt2" and shown(["a"]) == "['a']"
    assert shown("\x1b[2J") == r"'\x1b[2J'"
    assert len(shown("x" * 10**6)) < 200
    assert one_line(ValueError("a\nb\x1b[2J")) == "a b?[2J"
    assert issubclass(CheckpointError, SQAError)


@pytest.mark.parametrize("layout", ["blobs of a cache", "snapshot of a cache", "a store of models"])
def test_a_folder_of_links_is_converted(layout, tmp_path):
    source = hostile.build(tmp_path, "sample")
    (source / "LICENSE").write_text("as you like")
    store = tmp_path / "elsewhere" / {"blobs of a cache": "models--a--b/blobs"}.get(layout, "gpt2")
    store.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        target = store / (f"{number:040x}" if "blobs" in layout else path.name)
        path.rename(target)
        if layout == "snapshot of a cache":  # links to links
            between = tmp_path / "snapshots" / path.name
            between.parent.mkdir(exist_ok=True)
            between.symlink_to(target)
            target = between
        path.symlink_to(target)
    out = convert(source, 8, 4, method="mean", output=tmp_path / "out", verify=False).output
    assert (out / "LICENSE").read_text() == "as you like" and not (out / "LICENSE").is_symlink()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_a_link_to_nothing_says_so(name, tmp_path):
    source = hostile.build(tmp_path, "sample")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "blobs" / ("0" * 40))
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*blobs/0+, where no file is; download"):
        convert(source, 8, 4, method="mean")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md"])
def test_a_link_to_what_is_not_the_models_own_says_the_way_out(name, tmp_path):
    source = hostile.build(tmp_path, "sample")
    hostile.link("../secret.txt", name)(source)
    if name == "README.md":  # no more than the licence and the like is read of it, and it is no reason to stop
        assert "what lies outside" not in json.dumps(convert(source, 8, 4, method="mean").report)
        return
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*secret.txt, .* put the file itself .*cp -rL"):
        convert(source, 8, 4, method="mean")
