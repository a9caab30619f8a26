"""report.html: what a person sees of a report."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import gpt2

from sqa_convert import convert as convert_model
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.cli.bench import main as bench
from sqa_convert.cli.convert import main as convert
from sqa_convert.cli.uptrain import main as uptrain
from sqa_convert.report.page import report_page
from sqa_convert.report.page_bars import logarithmic, speed_bars
from sqa_convert.report.pictures import recovery_picture
from sqa_convert.report.sweep_report import frontier_picture

RECIPE = (
    "tokens: 1_024\nsequence_length: 32\nbatch_size: 8\nlearning_rate: 1.0e-3\nevaluations: 2\nheld_out_tokens: 2_048\n"
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.links, self.ids, self.words, self.tags = [], [], [], [], "", []
        self.unnamed = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = dict(attributes)
        needs = {"img": "alt", "th": "scope", "section": "aria-label"} | (
            {"div": "aria-label"} if "tabindex" in names else {}
        )
        self.unnamed += [tag] * (tag in needs and not names.get(needs[tag]))
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value for name, value in attributes if name == "id" and tag in ("h2",)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def read(path):
    return Page(Path(path).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, converted, uptrained and timed, and the page after each."""
    work, pages = tmp_path_factory.mktemp("work"), []
    torch.manual_seed(0)
    gpt2(vocab_size=2048, n_positions=256).save_pretrained(work / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "source" / name).write_bytes((SAMPLES / "gpt2" / name).read_bytes())
    (work / "few.yaml").write_text(RECIPE)
    source, out = str(work / "source"), str(work / "out")
    evenly = ["--q-groups", "8", "--kv-groups", "4", "--allocation", "uniform"]
    fitted = ["--calibration-tokens", "1024", "--refine-steps", "2"]
    commands = [
        (convert, [source, *evenly, *fitted, "--no-verify", "-o", out, "-q"]),
        (uptrain, [out, "--recipe", str(work / "few.yaml"), "--control", "-q"]),
        (bench, [out, "--lengths", "16,32", "--repeats", "2", "--parts", "attention", "-q"]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for command, arguments in commands:
            patch.setattr(sys, "argv", ["command", *arguments])
            with pytest.raises(SystemExit) as stop:
                command()
            assert stop.value.code == 0
            pages.append(read(work / "out/report.html"))
    return work / "out", pages


def test_every_command_that_adds_to_the_report_adds_to_the_page(folder):
    _, (converted, uptrained, timed) = folder
    always = ["quality", "cost", "errors", "passages", "heads", "similarity", "samples", "made", "load"]
    assert converted.ids == always
    assert set(uptrained.ids) == {*always, "recovery"}
    assert set(timed.ids) == {*always, "recovery", "speed"}


def test_it_needs_no_network_and_runs_nothing(folder):
    for page in folder[1]:
        assert "script" not in page.tags
        assert all(link.startswith(("#", "data:")) or link == "report.json" for link in page.links)
    text = (folder[0] / "report.html").read_text()
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)


def test_it_shows_what_was_measured(folder):
    out, (*_, page) = folder
    report = json.loads((out / "report.json").read_text())
    for row in ("source", "converted", "uptrained", "control"):
        assert f"{report['quality'][row]['loss']:.4f}" in page.words
    for text in report["samples"]:
        assert text.keys() == {"given", "source", "converted", "uptrained"}
        assert all(words in page.words for words in text.values())
    assert page.tags.count("svg") == 2 + len(report["sites"])  # curves of loss and KL
    assert report["verdict"]["text"] in " ".join(page.words.split())
    assert report["command"] in page.words and str(report["seed"]) in page.words and report["date"] in page.words
    assert "12 heads become 8 query and 4 key/value heads (decoder 0)" in page.words


def test_a_conversion_is_held_against_averaging(folder):
    first = folder[1][0]
    assert "mean is not this model" in " ".join(first.words.split())


def test_pictures_have_numbers_at_their_axes_and_names_as_they_are(folder):
    report = json.loads((folder[0] / "report.json").read_text())
    report["source"]["name"] = "/data/$a_{$b/<gpt2>"
    page = Page(report_page(report))
    assert "mathdefault" not in page.words and "/data/$a_{$b/<gpt2>" in page.words
    assert b"what uptraining took back" in recovery_picture(report, "page")


def test_no_name_of_a_picture_is_there_twice(folder):
    text = (folder[0] / "report.html").read_text()
    defined = re.findall(r'<(?:clipPath|linearGradient|path|g)[^>]* id="([^"]+)"', text)
    contents = {name: set() for name in defined}
    for name, content in re.findall(r'<clipPath id="([^"]+)">(.*?)</clipPath>', text, re.DOTALL):
        contents[name].add(" ".join(content.split()))
    assert all(len(found) <= 1 for found in contents.values())
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= contents.keys()


def test_names_and_texts_are_only_text(folder):
    report = json.loads((folder[0] / "report.json").read_text())
    evil = "</pre><script>alert(1)</script><b>"
    report["source"]["name"] = report["output"] = evil
    report["samples"][0]["converted"] = evil
    page = Page(report_page(report))
    assert "script" not in page.tags and page.words.count("alert(1)") >= 3


def test_halves_of_attention_and_the_worst_passages_are_shown(folder):
    out, (*_, page) = folder
    report = json.loads((out / "report.json").read_text())
    for site in report["sites"]:
        assert all(f"{half} {error:.4f}" in page.words for half, error in site["half_errors"].items())
    assert re.search(r"(Patterns|Values) cost more in \d of 2 attention layers", page.words)
    passages = report["quality"]["uptrained"]["worst_passages"]
    assert len(passages) == 3 and passages[0]["kl"] >= passages[-1]["kl"] > report["quality"]["uptrained"]["kl"]
    for passage in passages:
        assert "".join(text for text, _ in passage["tokens"]) in page.words
    passages[0]["tokens"][0][0] = "</pre><script>alert(1)</script>"
    assert "script" not in Page(report_page(report)).tags


def test_tables_have_heads_and_what_scrolls_or_is_seen_has_a_name(folder):
    text = (folder[0] / "report.html").read_text()
    for page in folder[1]:
        assert page.unnamed == [] and page.tags.count("table") >= 2
    assert text.count("<caption>") == text.count("<table") - 1  # that of ratios has its heading
    assert len(text) < 1.5e6


def test_bars_of_one_scale_can_be_told_apart():
    bars = logarithmic("KL", [("a", 0.01, "", ""), ("b", 0.02, "", ""), ("c", 2.0, "", ""), ("d", 0.0, "", "")]).bars
    shares = [bar.share for bar in bars]
    assert shares[2] == 100 and shares[1] - shares[0] > 5 < shares[0] and shares[3] == 0
    assert logarithmic("KL", [("a", 0.0, "", "")]).scale == "all are zero"


def test_ratios_have_what_counting_promises_beside_them(folder):
    speed = json.loads((folder[0] / "report.json").read_text())["speed"]
    charts = speed_bars(speed)
    assert [chart.title for chart in charts] == ["attention, prefill", "attention, decode", "attention, train"]
    assert all(bar.mark > 0 and bar.note.startswith("by count") for chart in charts for bar in chart.bars)


def test_a_plain_conversion_has_a_page_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["sample:t5", "--variant", "sqa", "--method", "mean", "--no-evaluate", "-o", "out", "-q"]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        convert()
    assert stop.value.code == 0
    page = read("out/report.html")
    assert page.ids == ["cost", "heads", "made", "load"] and "AutoModelForSeq2SeqLM" in page.words
    assert "Nothing was measured" in page.words and "Speed was not measured: sqa-bench out" in page.words


def test_the_page_shows_the_heads_of_layers_that_differ():
    even, uneven = (convert_model(gpt2(), method="mean", allocation=heads).report for heads in ("8/4,8/4", "4/2,12/6"))
    page = Page(report_page(uneven))
    assert "layers" in page.ids and "4/2" in page.words and "12/6" in page.words
    assert "layers" not in Page(report_page(even)).ids


def test_of_points_of_a_sweep_that_lie_beside_each_other_one_has_its_name_in_the_picture():
    measured = {9: (0.3, 0.3), 7: (0.1, 0.5), 6: (0.099, 0.505), 5: (0.01, 0.9), 8: (0.2, 0.7)}
    points = [
        {"q_groups": q, "kv_groups": 4, "allocation": "adaptive", "kl": kl, "predicted_kl": kl, "cost": cost}
        | {"frontier": q != 8, "knee": q == 6}
        for q, (kl, cost) in measured.items()
    ]
    picture = frontier_picture({"points": points}, "svg").decode()
    assert re.findall(r"<!-- (\d/4.*?) -->", picture) == ["6/4 (knee)", "9/4", "5/4"]
