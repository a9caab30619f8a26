"""The command as a user meets it: results, bad input, interruption, loading without the package."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import as_from_a_terminal, gpt2, t5
from safetensors.torch import load_file, save_file

from sqa_convert import convert
from sqa_convert.checkpoints import staging as output
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.convert import main
from sqa_convert.conversion import write as writing
from sqa_convert.errors import SQAError

COMMAND = [sys.executable, "-m", "sqa_convert"]
HEADS = ["--q-groups", "8", "--kv-groups", "4", "--method", "mean"]
QUIET = ["--no-evaluate"]


@pytest.fixture
def run(monkeypatch, called, tmp_path):
    """Runs the command inside an empty folder; returns exit code, stdout, stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    return partial(called, main)


@pytest.fixture
def source(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


FEW = "tokens: 20_480\nsequence_length: 128\nlearning_rate: 1.0e-3\nheld_out_tokens: 4_096\nevaluations: 2\n"
FITTED = ["--q-groups", "8", "--kv-groups", "4", "--calibration-tokens", "2048", "--refine-steps", "4"]


@pytest.mark.integration
def test_the_default_says_what_it_was_fitted_on_and_what_it_chose(run):
    code, out, err = run("sample:gpt2", *FITTED)
    assert code == 0 and "refine heads" in err
    fitted = re.search(r"fitted on 1,\d{3} tokens, chosen on \d+ more: sampled from the model", out)
    assert fitted is not None
    assert "chosen: " in out and "procrustes" in out
    report = json.loads(Path("gpt2-sqa-q8kv4/report.json").read_text())
    assert report["calibration"]["chosen"] in out
    assert report["quality"]["converted"]["kl"] < 0.5
    assert fitted[0] in Path("gpt2-sqa-q8kv4/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no-calibration", "--refine-steps", "3"], "--no-calibration"),
        (["--no-calibration", "--calibration", "stdlib"], "--no-calibration"),
        (["--calibration-tokens", "0"], "--calibration-tokens 0"),
        (["--refine-steps", "-1"], "--refine-steps -1"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt"),
        (["--partition", "best"], "searched or contiguous"),
    ],
)
def test_impossible_calibration_is_refused_before_anything_is_written(run, flags, said):
    code, out, err = run("sample:gpt2", "--q-groups", "8", "--kv-groups", "4", *flags)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1
    assert os.listdir() == []


@pytest.mark.integration
def test_the_weights_alone_serve_without_text(run):
    code, out, err = run("sample:t5", "--q-groups", "8", "--kv-groups", "4", "--no-calibration", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["method"] == "svd" and "calibration" not in report
    quality = report["quality"]
    assert quality["converted"]["kl"] < 0.2 * quality["mean"]["kl"]


def test_every_method_is_listed_with_its_source(run):
    code, out, _ = run("--list-methods")
    assert code == 0
    for name in ("auto", "svd", "procrustes", "mean", "first", "select"):
        assert f"\n{name} " in f"\n{out}"
    assert out.count("arXiv") >= 5


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_converts_the_sample_and_says_what_it_did(run, name):
    code, out, err = run(f"sample:{name}", *HEADS)
    assert code == 0, err
    for words in (
        "query heads",
        "key/value heads",
        "KV cache per token",
        "stdlib, held-out part",
        "It lost much: loss +",
        "next: convert again without --method mean",
        "seconds: convert",
    ):
        assert words in out
    report = json.loads(open(f"{name}-sqa-q8kv4/report.json").read())
    quality = report["quality"]
    assert quality["source"]["kl"] is None
    assert quality["converted"]["kl"] > 0
    assert quality["warnings"] == [] and "warning" not in out
    assert 0 < quality["converted"]["top1"] < 1
    assert quality["converted"]["loss"] > quality["source"]["loss"]
    assert f"{quality['converted']['loss']:.4f}" in out
    assert (
        report["cost"]["after"]["kv_cache_bytes_per_token"] * 3 == report["cost"]["before"]["kv_cache_bytes_per_token"]
    )


def test_json_is_exactly_one_object_on_stdout(run, source):
    code, out, err = run(source, *HEADS, *QUIET, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["schema"] == 1
    assert report["cost"]["after"]["query_heads"] == {"decoder": 8}


def test_quiet_says_nothing(run, source):
    assert run(source, *HEADS, *QUIET, "--quiet") == (0, "", "")


def test_dry_run_shows_the_plan_and_writes_nothing(run, source):
    code, out, _ = run(source, "--variant", "sqa", "--dry-run", "--json")
    plan = json.loads(out)
    names = [t["name"] for tensors in plan["shards"].values() for t in tensors]
    assert code == 0
    assert "transformer.h.1.attn.o_proj.weight" in names
    assert os.listdir() == []


def test_overwrite_replaces_the_whole_folder(run, source):
    assert run(source, *HEADS, *QUIET, "-o", "out")[0] == 0
    open("out/stray.txt", "w").close()
    assert run(source, "--variant", "xsqa", "--method", "mean", *QUIET, "-o", "out", "--overwrite")[0] == 0
    assert not os.path.exists("out/stray.txt")
    assert json.loads(open("out/config.json").read())["n_head"] == 3
    assert os.listdir() == ["out"]


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def pickled(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(weights | {"x": Payload()}, file)


def set_value(name, value):
    def change(weights):
        weights[name].view(-1)[3] = value

    return change


ATTENTION, OUTSIDE = "transformer.h.1.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"


def index(weight_map, **content):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "all.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **content}))

    return change


BAD_SOURCES = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged or truncated"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "damaged or truncated"),
    "missing tensor": (lambda f: edit_weights(f, lambda w: w.pop(ATTENTION)), f"{ATTENTION} is missing"),
    "wrong shape": (lambda f: edit_weights(f, lambda w: w.update({ATTENTION: torch.ones(2, 2)})), "has shape"),
    "integer weights": (lambda f: edit_weights(f, lambda w: w.update({ATTENTION: w[ATTENTION].int()})), "is I32"),
    "NaN in attention": (lambda f: edit_weights(f, set_value(ATTENTION, float("nan"))), "NaN or infinite"),
    "Inf outside attention": (lambda f: edit_weights(f, set_value(OUTSIDE, float("-inf"))), "NaN or infinite"),
    "config disagrees": (lambda f: edit_config(f, n_embd=96), "config.json calls for"),
    "more layers": (lambda f: edit_config(f, n_layer=3), "is missing"),
    "other architecture": (lambda f: edit_config(f, model_type="bert"), "supported: gpt2, mt5, t5"),
    "cross-attention": (lambda f: edit_config(f, add_cross_attention=True), "add_cross_attention"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickle with code": (pickled, "refused"),
    "model_type is a list": (lambda f: edit_config(f, model_type=["gpt2"]), "not supported"),
    "architectures is a number": (lambda f: edit_config(f, architectures=5), "architectures is 5"),
    "unknown activation": (lambda f: edit_config(f, activation_function="nope"), "not accepted"),
    "epsilon is text": (lambda f: edit_config(f, layer_norm_epsilon="x"), "not accepted"),
    "NaN in the config": (lambda f: edit_config(f, layer_norm_epsilon=float("nan")), "no JSON"),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "quantized"),
    "index outside the folder": (
        index({"a": "../all.safetensors"}, metadata={}),
        "outside the folder",
    ),
    "index without its file": (
        index({"a": "b.safetensors"}, metadata={}),
        "b.safetensors is missing",
    ),
    "index without metadata": (index({"a": "all.safetensors"}), 'add "metadata": {}'),
}


@pytest.mark.parametrize("fault", BAD_SOURCES)
def test_bad_sources_get_one_line_and_exit_code_3(run, source, fault):
    damage, says = BAD_SOURCES[fault]
    damage(source)
    code, out, err = run(source, *HEADS, *QUIET)
    assert (code, out) == (3, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert says in err
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", *HEADS], 3, "nowhere"),
        (["./nowhere", *HEADS], 3, "no such folder"),
        (["openai-community/gpt2", *HEADS], 3, "offline"),
        (["openai-community/gpt2", *HEADS, "--revision", "v9"], 3, "offline"),
        (["no/hub/id", *HEADS], 3, "no folder here"),
        (["SOURCE", *HEADS, "--revision", "main"], 2, "--revision main"),
        (["bad id!", *HEADS], 3, "neither a folder here nor a hub id"),
        (["sample:bert", *HEADS], 3, "sample:gpt2, sample:t5"),
        (["FILE", *HEADS], 3, "is a file"),
        (["SOURCE", "--q-groups", "9", "--kv-groups", "4"], 2, "--kv-groups 4 must divide --q-groups 9"),
        (["SOURCE", "--q-groups", "13", "--kv-groups", "1"], 2, "1 to 12"),
        (["SOURCE", "--q-groups", "0", "--kv-groups", "1"], 2, "--q-groups 0"),
        (["SOURCE", "--q-groups", "-8", "--kv-groups", "4"], 2, "--q-groups -8"),
        (["SOURCE", "--q-groups", "8", "--kv-groups", "0"], 2, "--kv-groups 0"),
        (["SOURCE", "--q-groups", "eight", "--kv-groups", "4"], 2, "--q-groups"),
        (["SOURCE"], 2, "--variant"),
        (["SOURCE", "--q-groups", "8"], 2, "--kv-groups"),
        (["SOURCE", *HEADS, "--variant", "sqa"], 2, "leave out"),
        (["SOURCE", "--variant", "rsqa"], 2, "gqa, mqa, sqa"),
        (["SOURCE", *HEADS, "--method", "median"], 2, "mean, first, select"),
        (["SOURCE", *HEADS, "--sites", "encoder"], 2, "this model has decoder"),
        (["SOURCE", *HEADS, "--dtype", "int8"], 2, "float32, bfloat16, float16"),
        (["SOURCE", *HEADS, "--max-shard-size", "huge"], 2, "300MB"),
        (["SOURCE", *HEADS, "--max-shard-size", "2"], 2, "with its unit, such as 300MB"),
        (["SOURCE", *HEADS, "--max-shard-size", "2KB"], 2, "at least 1MB"),
        (["SOURCE", *HEADS, "--calibration-tokens", "4x"], 2, "'4x': give a whole number"),
        (["SOURCE", *HEADS, "--device", "tpu"], 2, "--device tpu"),
        (["SOURCE", *HEADS, "--data", "FILE"], 2, "--data"),
        (["SOURCE", *HEADS, "--data", "nothere.txt"], 2, "--data nothere.txt"),
        (["SOURCE", *HEADS, "--no-evaluate", "--device", "gpu"], 2, "--device gpu"),
        (["SOURCE", *HEADS, "--uptrain", "gpt2-small"], 2, "sequence_length 1024 is more than the model's 64"),
        (["SOURCE", *HEADS, "--uptrain", "seq2seq"], 2, "encoder-decoder"),
        (["sample:gpt2", *HEADS, "--uptrain", "TRACKED"], 2, "report_to: foo is no tracker"),
        (["SOURCE", *FITTED, "--method", "auto", "--calibration", "nothere.txt"], 2, "--calibration nothere.txt"),
        (["SOURCE", *HEADS, "-o", "~nobody-of-this-name/x"], 2, "--output ~nobody-of-this-name/x"),
        (["SOURCE", *HEADS, "--data", "no/such/data"], 2, "--data no/such/data"),
        (["SOURCE", *HEADS, "--uptrain", "quikc"], 2, "quick"),
        (["SOURCE", *HEADS, "--no-such-flag"], 2, "--no-such-flag"),
        (["SOURCE", *HEADS, "-o", "FILE"], 2, "is a file"),
        (["SOURCE", *HEADS, "-o", "FILE/below"], 2, "cannot be written"),
        (["SOURCE", *HEADS, "-o", "SOURCE", "--overwrite"], 2, "did not write"),
        (["SOURCE", *HEADS, "-o", "."], 2, "the folder you are in"),
        (["SOURCE", *HEADS, "-o", "..", "--overwrite"], 2, "one above it"),
        (["SOURCE", *HEADS, "--device", "meta"], 2, "--device meta"),
        (["SOURCE", *HEADS, "--device", "cuda:1"], 2, "--device cuda:1"),
        (["x" * 5000, *HEADS], 3, "xxx"),
        (["~nobody-of-this-name/x", *HEADS], 3, "nobody-of-this-name"),
    ],
)
def test_bad_arguments_get_one_line_and_their_exit_code(run, source, tmp_path, arguments, code, says):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    tracked = tmp_path / "tracked.yaml"
    tracked.write_text("sequence_length: 64\nreport_to: foo\n")
    names = {"SOURCE": source, "FILE": empty, "TRACKED": tracked}
    replaced = [re.sub("|".join(names), lambda found: str(names[found[0]]), a) for a in arguments]
    before = sorted(p.name for p in source.iterdir())
    found, out, err = run(*replaced)
    assert (found, out) == (code, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says in err
    assert run(*replaced, "--dry-run") == (found, out, err)  # shows no plan of what cannot be done
    assert os.listdir() == []
    assert sorted(p.name for p in source.iterdir()) == before


IMPOSSIBLE = [
    ({"device": "gpu"}, "device='gpu'"),
    ({"evaluate": True, "data": "nothere.txt"}, "data='nothere.txt'"),
    ({"method": "svd", "calibration": "nothere.txt"}, "calibration='nothere.txt'"),
    ({"max_shard_size": "2"}, "max_shard_size='2'"),
    ({"output": "~nobody-of-this-name/x"}, "output='~nobody"),
    ({"output": "exists"}, "exists already"),
    ({"output": "a\0b"}, "cannot be used"),
]


@pytest.mark.parametrize(("arguments", "says"), IMPOSSIBLE)
def test_from_python_the_same_is_refused_before_a_weight_is_read(arguments, says, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("exists/full")
    monkeypatch.setattr(
        "sqa_convert.checkpoints.source.SafetensorsSource.pieces", lambda *rest: pytest.fail("a weight was read")
    )
    monkeypatch.setattr(
        "sqa_convert.calibration.load_source.load_source", lambda *rest: pytest.fail("a weight was read")
    )
    with pytest.raises(SQAError, match=re.escape(says)):
        convert(source, 8, 4, **{"method": "mean", "output": "out"} | arguments)


def test_text_is_read_from_the_column_that_is_named(run, tmp_path):
    data = tmp_path / "a [1].JSONL"
    texts = [None, *(f"def f{i}(x):\n    return x + {i}\n" * 50 for i in range(60))]
    data.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    code, _, err = run("sample:gpt2", *HEADS, "--no-verify", "--data", data, "--text-column", "content", "-q")
    assert (code, err) == (0, "")
    said = Path("gpt2-sqa-q8kv4/report.json").read_text()
    assert json.loads(said)["quality"]["data"] == f"{data}, held-out part, 1 rows without text skipped"
    for flag in ("--data", "--calibration"):
        code, _, err = run("sample:gpt2", "--q-groups", "8", "--kv-groups", "4", "-o", "other", flag, data)
        assert code == 2 and f'{flag} {data} has no column "text" of text (columns: content)' in err
    assert os.listdir() == ["gpt2-sqa-q8kv4"]


def test_a_column_of_no_text_is_refused(run):
    code, _, err = run("sample:gpt2", *HEADS, "--text-column", "content")
    assert code == 2 and "--text-column names a column of --data or --calibration" in err


def test_existing_output_is_left_alone(run, source):
    os.mkdir("out")
    open("out/precious.txt", "w").close()
    code, _, err = run(source, *HEADS, *QUIET, "-o", "out")
    assert code == 2
    assert "--overwrite" in err
    assert os.listdir("out") == ["precious.txt"]


def test_only_outputs_of_our_own_are_overwritten(run, source):
    os.makedirs("out/project")
    open("out/project/precious.txt", "w").close()
    code, _, err = run(source, *HEADS, *QUIET, "-o", "out", "--overwrite")
    assert code == 2 and "did not write" in err
    open("out/report.json", "w").write('{"numTotalTests": 3}')  # other programs write reports too
    code, _, err = run(source, *HEADS, *QUIET, "-o", "out", "--overwrite")
    assert code == 2 and "did not write" in err
    assert os.listdir("out/project") == ["precious.txt"]
    (source / "report.json").write_text('{"schema": 1, "sqa_convert": "0"}')
    code, _, err = run(source, *HEADS, *QUIET, "-o", source, "--overwrite")
    assert code == 2 and "where the source lies" in err


def test_what_came_to_the_place_meanwhile_is_left_alone(run, source, monkeypatch):
    carry = writing.carry_files

    def slow(*arguments):
        carry(*arguments)
        os.mkdir("out")
        open("out/precious.txt", "w").close()

    monkeypatch.setattr(writing, "carry_files", slow)
    code, _, err = run(source, *HEADS, *QUIET, "-o", "out")
    assert code == 2 and "exists already" in err
    assert os.listdir() == ["out"] and os.listdir("out") == ["precious.txt"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, PermissionError])
@pytest.mark.parametrize("which", [1, 2])
def test_a_swap_that_fails_halfway_puts_the_old_output_back(run, source, monkeypatch, fault, which):
    assert run(source, *HEADS, *QUIET, "-o", "out")[0] == 0
    before = open("out/config.json").read()
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)  # as where folders cannot change places
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == which:
            raise fault
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    code, _, _ = run(source, "--variant", "xsqa", "--method", "mean", *QUIET, "-o", "out", "--overwrite")
    assert code == (130 if fault is KeyboardInterrupt else 2)
    assert open("out/config.json").read() == before
    assert os.listdir() == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run, source):
    os.mkdir("locked", mode=0o500)
    code, _, err = run(source, *HEADS, *QUIET, "-o", "locked/out")
    assert code == 2 and "cannot be written" in err


@pytest.mark.integration
@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.integration)])
def test_uptraining_from_the_command_line(run, name, tmp_path):
    (tmp_path / "short.yaml").write_text(FEW)
    code, out, err = run(f"sample:{name}", *HEADS, "--uptrain", tmp_path / "short.yaml", "-o", "out", "--seed", "7")
    assert code == 0, err
    for words in ("uptrained", "uptraining took back", "next: "):
        assert words in out
    report = json.loads(open("out/report.json").read())
    assert (report["uptraining"]["seed"], report["uptraining"]["steps"]) == (7, 20)
    assert report["quality"]["uptrained"]["kl"] < report["quality"]["converted"]["kl"]
    assert os.listdir() == ["out"]


@pytest.mark.parametrize(
    ("files", "length", "says", "code"),
    [
        ((), 64, "no tokenizer", 3),
        (("tokenizer.json", "tokenizer_config.json"), 65, "sequence_length 65 is more than the model's 64", 2),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_uptraining_that_cannot_run_is_refused_before_anything_is_written(
    run, source, files, length, says, code, dry
):
    (source.parent / "own.yaml").write_text(f"sequence_length: {length}\n")
    for file in files:
        (source / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    found, out, err = run(source, *HEADS, "--uptrain", source.parent / "own.yaml", *dry)
    assert (found, out) == (code, "") and says in err
    assert os.listdir() == []


def test_interrupted_uptraining_keeps_the_converted_model_and_says_so(run, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sqa_convert.uptraining.trainer.UptrainingTrainer.train", interrupt)
    code, _, err = run("sample:gpt2", *HEADS, "--uptrain", "quick", "-o", "out")
    assert code == 130 and "out is still the converted model" in err
    assert os.listdir() == ["out"]
    assert json.loads(open("out/config.json").read())["n_head"] == 8


def test_an_uptraining_that_was_stopped_is_not_thrown_away_unasked(run):
    os.makedirs("out.uptraining/uptrain")
    code, _, err = run("sample:gpt2", *HEADS, "--uptrain", "quick", "-o", "out")
    assert code == 2 and "out.uptraining holds a run that was stopped" in err
    assert os.listdir() == ["out.uptraining"]


def test_a_loss_that_is_not_finite_is_an_error_not_a_result(run, source, monkeypatch):
    from sqa_convert.evaluation import evaluate as evaluation

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    predict = evaluation.predict

    def overflow(*arguments):
        predictions = predict(*arguments)
        predictions.hidden[5] = float("nan")
        return predictions

    monkeypatch.setattr(evaluation, "predict", overflow)
    code, out, err = run("sample:gpt2", *HEADS, "--json")
    assert (code, out) == (4, "") and "not finite" in err
    assert os.listdir() == []


def test_brackets_in_a_path_are_only_text(run, source):
    code, out, err = run(source, *HEADS, *QUIET, "-o", "o[red]u[/y]t")
    assert (code, err) == (0, "")
    assert "o[red]u[/y]t" in out
    assert os.listdir("o[red]u[") == ["y]t"]


def test_without_a_tokenizer_the_model_is_converted_and_not_measured(run, source):
    code, out, err = run(source, *HEADS, "--no-verify")
    assert (code, err) == (0, "")
    assert f"not measured: {source} holds no tokenizer\n" in out
    (folder,) = os.listdir()
    report = json.loads(open(f"{folder}/report.json").read())
    assert report["not_measured"] == f"{source} holds no tokenizer" and "quality" not in report
    assert f"not been measured: {source} holds no tokenizer" in open(f"{folder}/README.md").read()
    assert "holds no tokenizer" in open(f"{folder}/report.html").read()


@pytest.mark.parametrize(
    ("flag", "way_out"), [("--data", "leave out --data"), ("--calibration", "leave out --calibration")]
)
def test_text_that_was_asked_for_needs_a_tokenizer(run, source, flag, way_out, tmp_path):
    (tmp_path / "own.txt").write_text("some words\n" * 9000)
    code, _, err = run(source, "--q-groups", 6, "--kv-groups", 3, flag, tmp_path / "own.txt")
    assert code == 3 and "holds no tokenizer" in err and way_out in err
    assert os.listdir() == []


@pytest.mark.parametrize("content", ['{"model": 1}', None], ids=["damaged", "of another model"])
def test_a_tokenizer_that_cannot_be_used_is_no_reason_not_to_convert(run, source, content):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    if content is not None:
        (source / "tokenizer.json").write_text(content)
    code, out, err = run(source, *HEADS, "--no-verify", "-o", "out")
    assert (code, err) == (0, "")
    assert f"not measured: {'' if content is None else source}" in out and os.listdir() == ["out"]


def limit_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_leaves_nothing(source, tmp_path):
    result = subprocess.run(
        [*COMMAND, source, *HEADS, *QUIET], cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit_files
    )
    assert result.returncode == 2, result.stderr
    assert "disk is full" in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


def test_full_disk_while_replacing_keeps_the_old_output(run, source, monkeypatch):
    assert run(source, *HEADS, *QUIET, "-o", "out")[0] == 0
    before = open("out/config.json").read()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.ShardWriter, "write", full)
    code, _, err = run(source, "--variant", "xsqa", "--method", "mean", *QUIET, "-o", "out", "--overwrite")
    assert code == 2 and "disk is full" in err
    assert open("out/config.json").read() == before
    assert os.listdir() == ["out"]


def test_too_small_a_disk_is_refused_before_starting(run, source, monkeypatch):
    import shutil

    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = run(source, *HEADS, *QUIET)
    assert code == 2 and "GB free" in err
    assert os.listdir() == []


def test_a_written_tensor_that_differs_is_noticed(run, source, monkeypatch):
    write = writing.ShardWriter.write

    def flip(self, name, pieces):
        write(self, name, pieces)
        if name == OUTSIDE:
            with self.path.open("r+b") as file:
                file.seek(self._begin + self._places[name][0])
                file.write(b"\x07")

    monkeypatch.setattr(writing.ShardWriter, "write", flip)
    code, _, err = run(source, *HEADS, *QUIET)
    assert code == 3 and f"{OUTSIDE} was not written as computed" in err
    assert os.listdir() == []
    assert run(source, *HEADS, *QUIET, "--no-verify")[0] == 0


@pytest.fixture
def ignoring():
    """pytest as nohup and scripts start it in the background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


WAITS = {"code": "wait()", "callback": "thing = Thing(); watch = weakref.ref(thing, wait); del thing"}


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGINT, 130, "callback"),
        (signal.SIGTERM, 143, "code"),
        pytest.param(signal.SIGINT, 130, "code", marks=pytest.mark.integration),
        pytest.param(signal.SIGTERM, 143, "callback", marks=pytest.mark.integration),
    ],
)
def test_interruption_leaves_nothing(source, tmp_path, number, code, where, ignoring):
    """The signal comes while the weights lie there half done; also where Python ignores what is raised."""
    script = (
        "import threading, time, weakref, sqa_convert.conversion.execute as c, sqa_convert.cli.convert as cli\n"
        "from sqa_convert.checkpoints.safetensors_writer import ShardWriter\n"
        "write, look, done = ShardWriter.write, c.wait, threading.Event()\n"
        "class Thing:\n    pass\n"
        "def wait(*a):\n    print('written', flush=True)\n    time.sleep(60)\n"
        "def note(*a):\n    write(*a)\n    done.set()\n    time.sleep(0.5)\n"
        "def slow(*a):\n"
        "    c.wait = look\n"
        "    done.wait()\n"
        f"    {WAITS[where]}\n"
        "    time.sleep(60)\n"
        "ShardWriter.write, c.wait = note, slow\ncli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, source, *HEADS, *QUIET],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_from_a_terminal,
    )  # fmt: skip
    assert process.stdout.readline() == "written\n"
    time.sleep(0.1)
    assert len(os.listdir(tmp_path)) == 2  # the source and the temporary folder
    process.send_signal(number)
    _, err = process.communicate(timeout=50)
    assert process.returncode == code
    assert err == ("error: interrupted; nothing half-written was kept\n" if number == signal.SIGINT else "")
    assert os.listdir(tmp_path) == ["source"]


def test_signals_that_were_ignored_from_the_start_stay_ignored(run, ignoring):
    assert run("--version")[0] == 0
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN


LOAD = """
import sys
sys.modules["sqa_convert"] = None  # as where it is not installed
from transformers import {auto}, AutoModel, AutoTokenizer
folder = sys.argv[1]
model = {auto}.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "{base}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=8, do_sample=False).tolist())
if "{auto}" == "AutoModelForCausalLM":
    from transformers import pipeline
    write = pipeline("text-generation", model=folder, trust_remote_code=True)
    assert len(write("import os", max_new_tokens=5)[0]["generated_text"]) > 9
"""


@pytest.mark.parametrize(
    ("name", "auto", "base"),
    [("gpt2", "AutoModelForCausalLM", "SQAGPT2Model"), ("t5", "AutoModelForSeq2SeqLM", "SQAT5Model")],
)
def test_another_process_loads_and_generates_without_the_package(run, tmp_path, name, auto, base):
    assert run(f"sample:{name}", *HEADS, *QUIET, "-o", "out")[0] == 0
    script = LOAD.format(auto=auto, base=base)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", script, "out"], env=environment, capture_output=True, text=True, cwd=os.getcwd()
    )
    assert result.returncode == 0, result.stderr
    from sqa_convert.evaluation.load import load_model
    from sqa_convert.text.tokenizers import load_tokenizer

    ids = load_tokenizer("out")("def add(a, b):", return_tensors="pt").input_ids
    expected = load_model("out").generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert json.loads(result.stdout) == expected


def test_a_tokenizer_whose_class_only_the_model_type_told_still_loads(run, source, tmp_path):
    """The hub's gpt2: tokenizer_config.json names no class, and sqa_gpt2 is not known to transformers."""
    (source / "tokenizer.json").write_bytes((SAMPLES / "gpt2" / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    assert run(source, *HEADS, *QUIET, "-o", "out")[0] == 0
    script = (
        "import sys; sys.modules['sqa_convert'] = None\nfrom transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained('out', trust_remote_code=True)\n"
        "ids = t('def add(a, b):').input_ids\nassert 0 < len(ids) < 14 and t.decode(ids) == 'def add(a, b):', ids\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_text_generation_pipeline(run):
    from transformers import pipeline

    import sqa_convert.models  # noqa: F401 - registers the architectures

    assert run("sample:gpt2", *HEADS, *QUIET, "-o", "out")[0] == 0
    text = pipeline("text-generation", model="out")("import os", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("import os") and len(text) > len("import os")


def test_code_in_the_source_folder_never_runs(run, source):
    (source / "evil.py").write_text("open('executed', 'w').close()\nclass C: pass\n")
    edit_config(source, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((SAMPLES / "gpt2" / file).read_bytes())
    run(source, *HEADS)
    assert not os.path.exists("executed")


def test_cached_hub_model_converts_offline(run, tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out."""
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    t5().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, out, err = run("someone/tiny", *HEADS, *QUIET, "--json")
    assert code == 0, err
    report = json.loads(out)
    # k and v; two decoder layers with two sites each; 12 heads of 4 floats
    assert report["cost"]["before"]["kv_cache_bytes_per_token"] == 2 * (2 * 2) * 12 * 4 * 4
    assert report["source"] == {
        "name": "someone/tiny",
        "revision": commit,
        "architecture": "T5ForConditionalGeneration",
        "files": ["model.safetensors"],
        "notes": [],
        "card": {},
        "left_behind": [],
    }
    assert os.listdir() == ["tiny-sqa-q8kv4"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that hands out a folder and remembers what was asked of it."""
    import huggingface_hub

    gpt2().save_pretrained(tmp_path / "remote")
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=()):
        asked.extend(allow_patterns)
        return str(tmp_path / "remote")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_what_cannot_be_done_is_known_before_weights_are_downloaded(run, hub, tmp_path):
    assert run("someone/tiny", "--q-groups", "9", "--kv-groups", "4")[0] == 2
    os.mkdir("tiny-sqa-q8kv4")
    open("tiny-sqa-q8kv4/x", "w").close()
    assert run("someone/tiny", *HEADS)[0] == 2
    edit_config(tmp_path / "remote", model_type="llama")
    assert run("someone/tiny", *HEADS)[0] == 3
    assert set(hub) == {"config.json", "adapter_config.json"}


def test_dry_run_of_a_hub_model_fetches_headers_only(run, hub, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    tensors = {
        n: TensorInfo(dtype="F32", shape=list(t.shape), data_offsets=(0, 4 * t.numel()))
        for n, t in load_file(tmp_path / "remote" / "model.safetensors").items()
    }
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    metadata = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": file},
    )  # fmt: skip
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision=None: metadata)
    code, out, err = run("someone/tiny", *HEADS, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["cost"]["after"]["query_heads"] == {"decoder": 8}
    assert hub == ["config.json", "adapter_config.json"]


def test_config_and_weights_are_of_one_commit_though_the_branch_moves(run, hub, tmp_path, monkeypatch):
    import huggingface_hub

    commit, asked = "b" * 40, []
    folder = tmp_path / "snapshots" / commit
    shutil.copytree(tmp_path / "remote", folder)

    def snapshot_download(name, revision=None, allow_patterns=()):
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, out, err = run("someone/tiny", *HEADS, *QUIET, "--json")
    assert code == 0, err
    assert asked[0] is None and set(asked[1:]) == {commit} and json.loads(out)["source"]["revision"] == commit


def test_network_faults_of_any_kind_are_one_line(run, monkeypatch):
    import huggingface_hub

    class ReadTimeoutError(Exception):
        pass

    def fail(*arguments, **options):
        raise ReadTimeoutError("the read\noperation timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = run("someone/tiny", *HEADS)
    assert (code, err) == (3, "error: someone/tiny could not be downloaded: the read operation timed out\n")


def test_same_input_gives_the_same_bytes(run, source):
    for name in ("one", "two"):
        assert run(source, *HEADS, *QUIET, "-o", name)[0] == 0
        time.sleep(0.01)
    weights = [open(f"{name}/model.safetensors", "rb").read() for name in ("one", "two")]
    assert weights[0] == weights[1]
