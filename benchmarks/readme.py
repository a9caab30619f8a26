"""README's table of speed, from benchmarks/results: nothing in it is typed.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by benchmarks/readme.py -->", "<!-- end of speed -->"


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


def main() -> None:
    lines = table(json.loads((HERE / "results" / "speed-cpu.json").read_text()))
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
