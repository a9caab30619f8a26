"""What a report is said to mean: a table of cases, real runs that reach each of them, and how sure the figures are."""

import json
from pathlib import Path

import pytest
import torch

from sqa_convert import Calibration, convert
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.load import load_model
from sqa_convert.evaluation.measure import measured_by_document, predict
from sqa_convert.evaluation.standard_errors import DocumentSums, by_position, document_numbers, gain, standard_error
from sqa_convert.evaluation.worst_passages import spelled, worst_passages
from sqa_convert.report.next_steps import RECIPES, more_heads
from sqa_convert.report.report_json import read_report
from sqa_convert.report.verdict import verdict
from sqa_convert.report.write import write_report
from sqa_convert.text.tokenizers import load_tokenizer
from sqa_convert.uptraining.recipe import load_recipe

HEADS = {"decoder": 12}


def report(converted=None, uptrained=None, warnings=(), method="auto", **more):
    """A report of a model with loss 3 whose result has these figures."""
    rows = {name: row for name, row in (("converted", converted), ("uptrained", uptrained)) if row is not None}
    source = {"loss": 3.0, "perplexity": 20.09, "kl": None}
    quality = {"source": source, "tokens": 16384, "documents": 64, "data": "text", "warnings": list(warnings)} | rows
    result = {
        "method": method,
        "architecture": "SQAGPT2LMHeadModelForCausalLM",
        "output": "out",
        "context_tokens": 1024,
        "calibration": {},
        "cost": {
            "before": cost(12, 12, 124e6),
            "after": cost(8, 4, 110e6),
        },
    }
    result |= {"quality": quality} if rows else {}
    return result | ({"uptraining": {"tokens": 1000}} if uptrained else {}) | more


def cost(q, kv, parameters):
    return {
        "query_heads": {"decoder": q}, "key_value_heads": {"decoder": kv}, "parameters": parameters,
        "kv_cache_bytes_per_token": kv, "score_flops": q,
    }  # fmt: skip


def row(above, kl, error=0.001, **more):
    return {
        "loss": 3 + above,
        "perplexity": 2.718 ** (3 + above),
        "kl": kl,
        "loss_error": error,
        "kl_error": error,
    } | more


def doubt(rule):
    return {"rule": rule, "value": 1, "bound": 0, "text": "the source predicts this text no better; give other"}


CASES = {
    "no text": (report(not_measured="no tokenizer"), "no_text", "no tokenizer", "sqa-eval out --data TEXT"),
    "bad text": (
        report(row(0, 0), warnings=[doubt("guessing")]), "bad_text", "says nothing", "sqa-eval out --data TEXT",
    ),
    "doubts that are none": (report(row(0, 0.001), warnings=[doubt("built_in_text")]), "noise", "noise", ""),
    "noise": (report(row(0.0019, 0.004)), "noise", "loss +0.0019 ± 0.0010", ""),
    "good": (report(row(0.04, 0.03)), "good", "nearly as well", ""),
    "documents": (report(row(0.04, 0.03)), "good", "on 64 documents", ""),
    "fair": (report(row(0.2, 0.1)), "fair", "a little", "sqa-uptrain out --recipe gpt2-small"),
    "fair, trained": (report(row(0.5, 0.5), row(0.1, 0.1)), "fair", "a little", "sqa-uptrain out --tokens 4000"),
    "bad": (report(row(0.75, 0.77)), "bad", "lost much", "sqa-uptrain out --recipe gpt2-small"),
    "bad, averaged": (report(row(2, 2), method="mean"), "bad", "lost much", ""),
    "worse": (
        report(row(0.04, 0.03), row(0.3, 0.2, gain={"loss": -0.26, "loss_error": 0.01, "kl": -0.17, "kl_error": 0.01})),
        "worse", "worse", "",
    ),
    "other text": (report(row(0.5, 0.5), warnings=[doubt("fitted_elsewhere")]), "other_text", "other text", ""),
    "its own data": (
        report(row(0.2, 0.1), command="sqa-convert x --data 'my text.txt'"), "fair", "a little",
        "sqa-uptrain out --recipe gpt2-small --data 'my text.txt'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_rules(name):
    given, case, says, command = CASES[name]
    said = verdict(given)
    assert (said.case, said.command) == (case, command)
    assert says in said.text and "0.33× the cache, 0.67× the T² arithmetic" in said.gained
    assert "not measured" in said.gained and said.next


def test_more_heads_are_named_and_possible():
    assert "--q-groups 12 --kv-groups 6" in verdict(report(row(0.75, 0.77))).next
    assert "without --method mean" in verdict(report(row(0.75, 0.77), method="mean")).next


def test_heads_shared_out_among_layers_are_advised_where_all_layers_have_as_many():
    layers = [{"kind": "decoder"}] * 2
    for name, quality in (("fair", row(0.2, 0.1)), ("bad", row(0.75, 0.77))):
        fitted = report(quality) | {"sites": layers, "calibration": {"text": "own"}}
        assert verdict(fitted).case == name and "--allocation adaptive" in verdict(fitted).next
        for other in ({"sites": layers[:1]}, {"calibration": None}, {"calibration": {"allocation": {}}}):
            assert "adaptive" not in verdict(fitted | other).next


@pytest.mark.parametrize(("decoder", "flags"), [([8, 6], " (--q-groups 12 --kv-groups 6)"), (12, "")])
def test_more_heads_are_named_where_every_kind_of_attention_was_converted(decoder, flags):
    allocation = {"kept": True, "mean": [7, 4]}
    given = report(row(0.75, 0.77), calibration={"allocation": allocation})
    for side, heads in (("before", (12, 12)), ("after", ([8, 6], decoder))):
        for key in ("query_heads", "key_value_heads"):
            given["cost"][side][key] = dict(zip(("encoder", "decoder"), heads, strict=True))
    assert more_heads(given) == flags


def test_speed_that_was_measured_is_told_with_its_noise():
    rows = [{"part": "model", "mode": "prefill", "model": "b", "length": 1024}]
    speed = {"heads": {"a": "12", "b": "8/4"}, "rows": rows}
    for low, says in ((1.1, "1.19× as fast."), (0.9, "no difference")):
        rows[0]["speedup"] = {"median": 1.19, "low": low, "high": 1.3}
        assert says in verdict(report(row(0, 0), speed=speed)).gained


def test_recipes_that_are_advised_are_there():
    for fitting in RECIPES.values():
        for name, _, tokens in fitting:
            assert load_recipe(name).tokens == tokens


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_standard_errors_agree_with_a_bootstrap_over_documents(spread):
    counts = torch.randint(5, 400, (60,)).double()
    sums = counts * torch.randn(60).mul(spread).add(1).double()
    drawn = torch.randint(60, (4000, 60))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert standard_error(sums, counts) == pytest.approx(float(means.std()), rel=0.15)


def test_pairs_are_surer_than_what_they_are_of():
    counts = torch.randint(5, 400, (60,)).double()
    before = counts * torch.randn(60).double().exp()
    sums = [DocumentSums(counts, before), DocumentSums(counts, before - 0.1 * counts)]
    better = gain(*sums)
    assert better["loss"] == pytest.approx(0.1) and better["loss_error"] < 1e-6 < standard_error(before, counts)
    assert standard_error(before[:1], counts[:1]) is None


def test_documents_of_a_block_are_told_apart():
    batch = {"labels": torch.zeros(2, 5), "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])}
    assert document_numbers(batch, True, 3).tolist() == [3, 4, 4, 4, 5, 5, 5, 6]
    assert document_numbers({"labels": torch.zeros(2, 2)}, False, 0).tolist() == [0, 0, 1, 1]


def test_positions_begin_again_with_each_document():
    documents = torch.tensor([0] * 20 + [2] * 9)
    values = torch.cat([torch.arange(1, 21), torch.arange(1, 10)]).double()
    found = by_position(values, documents)
    assert [(part["from"], part["to"]) for part in found] == [(1, 8), (9, 16), (17, 32)]
    assert [part["mean"] for part in found] == pytest.approx([4.5, 109 / 9, 18.5], abs=1e-6)


def test_worst_passages_are_of_different_documents_and_spelled_whole():
    documents = torch.tensor([0] * 60 + [1] * 60 + [2] * 3 + [3] * 20)
    kl = torch.full((143,), 0.1)
    kl[5], kl[100], kl[121], kl[130] = 4, 9, 50, 3  # that of three tokens is too short
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    labels = torch.tensor((tokenizer("def naïve(x): return 'šč€'\n" * 20)["input_ids"] * 9)[:143])
    found = worst_passages(kl, labels, documents)
    assert [passage["document"] for passage in found] == [2, 4, 1]
    assert found[0]["from"] + found[0]["each"].index(9.0) == 41 and found[1]["kl"] == pytest.approx(0.245)
    for passage, told in zip(found, spelled(found, SAMPLES / "gpt2"), strict=True):
        assert "".join(text for text, _ in told["tokens"]) == tokenizer.decode(passage["ids"])
        assert max(value for _, value in told["tokens"]) == max(passage["each"])
    assert spelled(found, Path("no/tokenizer/here")) == []


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little Python source, many documents."""
    lines = Path(json.__file__).read_text().splitlines()
    documents = ["\n".join(lines[i : i + 40]) for i in range(0, 300, 5)] + [str(i) for i in range(9)]
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.mark.parametrize(
    ("heads", "case"),
    [
        ({"q_groups": 12, "kv_groups": 12, "method": "mean"}, "noise"),
        ({"allocation": "12/12,8/4,12/12,12/12", "method": "svd"}, "good"),
        ({"allocation": "12/12,12/12,8/4,12/12", "method": "svd"}, "fair"),
        ({"q_groups": 2, "kv_groups": 1, "method": "mean"}, "bad"),
    ],
)
def test_real_conversions_reach_their_cases(heads, case, text, tmp_path):
    how = {"output": tmp_path / "out", "evaluate": True, "verify": False, "calibration": None}
    result = convert("sample:gpt2", **heads, data=text, **how)
    assert verdict(result.report).case == result.report["verdict"]["case"] == case
    assert result.report["verdict"]["text"] in " ".join((tmp_path / "out/README.md").read_text().split())


def test_heads_fitted_to_other_text_are_told_to_be(text, tmp_path):
    (tmp_path / "digits.txt").write_text("0 1 2 3 4 5 6 7 8 9\n" * 2000)
    fitted = Calibration(tmp_path / "digits.txt", tokens=2048, refine_steps=0, polish_steps=0)
    how = {"output": tmp_path / "out", "evaluate": True, "verify": False, "data": text, "calibration": fitted}
    assert convert("sample:gpt2", 6, 2, "svd", **how).report["verdict"]["case"] == "other_text"


@pytest.mark.integration
def test_standard_errors_of_a_model_agree_with_a_bootstrap_over_its_documents():
    source, held_out = load_model(SAMPLES / "gpt2"), prepare(SAMPLES / "gpt2", device="cpu")
    converted = convert("sample:gpt2", 10, 5, "svd", calibration=None).model
    expected = predict(source, held_out)
    _, before = measured_by_document(expected)
    quality, after = measured_by_document(predict(converted, held_out), expected, before)
    documents = len(after.counts)
    assert documents > 20
    drawn = torch.randint(documents, (4000, documents))
    for sums, error in ((after.loss - before.loss, quality.loss_error), (after.kl, quality.kl_error)):
        means = sums[drawn].sum(1) / after.counts[drawn].sum(1)
        assert error == pytest.approx(float(means.std()), rel=0.15)


def test_gibberish_is_bad_text(tmp_path):
    drawn = torch.randint(33, 126, (60, 300), generator=torch.Generator().manual_seed(0))
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps({"text": "".join(map(chr, row))}) + "\n" for row in drawn))
    how = {"method": "mean", "output": tmp_path / "out", "evaluate": True, "verify": False}
    assert convert("sample:gpt2", 6, 2, data=tmp_path / "noise.jsonl", **how).report["verdict"]["case"] == "bad_text"
    unmeasured = convert("sample:gpt2", 6, 2, overwrite=True, **how | {"evaluate": False})
    assert unmeasured.report["verdict"]["case"] == "no_text"


@pytest.mark.integration
def test_training_that_harms_and_training_that_helps(text, tmp_path):
    how = {"tokens": 2048, "sequence_length": 64, "batch_size": 8, "data": text, "held_out_tokens": 1024}
    few = Calibration(tokens=4096, refine_steps=2)
    out = convert("sample:gpt2", 6, 2, method="svd", output=tmp_path / "out", calibration=few)
    assert out.uptrain(learning_rate=0.5, keep_anyway=True, **how).report["verdict"]["case"] == "worse"


def test_a_report_from_before_is_read(tmp_path):
    old = read_report(convert("sample:gpt2", 6, 2, method="mean", output=tmp_path / "out").output)
    plain = {"loss": 3.0, "perplexity": 20.1, "kl": None, "top1": None}
    old["quality"] = {
        "data": "text",
        "tokens": 9,
        "device": "cpu",
        "source": plain,
        "converted": plain | {"kl": 0.5, "top1": 0.9},
    }
    del old["verdict"]
    write_report(tmp_path / "out", old)
    assert "KL 0.5000" in read_report(tmp_path / "out")["verdict"]["text"]
