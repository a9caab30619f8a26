"""sqa-report: two conversions side by side."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from helpers import gpt2
from test_page import Page

from sqa_convert import convert
from sqa_convert.cli.report import main

POSITIONS = [{"from": 1, "to": 8, "mean": 0.2}, {"from": 9, "to": 16, "mean": 0.1}]


def measured(kl, error=0.001, data="text"):
    row = {"loss": 3 + kl, "perplexity": 20 + kl, "kl": kl, "top1": 0.9, "loss_error": error, "kl_error": error}
    source = {"loss": 3.0, "perplexity": 20.09, "kl": None, "top1": None}
    row["kl_by_position"] = POSITIONS
    return {"data": data, "tokens": 999, "documents": 9, "warnings": [], "source": source, "converted": row}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What a conversion writes, with errors of its layers as if it had been fitted."""
    work = tmp_path_factory.mktemp("two")
    gpt2().save_pretrained(work / "source")
    convert(work / "source", 8, 4, "mean", work / "out")
    report = json.loads((work / "out/report.json").read_text())
    for site in report["sites"]:
        site |= {"output_error": {"converted": 0.5, "refit": 0.25}, "kept": "refit"}
    return report


@pytest.fixture
def pair(real, tmp_path, monkeypatch):
    """Writes two folders, a and b, each of the report with changes; returns nothing."""
    monkeypatch.chdir(tmp_path)

    def write(**changed):
        for name in "ab":
            Path(name).mkdir(exist_ok=True)
            report = deepcopy(real) | {"output": name} | changed.get(name, {})
            Path(name, "report.json").write_text(json.dumps(report))

    return write


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (measured(0.2), measured(0.1), "b is nearer to the source: KL 0.2000 ± 0.0010 against 0.1000 ± 0.0010"),
        (measured(0.1, 0.01), measured(0.12, 0.01), "cannot be told apart: KL 0.1000 ± 0.0100 against 0.1200 ± 0.0100"),
        (measured(0.2), measured(0.1, data="other"), "They were measured on different text"),
        (measured(0.2), {}, "b has no KL to its source"),
    ],
)
def test_it_says_which_lost_less_where_that_can_be_said(first, second, says, pair, called):
    pair(a={"quality": first}, b={"quality": second})
    code, out, err = called(main, "a", "b")
    assert (code, err) == (0, "") and says in out and "a needs 0.33× the cache" in " ".join(out.split())
    page = Page(Path("a-beside-b.html").read_text())
    assert says in page.words and page.unnamed == [] and "script" not in page.tags
    assert "cost" in page.ids and "errors" in page.ids and "made" in page.ids
    assert ("quality" in page.ids) == bool(first) and "0.2500" in page.words


def test_what_they_do_not_share_is_told(pair, called, real):
    other = {"name": "<b>other", "revision": None, "architecture": "GPT2LMHeadModel"}
    changed = {"quality": measured(0.1), "source": real["source"] | other, "source_weights": {"x": 1}}
    changed |= {"sqa_convert": "9.9", "versions": {"torch": "1.0"}, "machine": {"cpu": "abacus", "cores": 1}}
    pair(a={"quality": measured(0.2)}, b=changed)
    code, out, _ = called(main, "a", "b", "--json", "-o", "page.html")
    told = json.loads(out)
    assert code == 0 and told["case"] == "apart" and "different sources" in told["text"]
    for said in ("different sources", "versions of sqa-convert", "versions of torch", "machines"):
        assert any(said in note for note in told["differences"]), said
    assert "<b>other" in Page(Path("page.html").read_text()).words
    assert json.loads(Path("a/report.json").read_text())["quality"]["converted"]["kl"] == 0.2  # read, not written


def test_what_cannot_be_compared_is_one_line(pair, called):
    pair()
    for arguments, code, says in (
        (("a", "none"), 3, "none: no such folder"),
        (("a", "./a"), 2, "are the same folder: give two"),
        (("a", "b", "-o", "a"), 2, "--output a is a folder"),
        (("a", "b", "-o", "no/page.html"), 2, "--output no/page.html cannot be written"),
        (("a", "b", "-o", "a/report.json"), 2, "exists already: give another, or --overwrite"),
        (("a",), 2, "Missing argument"),
    ):
        assert (found := called(main, *arguments))[0] == code and says in found[2] and found[2].count("\n") == 1
    whole = Path("b/report.json").read_text()
    for spoiled in ({"cost": {}}, {"sites": [{}]}, {"quality": {"source": 3, "converted": []}}):
        Path("b/report.json").write_text(json.dumps(json.loads(whole) | spoiled))
        code, _, err = called(main, "a", "b")
        assert code == 3 and "b/report.json is not whole" in err and err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b"]
