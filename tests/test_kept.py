"""What uptraining puts in a model's place: never what is worse, unless it was asked for."""

import contextlib
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers import gpt2, plain_convert
from test_resume import interrupt_second_time

from sqa_convert import Recipe, evaluate, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.checkpoints.small_files import REPORT, write_json
from sqa_convert.errors import CheckpointError, InterruptedByUserError, OutputError, QualityError, RecipeError
from sqa_convert.evaluation.load import load_model
from sqa_convert.report.formatting import nats, perplexity
from sqa_convert.report.sentences import uptraining_lines
from sqa_convert.report.tables import quality_rows
from sqa_convert.uptraining import find_source, put_in_place
from sqa_convert.uptraining import uptrain as uptraining
from sqa_convert.uptraining.data import training_data
from sqa_convert.uptraining.run_folder import run_folder
from sqa_convert.uptraining.trainable import with_lora
from sqa_convert.uptraining.trainer import DivergedError, UptrainingTrainer

HELD_OUT = 512


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A source of random weights with the sample's tokenizer, `converted` beside it, and a little text."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("kept")
    vocabulary = json.loads((SAMPLES / "gpt2" / "config.json").read_text())["vocab_size"]
    gpt2(heads=4, head_dim=4, layers=1, vocab_size=vocabulary).save_pretrained(work / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLES / "gpt2" / name, work / "source" / name)
    (work / "text.txt").write_text(
        "".join(Path(module.__file__).read_text() for module in (uptraining, put_in_place)) * 2
    )
    plain_convert(work / "source", 2, 1, output=work / "converted")
    return work


@pytest.fixture(autouse=True)
def plain(request, monkeypatch):
    """No pictures, pages and samples, which take longer than the training, where they are not looked at."""
    if "beside_and_can_be_taken" not in request.node.name:
        monkeypatch.setattr(put_in_place, "write_report", lambda folder, report: write_json(folder / REPORT, report))
        monkeypatch.setattr(put_in_place, "continuations", lambda *arguments, **options: [])


@pytest.fixture
def folder(place, tmp_path):
    shutil.copytree(place / "converted", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def recipe(place):
    """Of so many steps at such a rate."""

    def make(steps, rate, **settings):
        return Recipe(
            data=str(place / "text.txt"), tokens=steps * 64, sequence_length=16, batch_size=4, learning_rate=rate,
            held_out_tokens=HELD_OUT, **{"warmup": 0.0, "evaluations": steps} | settings,
        )  # fmt: skip

    return make


def kl(folder, place):
    return evaluate(folder, place / "source", data=str(place / "text.txt"), tokens=HELD_OUT)["model"]["kl"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("rate", "steps"), [(1e-6, 1), (3e-3, 3), (0.1, 2)])
def test_after_no_run_is_a_folder_worse(rate, steps, folder, place, recipe):
    before = kl(folder, place)
    with contextlib.suppress(QualityError):
        uptrain(folder, recipe(steps, rate))
    assert kl(folder, place) <= before


def test_what_got_worse_is_not_taken_but_kept_beside_and_can_be_taken(folder, place, recipe):
    before, start = content(folder), kl(folder, place)
    with pytest.raises(QualityError, match=r"made it worse: KL .*keep_anyway=True") as error:
        uptrain(folder, recipe(1, 10.0))
    assert error.value.exit_code == 4 and "e+" not in str(error.value)
    assert content(folder) == before
    assert (run_folder(folder) / "uptrain" / "final" / "model.safetensors").is_file()
    with pytest.raises(RecipeError, match=r"keep_anyway=True .*restart=True"):
        uptrain(folder, recipe(1, 10.0))
    with pytest.raises(QualityError, match="made it worse"):
        uptrain(folder, resume=True)
    report = uptrain(folder, keep_anyway=True)
    assert kl(folder, place) == pytest.approx(report["quality"]["uptrained"]["kl"], rel=1e-5)
    assert report["quality"]["uptrained"]["kl"] > start and not run_folder(folder).exists()
    for page in ("README.md", "report.html", "recovery.svg"):
        assert "e+" not in (folder / page).read_text(), page
    assert "| over 20 |" in (folder / "README.md").read_text()


def test_the_best_measurement_is_taken_and_the_control_ends_after_as_many_tokens(folder, recipe):
    values = iter([1.0, 0.9, 0.5, 0.7, 0.8])
    measure = UptrainingTrainer.evaluate

    def as_told(self, *arguments, **options):
        """KL of the model by a list; the weights of each measurement by its step."""
        named = measure(self, *arguments, **options)
        if self.ce < 1:
            named["eval_kl"] = self.state.log_history[-1]["eval_kl"] = next(values)
            at[self.state.global_step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return named

    at = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UptrainingTrainer, "evaluate", as_told)
        report = uptrain(folder, recipe(4, 1e-3, control=True), keep_anyway=True)
    done = report["uptraining"]
    assert done["kept_steps"] == 2 and done["steps"] == 4
    taken = dict(load_model(folder).named_parameters())
    assert all(torch.equal(taken[name], at[2][name]) for name in taken)
    assert any(not torch.equal(taken[name], at[4][name]) for name in taken)
    assert [point["tokens"] for point in done["control_curve"]] == [0, 64, 128]
    assert any("trained on the same 128 tokens" in line for line in uptraining_lines(report))


def test_a_rate_that_is_far_too_high_stops_the_run_early(folder, recipe):
    before = content(folder)
    with pytest.raises(DivergedError, match=r"the learning rate is too high: held-out loss .* at step 1.*10"):
        uptrain(folder, recipe(8, 10.0))
    assert content(folder) == before and os.listdir(folder.parent) == ["out"]


def test_a_result_goes_to_another_folder_also_when_the_run_is_resumed(folder, recipe, tmp_path):
    before, other = content(folder), tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UptrainingTrainer, "save_model", interrupt_second_time())
        with pytest.raises(InterruptedByUserError):
            uptrain(folder, recipe(2, 1e-3), output=other, evaluate=False)
    report = uptrain(folder, resume=True, evaluate=False)
    assert content(folder) == before and sorted(os.listdir(tmp_path)) == ["other", "out"]
    assert json.loads((other / "report.json").read_text())["uptraining"]["steps"] == 2
    assert report["output"] == str(other)
    with pytest.raises(OutputError, match=r"output=.* exists already: give another$"):
        uptrain(folder, recipe(2, 1e-3), output=other)
    for inside in (folder / "in", run_folder(folder) / "in"):
        with pytest.raises(RecipeError, match=r"output=.*(inside|checkpoints are kept)"):
            uptrain(folder, recipe(2, 1e-3), output=inside)


def test_without_measuring_there_is_nothing_to_choose_by_and_it_says_so(folder, recipe):
    report = uptrain(folder, recipe(1, 10.0), evaluate=False)
    assert any("nothing was measured to choose by" in line for line in uptraining_lines(report))


def test_a_model_that_is_the_source_is_measured_as_the_source(place, folder, recipe, tmp_path):
    source = load_model(place / "source").bfloat16()
    source.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / "source" / name, tmp_path / "half" / name)
    plain_convert(tmp_path / "half", 2, 1, output=tmp_path / "out", overwrite=True)
    report = uptrain(folder, recipe(1, 1e-30, precision="bfloat16", control=True))
    assert [point["kl"] for point in report["uptraining"]["control_curve"]] == [0, 0]
    assert report["quality"]["control"]["kl"] == pytest.approx(0, abs=1e-9)


def test_lora_adapts_the_source_where_it_adapts_the_model():
    pytest.importorskip("peft")
    adapted = {name for name, parameter in with_lora(gpt2(), 2).named_parameters() if parameter.requires_grad}
    assert adapted and all(".attn." in name for name in adapted)


def test_a_training_that_is_done_leaves_memory_and_environment(folder, recipe, monkeypatch):
    trainers, logged = [], []
    create, train = UptrainingTrainer.__init__, UptrainingTrainer.train

    def note(self, *arguments, **options):
        trainers.append(weakref.ref(self))
        create(self, *arguments, **options)

    def look(self, **options):
        logged.append(os.environ["TENSORBOARD_LOGGING_DIR"])
        return train(self, **options)

    def publish(*arguments):
        assert len(trainers) == 2 and not any(trainer() for trainer in trainers)

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(UptrainingTrainer, "__init__", note)
    monkeypatch.setattr(UptrainingTrainer, "train", look)
    monkeypatch.setattr(uptraining, "put_in_place", publish)
    uptrain(folder, recipe(1, 1e-4, control=True), keep_anyway=True)
    assert logged == [f"{folder}.runs/uptrain", f"{folder}.runs/control"]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_figures_beyond_reason_are_shown_as_such():
    assert [nats(2.5), nats(1885.75), nats(float("inf"))] == ["2.5000", "over 20", "over 20"]
    assert [nats(0.25, "+"), nats(-0.25, "+"), nats(99, "+")] == ["+0.2500", "-0.2500", "over +20"]
    assert (perplexity(9.5), perplexity(1.01e304)) == ("9.50", "over 1,000,000")
    rows = quality_rows({"uptrained": {"loss": 1885.75, "perplexity": 1.01e304, "kl": 1e9, "top1": 0.5}})[1]
    assert rows == [("uptrained", "over 20", "over 1,000,000", "over 20", "50.0%")]


def test_a_teacher_of_other_weights_is_refused(place, folder, recipe, tmp_path):
    other = load_model(place / "source")
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    before = content(folder)
    with pytest.raises(CheckpointError, match="other' holds other weights than this model was made from"):
        uptrain(folder, recipe(1, 1e-4), source=str(tmp_path / "other"))
    assert content(folder) == before


def test_the_same_weights_are_known_again_however_they_are_stored(place, tmp_path):
    report = json.loads((place / "converted" / "report.json").read_text())
    shutil.copytree(place / "source", tmp_path / "moved")
    model = load_model(place / "source")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensors = {f"transformer.{name}": tensor for name, tensor in model.transformer.state_dict().items()}
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    shutil.copyfile(tmp_path / "moved" / "config.json", tmp_path / "bin" / "config.json")
    for name in ("moved", "shards", "base", "bin"):
        assert find_source.find_source(report, str(tmp_path / name), Recipe()) == tmp_path / name
    assert report["source_weights"]
    del report["source_weights"]  # as of an older version
    gpt2(heads=4, head_dim=4, layers=1).save_pretrained(tmp_path / "random")
    assert find_source.find_source(report, str(tmp_path / "random"), Recipe()) == tmp_path / "random"


def test_a_corpus_is_held_in_32_bits_and_handed_out_in_64(place, recipe):
    text = training_data(place / "source", recipe(4, 1e-4))
    assert text.content.dtype == torch.int32
    assert {tensor.dtype for tensor in text.example().values()} == {torch.int64}
