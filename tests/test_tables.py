"""Tables fit: no figure is ever cut, whatever the width; sqa-bench says what its figures come to."""

import csv
import io

import pytest
from helpers import plain_convert
from rich.console import Console
from test_verdict import report

from sqa_convert.cli import bench
from sqa_convert.cli.console import Out
from sqa_convert.cli.show_results import show_quality
from sqa_convert.cli.tables_that_fit import fitted_table
from sqa_convert.report.speed_table import speed_csv, speed_details, speed_rows, speed_sentence
from sqa_convert.report.tables import costs, quality_rows

ROW = {"loss": 12.3456, "perplexity": 123456.78, "kl": 10.0877, "kl_error": 0.0123, "top1": 0.817}
HEADS = {"sample:gpt2-medium": "16", "gpt2-medium-sqa-q8kv4": "8/4"}


def times(model, mode, length, median, **more):
    spread = {"median": median, "low": median * 0.9, "high": median * 1.1}
    return {
        "model": model, "part": "attention", "mode": mode, "length": length, "seconds": spread, "ideal": 1.0,
        "tokens_per_second": 180812.0, "peak_bytes": 123456789012, "cache_bytes": 12345678901, "batch": 1,
        "dtype": "float32", "attention": "sdpa",
    } | more  # fmt: skip


def speed(low, median, high, ideal=1.31):
    first, second = HEADS
    gained = {"median": median, "low": low, "high": high}
    rows = []
    for mode in ("prefill", "decode"):
        rows += [
            times(first, mode, 131072, 12.3),
            times(second, mode, 131072, 0.0456, speedup=gained, ideal=ideal, part="attention"),
        ]
    return {"heads": HEADS, "rows": rows, "compiled": False, "positions_extended": [], "repeats": 5}


TABLES = {
    "cost": costs(report() | {"context_tokens": 131072, "cost": {
        side: {
            "query_heads": {"encoder": 12, "decoder": [8, 9, 12], "cross": 12},
            "key_value_heads": {"encoder": 12, "decoder": 4, "cross": 12}, "parameters": 12345678901,
            "kv_cache_bytes_per_token": 123456789, "score_flops": 1.234e15, "attention_flops": 1.234e15,
        } for side in ("before", "after")
    }}),
    "quality": quality_rows(dict.fromkeys(("source", "converted", "uptrained"), ROW)),
    "answers": quality_rows({"uptrained": ROW | {"exact_match": 0.5, "rougeL": 0.25}}),
    "ratios": speed_rows(speed(1.1, 1.2, 1.3)),
    "three models": speed_rows(speed(1.1, 1.2, 1.3) | {"heads": HEADS | {"c": "4/4"}}),
    "times": next(speed_details(speed(1.1, 1.2, 1.3)))[1],
    "tasks": (["", *HEADS], [("lambada_openai_multilingual", "0.1234", "0.1234")]),
}  # fmt: skip


def shown(table, width):
    page = io.StringIO()
    Console(file=page, width=width, color_system=None).print(fitted_table(*table, width), width=width)
    return page.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_cell_is_cut(name, width):
    columns, rows = TABLES[name]
    said = shown((columns, rows), width)
    assert "…" not in said and max(map(len, said.splitlines())) <= width
    for figure in (cell for row in rows for cell in row[1:]):
        assert figure in (said if width >= 80 else " ".join(said.split()))
    for word in (word for column in columns for word in column.split()):
        assert word in said


def test_what_fits_is_a_table_and_what_does_not_is_read_row_by_row():
    assert "┃" in shown(TABLES["ratios"], 80) and "┃" in shown(TABLES["quality"], 80)
    assert "┃" not in shown(TABLES["times"], 40) and "tokens/s: 180,812" in shown(TABLES["times"], 40)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ((1.1, 1.2, 1.3), "prefill at 131,072 tokens 1.20× as fast; decode at"),
        ((0.9, 1.0, 1.1), "no faster and no slower for certain"),
        ((0.57, 0.58, 0.59), "0.58× as fast, far from the 1.31× of counting"),
    ],
)
def test_speed_is_told_in_a_sentence(figures, says):
    assert says in speed_sentence(speed(*figures)) and "gpt2-medium-sqa-q8kv4: " in speed_sentence(speed(*figures))


def test_every_row_is_a_line_of_csv():
    lines = list(csv.DictReader(io.StringIO(speed_csv(speed(1.1, 1.2, 1.3)))))
    assert [line["model"] for line in lines] == list(HEADS) * 2
    assert [line["speedup"] for line in lines] == ["", "1.2"] * 2 and lines[1]["heads"] == "8/4"


QUICK = ["--lengths", "16", "--repeats", "1", "--modes", "prefill", "--parts", "model"]


def test_bench_shows_ratios_and_on_demand_times(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_convert("sample:gpt2", 6, 2, output="out")
    code, out, _ = called(bench.main, "out", *QUICK)
    assert code == 0 and "│" in out and "prefill at 16 tokens" in out and "tokens/s" not in out
    code, out, err = called(bench.main, "out", *QUICK, "--csv")
    assert (code, err) == (0, "") and [row["model"] for row in csv.DictReader(io.StringIO(out))] == [
        "sample:gpt2",
        "out",
    ]
    code, out, _ = called(bench.main, "sample:gpt2", *QUICK, "--details")
    assert code == 0 and "tokens/s" in out


def test_models_that_do_other_work_are_not_compared(called):
    code, out, err = called(bench.main, "sample:gpt2", "sample:t5", *QUICK)
    assert (code, out) == (2, "") and "sample:gpt2 is decoder-only, sample:t5 is an encoder-decoder" in err


def test_a_terminal_breaks_sentences_between_words():
    out = Out(as_json=False, quiet=False, verbose=False)
    out.stdout = Console(file=io.StringIO(), width=50, force_terminal=True, color_system=None)
    warnings = [{"text": "this text says nothing of the model " * 4}]
    show_quality(out, {"quality": {"warnings": warnings, "tokens": 9, "data": "text"}, "seconds": {"convert": 1.0}})
    lines = out.stdout.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 50 and sum(line.count("nothing") for line in lines) == 4
