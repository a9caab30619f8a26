"""Kills, sources that change, runs side by side, clocks that are set: what benchmarks/faults.py found, one by one."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import gpt2
from helpers import plain_convert as convert
from safetensors import SafetensorError
from test_uptraining import FEW

from sqa_convert import uptrain
from sqa_convert.checkpoints import staging as output
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.checkpoints.small_files import write_json
from sqa_convert.checkpoints.staging import hold, staged_output
from sqa_convert.conversion import write as writing
from sqa_convert.errors import CheckpointError, InterruptedByUserError, OutputError
from sqa_convert.report.report_json import read_report
from sqa_convert.uptraining import put_in_place, train_and_control
from sqa_convert.uptraining import uptrain as uptraining
from sqa_convert.uptraining.run_folder import run_folder
from sqa_convert.uptraining.trainer import UptrainingTrainer


def write(folder, text):
    (folder / "weights").write_text(text)
    (folder / "report.json").write_text('{"schema": 1, "sqa_convert": "0"}')


def put(out, text, **options):
    with staged_output(out, **options) as folder:
        write(folder, text)


def killed(work):
    """Does this in another process, which is killed in it."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_goes_with_the_next(tmp_path):
    out = tmp_path / "out"

    def half():
        with staged_output(out) as folder:
            write(folder, "half")
            die()

    killed(half)
    assert len(os.listdir(tmp_path)) == 1 and not out.exists()
    put(out, "whole")
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "whole"


def test_a_run_killed_right_after_it_replaced_the_output_leaves_the_new_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, "old")
    with monkeypatch.context() as patch:
        patch.setattr(output, "_clear", die)
        killed(lambda: put(out, "new", overwrite=True))
    assert (out / "weights").read_text() == "new"
    put(out, "newer", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "newer"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere folders cannot change places at once")
def test_at_no_moment_is_there_no_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, "old")
    monkeypatch.setattr(Path, "rename", lambda *arguments: pytest.fail("nothing is there until the second renaming"))
    put(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"


def test_where_folders_cannot_change_places_a_killed_replacement_is_undone_by_the_next_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, "old")
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, target: die() if target == out else rename(self, target))
        killed(lambda: put(out, "new", overwrite=True))
    assert not out.exists()
    with pytest.raises(OutputError, match="exists already"):
        put(out, "new")
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "old"
    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "rmtree", lambda folder, **options: folder.exists() and die())
        killed(lambda: put(out, "new", overwrite=True))
    put(out, "newer", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "newer"


def test_a_second_run_to_the_same_output_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "out"
    with staged_output(out) as folder:
        write(folder, "first")
        with pytest.raises(OutputError, match="out: another run is writing it"):
            put(out, "second")
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "first"


def test_where_there_are_no_locks_runs_keep_apart(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), staged_output(out) as folder:
        write(folder, "first")
        put(out, "second")
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "second"
    put(out, "third", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and (out / "weights").read_text() == "third"


def test_a_folder_taken_away_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            (tmp_path / "held").rmdir()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    descriptor = hold(tmp_path / "held")
    assert len(calls) == 2 and os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "held"))
    os.close(descriptor)


def test_a_report_that_cannot_be_written_stays_as_it_was_and_alone(tmp_path, monkeypatch):
    write_json(tmp_path / "report.json", {"old": 1})
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(errno.EIO, "failing")))
    with pytest.raises(OSError, match="failing"):
        write_json(tmp_path / "report.json", {"new": 1})
    assert os.listdir(tmp_path) == ["report.json"] and json.loads((tmp_path / "report.json").read_text()) == {"old": 1}


def other_weights(source):
    gpt2(n_inner=None).save_pretrained(source.parent / "other")
    (source.parent / "other" / "model.safetensors").rename(source / "model.safetensors")


CHANGES = {
    "cut off": (lambda s: os.truncate(s / "model.safetensors", 20_000), "model.safetensors was changed"),
    "other weights": (other_weights, "model.safetensors was changed"),
    "no header": (lambda s: (s / "model.safetensors").write_bytes(b"\xff" * 100), "model.safetensors was changed"),
    "gone": (shutil.rmtree, "was removed"),
    "config": (lambda s: (s / "config.json").write_text("{}"), "config.json was changed"),
    "tokenizer": (lambda s: os.truncate(s / "tokenizer.json", 1000), "tokenizer.json was changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read_gives_no_output(tmp_path, monkeypatch, change):
    source = tmp_path / "source"
    gpt2().save_pretrained(source)
    shutil.copyfile(SAMPLES / "gpt2" / "tokenizer.json", source / "tokenizer.json")
    alter, says = CHANGES[change]
    begin, begun = writing.ShardWriter.__init__, []

    def first_alter(self, *arguments):
        if not begun:
            begun.append(alter(source))
        begin(self, *arguments)

    monkeypatch.setattr(writing.ShardWriter, "__init__", first_alter)
    with pytest.raises(CheckpointError, match=f"{says} while it was read$"):
        convert(source, 8, 4, output=tmp_path / "out")
    assert set(os.listdir(tmp_path)) <= {"source", "other"}


def test_a_mapped_source_that_is_cut_off_does_not_end_the_process(tmp_path, monkeypatch):
    gpt2().save_pretrained(tmp_path / "source")
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "source" / "model.safetensors"), tmp_path / "source" / "pytorch_model.bin")
    (tmp_path / "source" / "model.safetensors").unlink()

    def work():
        begin = writing.ShardWriter.__init__

        def cut(self, *arguments):
            os.truncate(tmp_path / "source" / "pytorch_model.bin", 4096)
            begin(self, *arguments)

        monkeypatch.setattr(writing.ShardWriter, "__init__", cut)
        with pytest.raises(CheckpointError, match="was changed"):
            convert(tmp_path / "source", 8, 4, output=tmp_path / "out")
        die()  # so far it came

    killed(work)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def converted(tmp_path):
    return Path(convert("sample:gpt2", 6, 2, output=tmp_path / "out").output)


@pytest.fixture
def recipe(tmp_path_factory):
    """Few steps, on little text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(f"for i in range({i}):\n    print(i, {i * i})" for i in range(500)))
    return dataclasses.replace(FEW, data=str(text), tokens=4 * 256, evaluations=4)


def test_checkpoints_are_kept_by_their_steps_when_the_clock_is_set_back(converted, monkeypatch, recipe):
    save = UptrainingTrainer._save_optimizer_and_scheduler

    def set_back(self, folder):
        save(self, folder)
        for path in Path(folder).parent.glob("checkpoint-*"):
            age = self.state.global_step - int(path.name.rpartition("-")[2])
            os.utime(path, (time.time() + 3600 * (1 + age),) * 2)

    left = []
    monkeypatch.setattr(UptrainingTrainer, "_save_optimizer_and_scheduler", set_back)
    monkeypatch.setattr(
        uptraining, "put_in_place", lambda run, *rest: left.extend(run.checkpoints.glob("*/checkpoint-*"))
    )
    uptrain(converted, recipe, device="cpu", evaluate=False)
    assert sorted(path.name for path in left) == ["checkpoint-3", "checkpoint-4"]


def stand_in(monkeypatch, train):
    """In the place of the training, and of what is made of it."""
    monkeypatch.setattr(train_and_control, "train", train)
    monkeypatch.setattr(
        put_in_place, "_save", lambda model, folder, staging: shutil.copytree(folder, staging, dirs_exist_ok=True)
    )
    monkeypatch.setattr(put_in_place, "load_any", lambda *arguments, **options: None)


def trained(*arguments):
    return {"seconds": 1.0, "steps": 8, "tokens": 2048, "tokens_per_second": 2048, "curve": []}


def test_a_finished_training_of_another_run_is_not_taken_for_this_ones(converted, monkeypatch, recipe):
    final = run_folder(converted) / "uptrain" / "final"
    final.mkdir(parents=True)
    (final / "finished.json").write_text("{}")

    def train(path, teacher, settings, job, folder, said):
        assert not folder.exists()
        return trained()

    stand_in(monkeypatch, train)
    uptrain(converted, recipe, device="cpu", evaluate=False)
    assert os.listdir(converted.parent) == ["out"]


@pytest.mark.parametrize("moment", ["before", "amid", "near the end"])
def test_an_uptraining_killed_while_it_clears_up_is_done(converted, monkeypatch, recipe, moment):
    def train(path, teacher, settings, job, folder, said):
        (folder / "checkpoint-8").mkdir(parents=True)
        (folder / "checkpoint-8" / "complete").write_text("1.0")
        return trained()

    stand_in(monkeypatch, train)
    run, remove, unlink = run_folder(converted), shutil.rmtree, Path.unlink

    def rmtree(path, *rest, **options):
        if path in (run, run / "uptrain"):
            if moment == "amid":
                remove(path, *rest, **options)
            if moment != "near the end":
                die()
        remove(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        patch.setattr(
            Path, "unlink", lambda path, **options: die() if path.name == "became" else unlink(path, **options)
        )
        killed(lambda: uptrain(converted, recipe, device="cpu", evaluate=False))
    assert "uptraining" in read_report(converted) and run.exists()
    uptrain(converted, recipe, device="cpu", evaluate=False)
    assert os.listdir(converted.parent) == ["out"]


def test_an_uptraining_interrupted_after_its_result_was_in_place_does_not_say_otherwise(converted, monkeypatch, recipe):
    stand_in(monkeypatch, trained)
    publish = uptraining.put_in_place

    def interrupted(*arguments):
        publish(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(uptraining, "put_in_place", interrupted)
    with pytest.raises(InterruptedByUserError, match=r"interrupted; .*out is uptrained"):
        uptrain(converted, recipe, device="cpu", evaluate=False)
    assert os.listdir(converted.parent) == ["out"]


def test_a_run_killed_while_it_notes_that_it_is_trained_goes_on(converted, monkeypatch, recipe):
    write = Path.write_text

    def torn(path, text, **options):
        write(path, "" if "finished" in path.name else text, **options)
        if "finished" in path.name:
            die()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        killed(lambda: uptrain(converted, recipe, device="cpu", evaluate=False))
    report = uptrain(converted, resume=True, device="cpu", evaluate=False)
    assert report["uptraining"]["steps"] == 4 and os.listdir(converted.parent) == ["out"]


def test_a_run_that_goes_on_keeps_what_it_goes_on_by(converted, monkeypatch, recipe):
    def train(path, teacher, settings, job, folder, said):
        (folder / "checkpoint-8").mkdir(parents=True)
        (folder / "checkpoint-8" / "complete").write_text("1.0")
        raise KeyboardInterrupt

    stand_in(monkeypatch, train)
    with pytest.raises(InterruptedByUserError, match="resume=True"):
        uptrain(converted, recipe, device="cpu", evaluate=False)
    write, written = Path.write_text, []
    monkeypatch.setattr(Path, "write_text", lambda path, *rest, **o: (written.append(path), write(path, *rest, **o))[1])
    stand_in(monkeypatch, trained)
    uptrain(converted, resume=True, device="cpu", evaluate=False)
    assert not {run_folder(converted) / name for name in ("of", "recipe.yaml")} & set(written)


def test_a_second_uptraining_of_the_same_folder_is_refused_and_harms_nothing(converted, recipe):
    run = run_folder(converted)
    held = hold(run)
    (run / "of").write_text("first")
    with pytest.raises(OutputError, match="is being uptrained by another process"):
        uptrain(converted, recipe, device="cpu", evaluate=False)
    assert os.listdir(run) == ["of"]
    os.close(held)


def test_a_conversion_made_meanwhile_is_not_replaced_by_what_the_old_one_became(converted, monkeypatch, recipe):
    def train(*arguments):
        convert("sample:gpt2", 4, 2, output=converted, overwrite=True)
        return trained()

    stand_in(monkeypatch, train)
    with pytest.raises(OutputError, match="was converted anew while it was trained"):
        uptrain(converted, recipe, device="cpu", evaluate=False)
    assert json.loads((converted / "config.json").read_text())["n_head"] == 4


STOPS = {
    "terminated": (SystemExit(143), "143"),
    "safetensors": (SafetensorError("I/O error: Input/output error (os error 5)"), "Input/output error"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "full or failing"),
    "torch's stream": (RuntimeError("basic_ios::clear: iostream error"), "full or failing"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_training_that_ends_before_its_first_checkpoint_leaves_nothing(converted, monkeypatch, stop, recipe):
    error, says = STOPS[stop]

    def train(*arguments):
        raise error

    stand_in(monkeypatch, train)
    with pytest.raises((SystemExit, OutputError), match=says):
        uptrain(converted, recipe, device="cpu", evaluate=False)
    assert os.listdir(converted.parent) == ["out"] and "uptraining" not in read_report(converted)
