"""How fast models are, in tables and a sentence: the ratio that was measured beside the one that counting promises."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

Table = tuple[list[str], list[tuple[str, ...]]]
"""column heads, and rows"""

FAR = 0.8
"""share of the ideal ratio below which a measured one is far from it"""


def speed_title(speed: Mapping[str, Any]) -> str:
    """Where, and how often, speed was measured."""
    row = speed["rows"][0]
    compiled = ", compiled" if speed["compiled"] else ""
    extended = ", ".join(speed["positions_extended"])
    repeated = f"; for timing alone {extended} repeat their positions beyond their own" if extended else ""
    return (
        f"{speed['device']} ({speed['machine']}), torch {speed['versions']['torch']}, {row['dtype']}, "
        f"{row['attention']}{compiled}, batch {row['batch']}; median (range) of {speed['repeats']} alternating rounds"
        f"{repeated}"
    )


def speed_rows(speed: Mapping[str, Any]) -> Table:
    """How many times as fast models are as the first: a row for each model, part, mode and length."""
    rows = []
    for row in _others(speed):
        gained, ideal = row.get("speedup"), row["ideal"]
        measured = "out of memory"
        if row["seconds"] is not None:
            measured = "" if gained is None else f"{gained['median']:.2f}× ({gained['low']:.2f}–{gained['high']:.2f})"
        rows.append(
            (_what(row), f"{row['length']:,}", measured, "" if ideal is None else f"{ideal:.2f}×", _called(speed, row))
        )
    named = len(speed["heads"]) > 2
    columns = ["", "tokens", "times as fast", "by count"]
    return [*columns, "model"] if named else columns, [row if named else row[:-1] for row in rows]


def speed_labels(speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ratios to the first model: "what" was measured, the "name" of a row, "measured", "shown", "ideal"."""
    several = len(speed["heads"]) > 2
    return [
        {
            "what": _what(row),
            "name": f"{row['length']:,} tokens" + (f", {row['model']}" if several else ""),
            "measured": None if row.get("speedup") is None else row["speedup"]["median"],
            "shown": "" if row.get("speedup") is None else f"{row['speedup']['median']:.2f}×",
            "ideal": row["ideal"],
        }
        for row in _others(speed)
    ]


def speed_details(speed: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables of everything measured, for each part and mode."""
    columns = ["", "tokens", "ms", "tokens/s", "peak MB", "cache MB"]
    for what in dict.fromkeys(map(_what, speed["rows"])):
        yield what, (columns, [_details(speed, row) for row in speed["rows"] if _what(row) == what])


def _details(speed: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    took = row["seconds"]
    ms = "out of memory" if took is None else f"{_ms(took['median'])} ({_ms(took['low'])}–{_ms(took['high'])})"
    rate = "" if took is None else f"{row['tokens_per_second']:,.0f}"
    return (
        _called(speed, row),
        f"{row['length']:,}",
        ms,
        rate,
        *map(_megabytes, (row["peak_bytes"], row["cache_bytes"])),
    )


def speed_sentence(speed: Mapping[str, Any]) -> str:
    """What the figures come to, for whole models where they were measured."""
    rows = [row for row in _others(speed) if row.get("speedup")]
    rows = [row for row in rows if row["part"] == "model"] or rows
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        row = max((row for row in rows if row["mode"] == mode), key=lambda row: row["length"])
        gained, ideal = row["speedup"], row["ideal"]
        told = f"{row['mode']} at {row['length']:,} tokens {gained['median']:.2f}× as fast"
        if gained["low"] <= 1 <= gained["high"]:
            told = f"{row['mode']} at {row['length']:,} tokens no faster and no slower for certain"
        if ideal is not None and gained["high"] < FAR * ideal:
            told += f", far from the {ideal:.2f}× of counting: at this size time goes elsewhere"
        said.append(told)
    if not said:
        return "nothing was measured beside the first model"
    subject = next(iter(rows))["model"] if len(speed["heads"]) == 2 else "the last model measured at its longest"
    return f"{subject}: {'; '.join(said)}."


_CSV = (
    "model", "heads", "part", "mode", "length", "batch", "dtype", "median_seconds", "low_seconds", "high_seconds",
    "tokens_per_second", "speedup", "speedup_low", "speedup_high", "ideal", "peak_bytes", "cache_bytes",
)  # fmt: skip


def speed_csv(speed: Mapping[str, Any]) -> str:
    """A line for each row, with a head."""
    page = io.StringIO()
    writer = csv.DictWriter(page, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in speed["rows"]:
        took, gained = row["seconds"] or {}, row.get("speedup") or {}
        spread = {f"{end}_seconds": took.get(end) for end in ("median", "low", "high")}
        ratio = {"speedup": gained.get("median"), "speedup_low": gained.get("low"), "speedup_high": gained.get("high")}
        writer.writerow(row | spread | ratio | {"heads": speed["heads"][row["model"]]})
    return page.getvalue()


def _others(speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    first = next(iter(speed["heads"]))
    return [row for row in speed["rows"] if row["model"] != first]


def _what(row: Mapping[str, Any]) -> str:
    return f"{row['part']}, {row['mode']}"


def _called(speed: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return f"{row['model']} ({speed['heads'][row['model']]})"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
