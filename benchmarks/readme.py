"""README's tables of speed and of the variants, from benchmarks/results: nothing in them is typed.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by benchmarks/readme.py -->", "<!-- end of {} -->"


def cell(row: dict[str, Any]) -> str:
    gained = row["speedup"]
    return f"{gained['median']:.2f}× ({gained['low']:.2f}–{gained['high']:.2f}), ideal {row['ideal']:.2f}×"


def table(found: dict[str, Any]) -> list[str]:
    """Whole models: a row for each mode and length, a column for each pair of head counts."""
    lines = []
    for family, shape in (("gpt2", "GPT-2 small's shape"), ("t5", "T5 small's shape")):
        if family not in found:
            continue
        rows = [row for row in found[family]["rows"] if row["part"] == "model"]
        first, *others = found[family]["heads"].values()
        lines += [f"| {shape}, {first} heads to | {' | '.join(others)} |", "|---|" + "---|" * len(others)]
        names = list(found[family]["heads"])[1:]
        for mode, length in dict.fromkeys((row["mode"], row["length"]) for row in rows):
            cells = [
                cell(row)
                for name in names
                for row in rows
                if (row["mode"], row["length"], row["model"]) == (mode, length, name)
            ]
            lines.append(f"| {mode}, {length:,} tokens | {' | '.join(cells)} |")
        for predicted in found[family]["predicted"]:
            told = [f"{predicted['speedup'][name]['median']:.2f}×" for name in names]
            lines.append(f"| prefill, {predicted['length']:,} tokens, predicted | {' | '.join(told)} |")
        lines.append("")
    first = found["gpt2"]
    row = first["rows"][0]
    versions = " ".join(f"{library} {version}" for library, version in first["versions"].items())
    lines.append(
        f"{first['device']} ({first['machine']}), {row['dtype']}, batch {row['batch']}, {versions}: "
        f"median and range of {first['repeats']} alternating rounds."
    )
    return lines


def variants(found: dict[str, Any]) -> list[str]:
    """The SQA paper's variants, trained from scratch."""
    lines = [
        "| variant | heads | held-out loss | accuracy | parameters | ms a batch | cache bytes a token | paper's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["variants"].items():
        took, (q, kv) = row["seconds_per_batch"], row["heads"]
        ms = f"{1e3 * took['median']:.0f} ({1e3 * took['low']:.0f}–{1e3 * took['high']:.0f})"
        lines.append(
            f"| {name} | {q}/{kv} | {row['loss']:.3f} | {row['accuracy']:.1%} | {row['parameters']:,} | {ms} "
            f"| {row['cache_bytes_per_token']:,} | {row['published_loss']:.4f} |"
        )
    shape = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in found["shape"].items())
    where = f"{found['machine']}, torch {found['versions']['torch']}"
    lines += ["", f"{where}; {shape}; {found['tokens']:,} tokens each, seeds: {found['seeds']}."]
    return lines


def main() -> None:
    text = README.read_text()
    for part, make, file in (("speed", table, "speed-cpu"), ("variants", variants, "variants-cpu")):
        lines = make(json.loads((HERE / "results" / f"{file}.json").read_text()))
        end = END.format(part)
        before, rest = text.split(end, 1)
        before = before[: before.rindex(BEGIN)]
        text = before + BEGIN + "\n" + "\n".join(lines) + "\n" + end + rest
    README.write_text(text)


if __name__ == "__main__":
    main()
