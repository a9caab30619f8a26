"""Calibration: what is captured, what is chosen, and that nothing is made worse."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from helpers import SOURCES, gpt2, logits, tokens
from helpers import t5 as any_t5
from transformers import AutoConfig, GPT2Model, T5EncoderModel, T5Model

import sqa_convert
from sqa_convert import evaluate
from sqa_convert.calibration import calibrate, candidates, fitter, memory_budget, site_fitters
from sqa_convert.calibration import text as calibration_text
from sqa_convert.calibration.activations import capture
from sqa_convert.calibration.fisher import sensitivity
from sqa_convert.calibration.load_source import load_source
from sqa_convert.checkpoints.find import open_source
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.conversion.convert_site import ConvertedSite, SiteRecord, read_site
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Calibration, Request
from sqa_convert.errors import DataError, QualityError, RecipeError
from sqa_convert.families import Site
from sqa_convert.heads import METHODS, Partition
from sqa_convert.text import self_generated as sampling
from sqa_convert.text.tokenizers import load_tokenizer

CPU = torch.device("cpu")
t5 = partial(any_t5, n_positions=64)
SHORT = Calibration(tokens=2048, refine_steps=8)


def convert(*asked, **how):
    """As many heads in each layer; tests/test_allocation.py has those that are shared out."""
    return sqa_convert.convert(*asked, **{"allocation": "uniform"} | how)


def prepared(model, heads=(8, 4), **options):
    source = ModelSource(model)
    return source, make_plan(source, Request(*heads, calibration=SHORT, **options))


def batches(model, count=3):
    rows = [{"input_ids": tokens(2, 16)} for _ in range(count)]
    return [r | {"labels": tokens(2, 9)} for r in rows] if model.config.is_encoder_decoder else rows


@pytest.mark.parametrize("kind", SOURCES)
def test_captured_inputs_explain_each_sites_output(kind):
    model = SOURCES[kind]()
    source, plan = prepared(model)
    given = batches(model)
    outputs = {site: [] for site in plan.sites}
    hooks = [
        model.get_submodule(site.prefix).register_forward_hook(lambda m, a, o, site=site: outputs[site].append(o[0]))
        for site in plan.sites
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for sites in (plan.sites, plan.sites[1:2], plan.sites[-1:]):
        for site, inputs in capture(model, sites, given, CPU).items():
            heads = read_site(plan, source, site).tensors()
            attention = plan.family.attention(site, plan.source_config)
            for batch, expected in zip(inputs, outputs[site], strict=True):
                output = attention.layer(heads, batch.x, batch.memory, batch.attended)
                torch.testing.assert_close(batch.count(output), batch.count(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_sensitivity_tells_how_much_an_error_moves_the_predictions(make):
    model = make()
    _, plan = prepared(model)
    given = batches(model, 24)
    site = plan.sites[-1]
    matrix = sensitivity(model, [site], given, CPU, torch.Generator().manual_seed(0))[site]
    assert torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix)[0] > -1e-7
    vectors = torch.linalg.eigh(matrix).eigenvectors.float()

    @torch.no_grad()
    def moved(direction):
        def push(module, arguments, output):
            return (output[0] + 0.05 * direction, *output[1:])

        expected = torch.cat([model(**b).logits.log_softmax(-1) for b in given])
        hook = model.get_submodule(site.prefix).register_forward_hook(push)
        got = torch.cat([model(**b).logits.log_softmax(-1) for b in given])
        hook.remove()
        return (expected.exp() * (expected - got)).sum(-1).mean().item()

    assert moved(vectors[:, -1]) > 3 * moved(vectors[:, 0])


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_the_default_method_calibrates_a_model_in_memory(make):
    source = make()
    before = {name: t.clone() for name, t in source.state_dict().items()}
    report = convert(source, 8, 4, calibration=SHORT).report
    assert all(torch.equal(t, before[name]) for name, t in source.state_dict().items())
    assert all(p.requires_grad for p in source.parameters())
    for site in report["sites"]:
        errors = site["output_error"]
        assert list(errors) == ["converted", "refit", "refined"]
        assert errors[site["kept"]] == min(errors.values()) and site["method"] in METHODS
        assert list(site["half_errors"]) == ["patterns", "values"] and min(site["half_errors"].values()) > 0
        partition = Partition(tuple(tuple(map(tuple, group)) for group in site["partition"]))
        assert (partition.heads, len(partition.clusters), len(partition.groups)) == (12, 8, 4)
    kl = report["calibration"]["kl_before_refine"]
    assert kl[report["calibration"]["chosen"]] == min(kl.values())
    assert set(kl) == set(candidates.CANDIDATES)


@pytest.mark.parametrize("alike", ["patterns", "values"])
def test_the_half_that_heads_share_already_costs_nothing(alike):
    source = gpt2()
    with torch.no_grad():
        for block in source.transformer.h:
            maps = block.attn.c_attn.weight.view(48, 3, 12, 4), block.attn.c_attn.bias.view(3, 12, 4)
            for part in maps:
                copied = part[..., slice(0, 2) if alike == "patterns" else slice(2, 3), :, :]
                copied.copy_(copied[..., [0] * 3 + [3] * 3 + [6] * 3 + [9] * 3, :])  # one of every three
    how = {"partition": "contiguous", "calibration": Calibration(tokens=2048, refit=True, refine_steps=0)}
    for site in convert(source, 8, 4, "mean", **how).report["sites"]:
        errors = site["half_errors"]
        other = errors["values" if alike == "patterns" else "patterns"]
        assert errors[alike] < 1e-4 < 0.01 < other


def test_the_same_seed_gives_the_same_weights():
    source = gpt2()
    results = [convert(source, 8, 4, calibration=SHORT, seed=seed).model.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_identity_changes_nothing_whatever_the_method(make, method):
    source, ids = make(), tokens()
    conversion = convert(source, 12, 12, method=method, calibration=SHORT)
    torch.testing.assert_close(logits(conversion.model, ids), logits(source, ids), rtol=1e-5, atol=1e-5)
    assert "calibration" not in conversion.report


def test_what_refine_makes_worse_is_not_kept(monkeypatch):
    source = gpt2()
    plain = convert(source, 8, 4, calibration=dataclasses.replace(SHORT, refine_steps=0)).model.state_dict()

    def spoil(heads, *arguments):
        return dataclasses.replace(heads, output=heads.output + 1)

    monkeypatch.setattr(fitter, "refine", spoil)
    conversion = convert(source, 8, 4, calibration=SHORT)
    assert {site["kept"] for site in conversion.report["sites"]} == {"refit"}
    assert all(torch.equal(plain[name], t) for name, t in conversion.model.state_dict().items())


def test_what_refit_makes_worse_is_not_kept(monkeypatch):
    monkeypatch.setattr(fitter, "refit", lambda heads, *a: dataclasses.replace(heads, output=heads.output * 9))
    report = convert(gpt2(), 8, 4, calibration=dataclasses.replace(SHORT, refine_steps=0)).report
    assert {site["kept"] for site in report["sites"]} == {"converted"}


def test_activations_that_fit_are_read_once(monkeypatch):
    passes = []
    monkeypatch.setattr(
        site_fitters, "capture", lambda model, sites, *a: passes.append(len(sites)) or capture(model, sites, *a)
    )
    convert(gpt2(layers=2), 8, 4, allocation="adaptive", calibration=SHORT)
    assert passes == [2]


@pytest.mark.integration
def test_little_memory_gives_the_same_result_in_several_passes(monkeypatch):
    source = t5()
    whole = convert(source, 8, 4, calibration=SHORT).model.state_dict()
    monkeypatch.setattr(memory_budget, "MOST_ACTIVATIONS", 1)
    passes = []
    monkeypatch.setattr(
        site_fitters, "capture", lambda model, sites, *a: passes.append(sites) or capture(model, sites, *a)
    )
    parts = convert(source, 8, 4, calibration=SHORT).model.state_dict()
    assert {len(sites) for sites in passes} == {1} and len(passes) > len(source.encoder.block)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_sites_left_out_keep_their_heads(threads):
    torch.set_num_threads(threads)
    conversion = convert(t5(), 8, 4, sites=["cross"], calibration=SHORT)
    for site in conversion.report["sites"]:
        assert ("output_error" in site) == (site["kind"] == "cross")


def test_few_tokens_are_warned_about():
    source = gpt2()
    assert convert(source, 8, 4, calibration=SHORT).report["calibration"]["warnings"] == []
    few = convert(gpt2(n_positions=8), 8, 4, calibration=Calibration(tokens=16, refine_steps=0)).report
    warning = few["calibration"]["warnings"][0]
    assert " calibration tokens for 33 unknowns of a fit, 20 for each" in warning["text"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: GPT2Model(gpt2().config), id="gpt2"),
        pytest.param(lambda: T5EncoderModel(t5().config), id="t5-encoder"),
        pytest.param(lambda: T5Model(t5().config), id="t5", marks=pytest.mark.integration),
    ],
)
def test_models_without_a_language_model_head_calibrate_on_random_tokens(make, tmp_path):
    model = make().eval()
    assert "random tokens" in convert(model, 8, 4, calibration=SHORT).report["calibration"]["text"]
    model.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", 8, 4, output=tmp_path / "out", calibration=SHORT).report
    assert "kl_before_refine" not in report["calibration"]


@pytest.mark.parametrize("layers", [1, 2])
def test_one_layer_is_enough(layers):
    report = convert(gpt2(layers=layers), 6, 3, calibration=SHORT).report
    assert len(report["sites"]) == layers


@pytest.mark.integration
def test_text_of_the_users_is_read(tmp_path):
    text = "\n".join(f"def f{i}(x): return x + {i}" for i in range(3000))
    (tmp_path / "own.txt").write_text(text)
    options = {"method": "svd", "output": tmp_path / "out"}
    report = convert(
        "sample:gpt2", 8, 4, calibration=Calibration(str(tmp_path / "own.txt"), 4096, refine_steps=0), **options
    ).report
    assert report["calibration"]["text"] == f"{tmp_path / 'own.txt'}, training part"
    with pytest.raises(DataError, match=r"give more with calibration$"):
        (tmp_path / "short.txt").write_text("x = 1\n" * 9)
        convert("sample:gpt2", 8, 4, calibration=str(tmp_path / "short.txt"))
    with pytest.raises(DataError, match="tokenizer"):
        convert(gpt2(), 8, 4, calibration=str(tmp_path / "own.txt"))


def test_sampled_texts_are_documents_and_windows_of_several_lengths():
    model = gpt2()
    rows = sampling.own_rows(model, 4000, 32, CPU, torch.Generator().manual_seed(0))
    end, lengths = model.config.eos_token_id, [len(row) for row in rows]
    assert 4000 <= sum(lengths) < 4400 and max(lengths) == 32 and len(set(lengths)) > 8
    assert all(end not in row[1:-1] for row in rows)  # nothing goes on after its end
    starts = torch.stack([row[0] for row in rows])
    assert (starts == model.config.bos_token_id).float().mean() > 0.15 and len(starts.unique()) > 20


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"repetition_penalty": 9.0}, {"return_dict_in_generate": True}]
)
def test_samples_follow_the_models_distribution_whatever_its_generation_config(settings):
    model = gpt2()
    with torch.no_grad():  # two tokens of one probability, one of them the end of text
        model.transformer.wte.weight[7] = model.transformer.wte.weight[model.config.eos_token_id]
    model.generation_config.update(**settings)
    begin = torch.zeros(400, 1, dtype=torch.long)
    texts = sampling.continued(model, begin, 32, CPU, torch.Generator().manual_seed(0))
    ids = torch.cat([text[1:] for text in texts])
    ends, twins = ((ids == token).sum().item() for token in (model.config.eos_token_id, 7))
    assert twins > 40 and abs(ends - twins) < 0.5 * twins
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def test_a_partition_that_is_asked_for_is_used_by_every_candidate():
    report = convert(gpt2(), 8, 4, partition="contiguous", calibration=SHORT).report
    assert {str(site["partition"]) for site in report["sites"]} == {str(Partition.contiguous(12, 8, 4).groups)}
    searched = convert(gpt2(), 8, 4, partition="searched", calibration=SHORT).report
    assert set(searched["calibration"]["kl_before_refine"]) == {"svd", "procrustes"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_keep_their_dtype(dtype):
    model = convert(gpt2().to(dtype), 8, 4, calibration=SHORT).model
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_memory_that_runs_out_is_one_line(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(site_fitters, "capture", full)
    with pytest.raises(RecipeError, match="calibration=None"):
        convert(gpt2(), 8, 4, calibration=SHORT)


def test_impossible_calibrations_are_refused():
    with pytest.raises(RecipeError, match="mean fits nothing"):
        convert(gpt2(), 8, 4, "mean", calibration="stdlib")
    for options in ({"tokens": 0}, {"refine_steps": -1}):
        with pytest.raises(RecipeError, match=r"^Calibration\("):
            convert(gpt2(), 8, 4, calibration=Calibration(**options))
    with pytest.raises(RecipeError, match="searched or contiguous"):
        convert(gpt2(), 8, 4, partition="best")


def test_published_methods_fit_only_when_told_to():
    source = gpt2()
    assert "calibration" not in convert(source, 8, 4, "mean").report
    report = convert(source, 8, 4, "mean", calibration=Calibration(tokens=2048, refit=True)).report
    assert list(report["sites"][0]["output_error"]) == ["converted", "refit"]
    assert report["sites"][0]["partition"] == Partition.contiguous(12, 8, 4).groups


@pytest.mark.parametrize("method", ["svd", "mean"])
def test_every_layer_of_a_t5_follows_the_position_bias_of_what_it_kept(method):
    source = t5(layers=3)
    with torch.no_grad():
        for name, weights in source.named_parameters():
            if name.endswith((".q.weight", ".k.weight")):
                weights.zero_()  # only the position bias attends
    conversion = convert(source, 8, 4, method, calibration=None)
    tables = {
        kind: getattr(source, kind).block[0].layer[0].SelfAttention.relative_attention_bias.weight.T
        for kind in ("encoder", "decoder")
    }
    for site in conversion.report["sites"]:
        if site["kind"] == "cross":
            continue
        stack = getattr(conversion.model, site["kind"])
        made = stack.block[site["layer"]].layer[0].SelfAttention.relative_attention_bias.weight.T
        clusters = [cluster for group in site["partition"] for cluster in group]
        for column, cluster in zip(made, clusters, strict=True):
            members = tables[site["kind"]][list(cluster)]
            wanted = members.mean(0, keepdim=True) if method == "mean" else members
            assert any(torch.allclose(column, row) for row in wanted)


def test_the_number_of_threads_changes_no_bit_of_a_conversion_from_the_weights_alone(monkeypatch):
    source, results, used = gpt2(), [], set()
    method = METHODS["svd"]

    def watched(*arguments):
        used.add(torch.get_num_threads())
        return method.convert(*arguments)

    monkeypatch.setitem(METHODS, "svd", dataclasses.replace(method, convert=watched))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(convert(source, 8, 4, calibration=None).model.state_dict())
        assert torch.get_num_threads() == threads and used == {1}
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_without_text_the_weights_alone_serve(name):
    source = open_source(f"sample:{name}")
    plan = make_plan(source, Request(8, 4, calibration=None))
    assert plan.method == "svd" and plan.calibration is None and plan.searched


@pytest.mark.integration
def test_calibration_recovers_most_of_what_mean_loses(tmp_path):
    measured = {}
    for method, settings in (
        ("mean", None),
        ("svd", None),
        ("auto", Calibration(tokens=8192, refine_steps=5)),
    ):
        out = tmp_path / f"{method}{settings is None}"
        convert("sample:t5", 8, 4, method, out, calibration=settings)
        measured[method, settings is None] = evaluate(out, "sample:t5", tokens=2048)["model"]["kl"]
    mean = measured["mean", True]
    assert measured["svd", True] < mean / 5
    assert measured["auto", False] < mean / 25
    assert "</svg>" in (out / "similarity.svg").read_text() and "similarity.svg" in (out / "README.md").read_text()
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).num_key_value_heads == 4


def test_what_is_no_calibration_is_refused_in_one_line():
    with pytest.raises(RecipeError, match="calibration=False"):
        convert(gpt2(), 8, 4, calibration=False)


def test_where_no_candidate_is_finite_auto_says_so(monkeypatch):
    monkeypatch.setattr(calibrate.Calibrator, "kl", lambda self, plan, choice: None)
    with pytest.raises(QualityError, match=r"auto: of svd, .* none predicts anything finite"):
        convert(gpt2(heads=4, layers=1), 2, 1, calibration=Calibration(tokens=256, refine_steps=0))


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_activations_that_overflow_are_said_in_one_line(method):
    source = gpt2(heads=4, layers=2)
    source.transformer.h[1].attn.c_attn.weight.data.mul_(1e15)
    with pytest.raises(QualityError, match="activations overflow on the calibration text"):
        convert(source, 2, 1, method=method, calibration=Calibration(tokens=256, refine_steps=0, polish_steps=0))


def test_an_error_that_is_no_number_is_never_the_least():
    nan, partition = float("nan"), Partition.contiguous(4, 2, 1)
    assert SiteRecord("svd", partition, {"converted": nan, "refit": 0.5}).kept == "refit"
    bad, good = (
        ConvertedSite(None, SiteRecord(name, partition, {"converted": error}))
        for name, error in (("svd", nan), ("mean", 0.9))
    )
    site = Site("decoder", 0, "h.0.attn")
    assert calibrate.best_of_each({"svd": {site: bad}, "mean": {site: good}}) == {site: good}
    with pytest.raises(QualityError, match="decoder 0: no fit"):
        calibrate.best_of_each({"svd": {site: bad}})


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_calibration_text_is_drawn_across_documents_from_the_column_that_is_named(name, tmp_path):
    texts = [None, *(f"{i} {i}\n" * 900 for i in range(100))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    wanted = Calibration(str(tmp_path / "a.jsonl"), 2048, refit=True, refine_steps=0, text_column="content")
    source = open_source(f"sample:{name}")
    plan = make_plan(source, Request(8, 4, method="mean", calibration=wanted))
    model = load_source(plan, source)
    text = calibration_text.calibration_text(model, plan, source, CPU, torch.Generator())
    tokenizer = load_tokenizer(source.folder)
    rows = [row for batch in text.batches + text.held_out for row in batch["input_ids"]]
    numbers = {tokenizer.decode(row).replace("<extra_id", " ").split()[1] for row in rows}
    assert len(numbers) == len(rows) >= 4
    assert text.name.startswith(f"{tmp_path}/a.jsonl, training part, 1 rows without text skipped")
