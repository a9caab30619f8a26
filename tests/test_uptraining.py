import dataclasses
import errno
import json
import os
import re
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import gpt2, t5, tokens
from helpers import plain_convert as convert
from safetensors.torch import load_file
from transformers import GPT2ForSequenceClassification

import sqa_convert
from sqa_convert import Recipe, load_recipe, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.convert import main as convert_main
from sqa_convert.errors import CheckpointError, DataError, OutputError, QualityError, RecipeError
from sqa_convert.evaluation.evaluate import evaluate
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.load import load_model
from sqa_convert.evaluation.measure import Predictions, measure, predict
from sqa_convert.report.sentences import recovered, uptraining_lines
from sqa_convert.report.tables import quality_table
from sqa_convert.uptraining import data as training_data
from sqa_convert.uptraining.other_trainers_names import HINTS
from sqa_convert.uptraining.recipe import dump_recipe, override, recipe_folder, recipe_names, summary
from sqa_convert.uptraining.trainable import no_dropout
from sqa_convert.uptraining.trainer import UptrainingTrainer

SHORT = Recipe(
    tokens=24 * 1024, sequence_length=128, batch_size=8, learning_rate=1e-3, evaluations=2, held_out_tokens=4096
)
FEW = Recipe(tokens=8 * 256, sequence_length=32, batch_size=8, learning_rate=1e-3, evaluations=2, held_out_tokens=2048)


@pytest.mark.parametrize(
    ("converted", "uptrained", "said"),
    [
        (
            (3.5, 0.4),
            (3.25, 0.1),
            "uptraining took back 50.0% of the loss and 75.0% of the KL that conversion had cost",
        ),
        ((3.1, 0.1), (2.3, 0.05), "uptraining took back all of the loss and 50.0% of the KL that conversion had cost"),
        ((3.1, 0.1), (3.9, 0.2), "uptraining took back none of the loss and none of the KL that conversion had cost"),
        ((3.001, 0.1), (2.9, 0.05), "uptraining took back 50.0% of the KL that conversion had cost"),
        ((2.999, 0.002), (2.99, 0.001), "what uptraining changed cannot be told from noise"),
    ],
)
def test_there_is_no_percentage_of_next_to_nothing_and_none_above_all(converted, uptrained, said):
    rows = {"source": (3.0, None), "converted": converted, "uptrained": uptrained}
    quality = {name: dict(zip(("loss", "kl"), row, strict=True)) for name, row in rows.items()}
    done = {"loss": "kl", "tokens": 100, "device": "cpu", "tokens_per_second": 10}
    lines = uptraining_lines({"uptraining": done, "quality": quality, "seconds": {"uptrain": 1.0}})
    assert lines[1] == said
    assert ("less than nothing" in " ".join(lines)) == (uptrained[1] > converted[1])


@pytest.mark.integration
@pytest.mark.parametrize(("name", "loss"), [("gpt2", "kl"), ("t5", "kl"), ("t5", "ce")])
def test_a_short_run_recovers_part_of_the_damage_and_says_so(name, loss, tmp_path):
    out = tmp_path / "out"
    convert(f"sample:{name}", 6, 2, output=out, calibration=None)
    before = {k: v.clone() for k, v in load_model(out).state_dict().items()}
    report = uptrain(out, Recipe(**{**SHORT.__dict__, "loss": loss}))
    quality = report["quality"]
    assert quality["uptrained"]["kl"] < (0.8 if loss == "kl" else 1) * quality["converted"]["kl"]
    assert quality["uptrained"]["loss"] < quality["converted"]["loss"]
    share = (quality["converted"]["kl"] - quality["uptrained"]["kl"]) / quality["converted"]["kl"]
    assert recovered(quality, "kl") == pytest.approx(share)
    assert report["uptraining"]["tokens"] == 24 * 1024
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    # measured again from the folder: the numbers in the report are this model's
    again = evaluate(out, f"sample:{name}", tokens=4096)
    assert again["model"]["kl"] == pytest.approx(quality["uptrained"]["kl"], rel=1e-4)
    curve = report["uptraining"]["curve"]
    assert [point["tokens"] for point in curve] == [0, 12 * 1024, 24 * 1024]
    assert curve[0]["kl"] == pytest.approx(quality["converted"]["kl"], rel=1e-3)
    best = min(curve, key=lambda point: point["kl" if loss == "kl" else "loss"])  # which is what is kept
    assert best["kl"] == pytest.approx(quality["uptrained"]["kl"], rel=1e-3)
    assert load_recipe(str(out / "recipe.yaml")).loss == loss
    assert "polyline" in (out / "recovery.svg").read_text() or "<path" in (out / "recovery.svg").read_text()
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")
    after = load_model(out).state_dict()
    frozen = {n for n in before if n.endswith("k_proj.bias")}
    assert {n for n in before if torch.equal(before[n], after[n])} == frozen
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((out / "config.json").read_text())["sqa"]["source"] == f"sample:{name}"


@pytest.fixture
def converted(tmp_path):
    """A folder for each sample, converted once a test."""

    def make(name):
        convert(f"sample:{name}", 6, 2, output=tmp_path / name)
        return tmp_path / name

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.integration
def test_the_control_is_the_source_trained_on_the_same_tokens(converted):
    out = converted("gpt2")
    source = {path.name: path.read_bytes() for path in (SAMPLES / "gpt2").iterdir()}
    report = uptrain(out, FEW, control=True)
    rows = [name for name, row in report["quality"].items() if isinstance(row, dict)]
    assert rows == ["source", "converted", "uptrained", "control"]
    assert report["quality"]["control"]["kl"] > 1e-4  # it moved
    assert report["uptraining"]["control_curve"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert {path.name: path.read_bytes() for path in (SAMPLES / "gpt2").iterdir()} == source
    lines = uptraining_lines(report)
    assert any("against the control's" in line for line in lines)
    card = (out / "README.md").read_text()
    assert "recovery.svg" in card and "| control |" in card


@pytest.mark.integration
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_accumulated_gradients_are_those_of_one_batch(name, converted, tmp_path):
    out = converted(name)
    shutil.copytree(out, tmp_path / "again")
    reports = [
        uptrain(out, dataclasses.replace(FEW, loss="mix")),
        uptrain(tmp_path / "again", dataclasses.replace(FEW, loss="mix", micro_batch=2)),
    ]
    for key in ("loss", "kl"):
        values = [report["quality"]["uptrained"][key] for report in reports]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    one, other = weights(out), weights(tmp_path / "again")
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=2e-5) for name in one)


@pytest.mark.parametrize("loss", ["ce", "mix"])
def test_the_gradient_of_pairs_of_many_lengths_does_not_depend_on_how_a_batch_is_cut(loss, converted, tmp_path):
    rows = [{"q": "name " * (1 + i % 7), "a": "word " * (1 + 3 * (i % 5))} for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = dataclasses.replace(
        FEW, data=str(tmp_path / "pairs.jsonl"), source_column="q", target_column="a", tokens=8 * 32, loss=loss
    )
    out, norms = converted("t5"), []
    clip = Accelerator.clip_grad_norm_

    def record(self, parameters, *arguments, **options):
        norm = clip(self, parameters, *arguments, **options)
        norms.append(float(norm))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", record)
        for micro_batch in (8, 2):
            shutil.copytree(out, tmp_path / f"again{micro_batch}")
            uptrain(
                tmp_path / f"again{micro_batch}", dataclasses.replace(recipe, micro_batch=micro_batch), evaluate=False
            )
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


@pytest.mark.parametrize("make", [gpt2, t5])
def test_nothing_is_dropped_while_training(make, tmp_path):
    rates = {"dropout_rate": 0.5} if make is t5 else {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    make(**rates).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", 6, 2, output=tmp_path / "out")
    batch = {"input_ids": tokens(2, 20), "labels": tokens(2, 20)}
    for folder in ("source", "out"):
        path = tmp_path / folder
        plain = load_model(path).train()
        assert not torch.equal(plain(**batch).logits, plain(**batch).logits)
        model = load_model(path, **no_dropout(path)).train()
        assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "wsd"},
        *(
            pytest.param(change, marks=pytest.mark.integration)
            for change in ({"gradient_checkpointing": True}, {"precision": "bfloat16"}, {"separate_documents": False})
        ),
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_of_the_training_run(change, converted):
    out = converted("gpt2")
    report = uptrain(out, dataclasses.replace(FEW, **change))
    assert report["quality"]["uptrained"]["kl"] < report["quality"]["converted"]["kl"]


def test_more_text_than_is_held_is_streamed(converted, monkeypatch):
    out = converted("gpt2")
    monkeypatch.setattr(training_data, "MOST_HELD", 100)
    report = uptrain(out, FEW)
    assert report["uptraining"]["steps"] == 8
    assert report["quality"]["uptrained"]["kl"] < report["quality"]["converted"]["kl"]


def test_rows_without_text_are_skipped_also_while_streaming_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "MOST_HELD", 100)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 5 if i % 10 else None for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    recipe = dataclasses.replace(FEW, data=str(tmp_path / "a.jsonl"), text_column="content")
    text = training_data.training_data(SAMPLES / "gpt2", recipe)
    rows = [row.tolist() for _, row in islice(text.rows(1), 1000)]
    once = rows[1:].index(rows[0]) + 1  # then it is read from the start again, as by a resumed run
    assert rows[once : 2 * once] == rows[:once]
    assert text.skipped.rows == 10
    done = {"tokens": 1, "loss": "kl", "device": "cpu", "tokens_per_second": 1, "skipped_rows": text.skipped.rows}
    lines = uptraining_lines({"uptraining": done, "seconds": {"uptrain": 1}})
    assert lines[0].endswith("; 10 rows without text skipped")


@pytest.mark.integration
def test_a_second_run_goes_on_and_is_held_against_the_conversion(converted):
    out = converted("gpt2")
    first = uptrain(out, FEW)["quality"]
    second = uptrain(out, FEW)["quality"]
    assert second["converted"] == first["converted"]
    assert second["before"]["kl"] == pytest.approx(first["uptrained"]["kl"], rel=1e-5)
    assert recovered(second, "kl") == pytest.approx(1 - second["uptrained"]["kl"] / first["converted"]["kl"])


@pytest.mark.integration
def test_a_second_run_without_measuring_leaves_no_old_numbers(converted):
    out = converted("gpt2")
    uptrain(out, FEW, control=True)
    report = uptrain(out, FEW, evaluate=False)
    assert set(report["quality"]) & {"uptrained", "control"} == set()
    assert not (out / "recovery.svg").exists() and "recovery.svg" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "says"), [({"fsdp": True}, "torchrun"), ({"batch_size": 8, "micro_batch": 8, "fsdp": True}, "fsdp")]
)
def test_what_needs_more_processes_says_so(change, says, converted):
    with pytest.raises(RecipeError, match=says):
        uptrain(converted("gpt2"), dataclasses.replace(FEW, **change))


def test_a_classifier_is_not_trained_as_a_language_model(tmp_path):
    GPT2ForSequenceClassification(gpt2().config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", 6, 2, output=tmp_path / "out")
    with pytest.raises(RecipeError, match="no language model head"):
        uptrain(tmp_path / "out", FEW)
    with pytest.raises(CheckpointError, match="no language model head"):
        load_model(tmp_path / "out")


def test_only_attention_is_trained_when_asked(converted):
    out = converted("gpt2")
    before = weights(out)
    uptrain(out, dataclasses.replace(FEW, train="attention"), evaluate=False)
    changed = {name for name, tensor in weights(out).items() if not torch.equal(tensor, before[name])}
    assert changed and all(".attn." in name for name in changed)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_lora_changes_only_projections_and_is_merged_into_them(name, converted):
    pytest.importorskip("peft")
    out = converted(name)
    before = weights(out)
    report = uptrain(out, dataclasses.replace(FEW, lora_rank=2, learning_rate=1e-2), control=True)
    after = weights(out)
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("Attention." in key or ".attn." in key for key in changed)
    assert evaluate(out, f"sample:{name}", tokens=2048)["model"]["kl"] == pytest.approx(
        report["quality"]["uptrained"]["kl"], rel=1e-4
    )


def test_training_stops_early_and_keeps_the_best(converted):
    out = converted("gpt2")
    recipe = dataclasses.replace(FEW, tokens=24 * 256, evaluations=24, patience=1, learning_rate=0.003, warmup=0.0)
    report = uptrain(out, recipe)
    done = report["uptraining"]
    assert done["kept_steps"] < done["steps"] < recipe.steps
    assert report["quality"]["uptrained"]["kl"] == pytest.approx(min(p["kl"] for p in done["curve"]), rel=1e-3)


def test_a_loss_that_is_no_number_stops_the_run_and_changes_nothing(converted):
    out = converted("gpt2")
    before = weights(out)
    with pytest.raises(QualityError, match=r"not finite.* at step \d+.*learning_rate.*still the converted model"):
        uptrain(out, dataclasses.replace(FEW, learning_rate=1e30, warmup=0.0))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_a_full_disk_while_a_checkpoint_is_saved_loses_nothing(converted, monkeypatch):
    out = converted("gpt2")
    before = weights(out)
    save, calls = UptrainingTrainer._save_optimizer_and_scheduler, []

    def full(self, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, folder)

    monkeypatch.setattr(UptrainingTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(
        OutputError, match=r"disk is full.*go on from step 4 of uptrain with: sqa_convert.uptrain\(.*, resume=True\)"
    ):
        uptrain(out, FEW)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    with pytest.raises(RecipeError, match="resume=True goes on with it, restart=True throws it away"):
        uptrain(out, FEW)
    report = uptrain(out, resume=True)
    assert report["uptraining"]["steps"] == 8 and len(report["uptraining"]["curve"]) == 3
    assert sorted(os.listdir(out.parent)) == ["gpt2"]


@pytest.mark.integration
def test_a_t5_learns_pairs_and_is_measured_by_its_answers(converted, tmp_path):
    asked = {"name import": "import", "name a class": "class", "name the other while": "while"}  # of several lengths
    rows = [{"q": q, "a": a} for q, a in asked.items()] * 27
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        data=str(tmp_path / "pairs.jsonl"), source_column="q", target_column="a", prefix="say: ", tokens=16 * 8 * 60,
        sequence_length=16, batch_size=8, learning_rate=3e-3, loss="ce", evaluations=2,
    )  # fmt: skip
    out = converted("t5")
    report = uptrain(out, recipe)
    quality = report["quality"]
    assert [text["given"] for text in report["samples"]] == [
        "say: name import</s>",
        "say: name the other while</s>",
    ]
    assert quality["data"].endswith("held-out part, 5 pairs")
    assert quality["uptrained"]["exact_match"] > quality["converted"]["exact_match"] == 0
    assert quality["uptrained"]["loss"] < 0.5 < quality["converted"]["loss"]
    table = quality_table({"quality": quality})
    assert "exact match" in table[0]


def test_of_pairs_both_columns_are_asked_for(tmp_path):
    with pytest.raises(RecipeError, match="target_column"):
        Recipe(source_column="q")
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    convert("sample:t5", 6, 2, output=tmp_path / "out")
    with pytest.raises(DataError, match='no column "a"'):
        uptrain(tmp_path / "out", Recipe(data=str(tmp_path / "rows.jsonl"), source_column="q", target_column="a"))


@pytest.mark.parametrize(
    ("prepare_source", "says"),
    [
        (lambda out: {"source": str(out)}, "is a converted model"),
        (lambda out: {"source": "sample:t5"}, "T5ForConditionalGeneration"),
        (lambda out: {"source": str(out.parent / "gone")}, "; source names it"),
    ],
)
def test_a_wrong_source_is_named(prepare_source, says, converted):
    out = converted("gpt2")
    with pytest.raises(CheckpointError, match=says):
        uptrain(out, FEW, **prepare_source(out))


def test_failed_training_leaves_the_converted_model(tmp_path):
    out = tmp_path / "out"
    convert("sample:gpt2", 6, 2, output=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="256 positions"):
        uptrain(out, Recipe(sequence_length=512))
    with pytest.raises(DataError, match=r"^data="):
        uptrain(out, SHORT.__class__(data=str(tmp_path / "none")))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_was_not_converted_is_refused(tmp_path):
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not made by sqa-convert"):
        uptrain(tmp_path)
    report = {"schema": 1, "sqa_convert": "0", "sites": [], "architecture": "SQAGPT2ForCausalLM"}
    for source in ({}, {"source": {}}, {"source": "gpt2"}):
        (tmp_path / "report.json").write_text(json.dumps(report | source))
        with pytest.raises(CheckpointError, match="does not say what it was made from"):
            uptrain(tmp_path)


def test_half_precision_weights_are_trained_in_float32_and_stored_as_they_were(tmp_path):
    convert("sample:gpt2", 6, 2, output=tmp_path / "out", dtype="bfloat16")
    uptrain(tmp_path / "out", Recipe(tokens=1024, sequence_length=64, batch_size=8), evaluate=False)
    assert {t.dtype for t in load_model(tmp_path / "out").state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("make", [gpt2, t5])
def test_measured_loss_is_the_models_own(make):
    model = make()
    batches = [{"input_ids": tokens(2, 20), "labels": tokens(2, 20)} for _ in range(3)]
    if not model.config.is_encoder_decoder:
        batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in batches]
    predictions = predict(model, HeldOut(batches, "random", 0, torch.device("cpu")))
    quality = measure(predictions, predictions)
    expected = torch.stack([model(**b).loss for b in batches]).mean().item()
    assert quality.loss == pytest.approx(expected, rel=1e-5)
    assert quality.kl == pytest.approx(0, abs=1e-9)
    assert quality.top1 == 1


def test_kl_and_agreement_against_another_model():
    hidden, labels = torch.randn(50, 4), torch.randint(0, 9, (50,))
    a, b = (Predictions(hidden, torch.randn(9, 4), labels) for _ in range(2))
    q, p = ((x.hidden @ x.head.T).softmax(-1) for x in (a, b))
    quality = measure(a, b)
    assert quality.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert quality.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_says_what_it_is_for_and_comes_back_from_its_dump(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.steps > 0
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    lines = (recipe_folder() / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and summary(name) == lines[0][2:]
    assert any(f"{name}" in line for line in lines if line.startswith("#   sqa-") or "torchrun" in line)


def test_flags_win_over_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tokens: 1_000_000\nlearning_rate: 1.0e-4\nloss: ce\n")
    assert load_recipe(str(path)) == Recipe(tokens=1_000_000, learning_rate=1e-4, loss="ce")
    assert load_recipe(str(path), tokens=2_000_000).tokens == 2_000_000
    assert override(path, loss=None, seed=3) == dataclasses.replace(load_recipe(str(path)), seed=3)  # a path is one too


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4), ("2e-4", 2e-4), ("'2.0E-4'", 2e-4), ("1", 1.0), (".5", 0.5),
        ("nine", None), ("true", None), ("1e-4 x", None), ("[1]", None), ("", None), (".nan", None), ("1e999", None),
    ],
)  # fmt: skip
def test_a_rate_is_a_number_however_it_is_written(written, meant, tmp_path):
    (tmp_path / "r.yaml").write_text(f"learning_rate: {written}\n")  # YAML 1.1 reads 1e-4 as text
    if meant is None:
        with pytest.raises(RecipeError, match="learning_rate"):
            load_recipe(str(tmp_path / "r.yaml"))
    else:
        assert load_recipe(str(tmp_path / "r.yaml")).learning_rate == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5M", 5_000_000), ("400k", 400_000), ("1.1M", 1_100_000), ("0.4 m", 400_000), ("1e6", 1_000_000),
        ("1.0e+6", 1_000_000), ("2B", 2 * 10**9), ("1_000_000", 1_000_000),
        ("400000.5", None), ("5MB", None), ("4,00", None), ("-5M", None), ("yes", None), ("1e99", None), (".inf", None),
    ],
)  # fmt: skip
def test_a_count_is_a_number_however_it_is_written(written, meant, tmp_path):
    (tmp_path / "r.yaml").write_text(f"tokens: {written}\n")
    if meant is None:
        with pytest.raises(RecipeError, match="tokens"):
            load_recipe(str(tmp_path / "r.yaml"))
    else:
        recipe = load_recipe(str(tmp_path / "r.yaml"))
        assert recipe.tokens == meant and type(recipe.tokens) is int


def test_a_setting_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("tokens: 5M\nseed: 1\n'tokens': 400k\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: given twice: tokens"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr", "`learning_rate`"), ("epochs", "`tokens`"), ("max_steps", "`tokens`: steps"), ("bf16", "`precision`"),
        ("per_device_train_batch_size", "`micro_batch`"), ("Warmup-Steps", "`warmup`, a share"),
        ("output_dir", "the argument output"), ("optimizer", "AdamW"), ("learnng_rate", "did you mean learning_rate"),
    ],
)  # fmt: skip
def test_other_trainers_names_lead_to_a_recipes(key, hint, tmp_path):
    (tmp_path / "r.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(RecipeError, match=f"{key}: no such setting.*{hint}"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_hints_name_settings_that_there_are():
    settings = {field.name for field in dataclasses.fields(Recipe)}
    assert {name for hint in HINTS.values() for name in re.findall("`([a-z_]+)`", hint)} - {"text"} <= settings


def test_all_faults_of_a_recipe_are_named_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text('tokns: 5\nbatch_size: many\ncontrol: "yes"\nloss: mse\nwarmup: 2\n')
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    for part in (
        "did you mean tokens",
        "batch_size: 'many' must be a whole number",
        "control: 'yes' must be true or false",
        "loss: 'mse' must be kl or ce or mix",
        "warmup: 2",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "content", [b"- a", b"{", b"\x00", b"seed: 1 # caf\xe9", b"a: " + b"[" * 3000, b"seed: 2020-99-99", b"? [a]\n: b"]
)
def test_what_is_no_recipe_is_refused_as_that(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml (is no YAML: |must hold a table)"):
        load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(RecipeError, match=r"cannot be read: .*directory"):
        load_recipe(str(tmp_path))


def test_a_recipe_from_python_is_as_one_from_a_file(tmp_path):
    written = Recipe(tokens="5M", learning_rate="2e-4", weight_decay=0, seed=np.int64(3), data=tmp_path)
    assert written == Recipe(tokens=5_000_000, learning_rate=2e-4, seed=3, data=str(tmp_path))
    with pytest.raises(RecipeError, match=r"tokens: None must be a whole number.*control: 1 must be true or false"):
        Recipe(tokens=None, control=1)
    with pytest.raises(RecipeError, match=r"data: 3 must be text; learnng_rate: no such .* learning_rate"):
        Recipe(3, learnng_rate=1)


def test_what_does_not_go_together_is_named_beside_what_is_wrong_alone():
    with pytest.raises(RecipeError) as error:
        Recipe(tokens=5, target_column="a", loss="mse")
    for part in (
        "tokens: 5 must be at least sequence_length × batch_size",
        "target_column: 'a' must be given with source_column",
        "loss: 'mse' must be kl or ce or mix",
    ):
        assert part in str(error.value)
    with pytest.raises(RecipeError, match="micro_batch: 3 must be 0, or a divisor of batch_size"):
        Recipe(micro_batch=3)


@pytest.mark.integration
def test_one_call_converts_and_trains_as_the_command_does(tmp_path):
    out = tmp_path / "out"
    conversion = sqa_convert.convert(
        "sample:gpt2", 6, 2, "mean", out, uptrain=FEW, control=True, seed=3, calibration=None, verify=False
    )
    assert conversion.report["quality"].keys() >= {"source", "converted", "uptrained", "control"}
    assert conversion.report == json.loads((out / "report.json").read_text())
    assert conversion.report["command"] == conversion.report["uptraining"]["command"]
    assert conversion.report["command"].startswith("sqa_convert.convert('sample:gpt2', 6, 2, 'mean', ")
    assert load_recipe(str(out / "recipe.yaml")) == dataclasses.replace(FEW, data="stdlib", control=True, seed=3)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("caller", ["command", "python"])
def test_a_column_of_calibration_alone_and_a_recipes_seed_mean_the_same_to_both(caller, tmp_path, monkeypatch):
    taken = []

    def run(plan, source, output, settings, recipe, progress):
        taken.extend((plan, settings, recipe))
        raise RecipeError("far enough")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(dataclasses.replace(FEW, seed=7)))
    if caller == "command":
        monkeypatch.setattr("sqa_convert.pipeline.run.run", run)
        flags = ["--calibration", "text.csv", "--text-column", "body", "--q-groups", "6", "--kv-groups", "2", "-q"]
        output = ["--uptrain", str(recipe), "-o", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["sqa-convert", "sample:gpt2", *flags, *output])
        with pytest.raises(SystemExit):
            convert_main()
    else:
        monkeypatch.setattr("sqa_convert.pipeline.convert.run", run)
        column = {"calibration": "text.csv", "text_column": "body"}
        with pytest.raises(RecipeError, match="far enough"):
            sqa_convert.convert("sample:gpt2", 6, 2, output=tmp_path / "out", uptrain=str(recipe), **column)
    plan, settings, recipe = taken
    assert (plan.calibration.text_column, recipe.text_column, settings.seed) == ("body", "text", 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"uptrain": "quick"}, "needs an output folder"),
        ({"control": True, "output": "out"}, "control=True belongs to uptrain"),
        ({"uptrain": "quik", "output": "out"}, "quik: no such file or recipe"),
        ({"uptrain": "seq2seq", "output": "out"}, "encoder-decoder"),
    ],
)
def test_a_call_that_cannot_train_is_refused_before_anything_is_written(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RecipeError, DataError), match=says):
        sqa_convert.convert("sample:gpt2", 6, 2, "mean", **arguments)
    with pytest.raises(RecipeError, match="not a model in memory"):
        sqa_convert.convert(gpt2(), 6, 2, "mean", output="out", uptrain="quick")
    assert not os.listdir(tmp_path)
