"""The tables of README.md, docs/results.md and docs/trust.md, from benchmarks/results: nothing in them is typed.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE.parent / "docs" / "results.md"
TRUST = HERE.parent / "docs" / "trust.md"
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


def summary(*found: dict[str, Any]) -> list[str]:
    """KL to the source of both samples, converted and then uptrained, from the records of methods and of recovery."""
    methods, recoveries = found[:2], found[2:]

    def converted(method: str, stage: str) -> list[float]:
        wanted = {"q": 8, "kv": 4, "sites": "all", "method": method, "stage": stage}
        return [row["kl"] for sample in methods for row in sample["rows"] if wanted.items() <= row.items()]

    def uptrained(start: str) -> list[float]:
        return [sample["8/4"][start]["kl"]["mean"] for sample in recoveries]

    rows = {
        "heads averaged (`mean`)": (converted("mean", "converted"), uptrained("mean, CE"), "cross-entropy"),
        "heads rotated, averaged and refined (`procrustes`)": (
            converted("procrustes", "refined"), uptrained("procrustes, KL"), "KL",
        ),
        "the default": (converted("auto", "refined"), uptrained("default, KL"), "KL"),
    }  # fmt: skip
    return [
        "| KL to the source, 12 → 8/4 heads | `sample:gpt2` | after 0.6 M tokens | `sample:t5` | after 0.6 M tokens |",
        "|---|---|---|---|---|",
        *(
            f"| {name}, trained with {loss} | {gpt2:.3f} | {gpt2_after:.3f} | {t5:.3f} | {t5_after:.3f} |"
            for name, ((gpt2, t5), (gpt2_after, t5_after), loss) in rows.items()
        ),
    ]


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


def conversion(found: dict[str, Any]) -> list[str]:
    """What a conversion takes, beside copying the folder: medians, with the range of the ratio."""
    ways = {"cp, sync": "`cp -r`, `sync`", "mean, --no-verify": "`mean --no-verify`", "mean": "`mean`"}
    lines = [
        f"| random weights of the shape of | `cp -r` | {' | '.join(ways.values())} |",
        "|---|---|" + "---|" * len(ways),
    ]
    for name in dict.fromkeys(key.split(",")[0] for key in found if ", cp" in key):
        copied = found[f"{name}, cp"]
        cells = [f"{name}, {copied['source_bytes'] / 1e9:.1f} GB", f"{copied['seconds']['median']:.2f} s"]
        for way in ways:
            row = found[f"{name}, {way}"]
            low, ratio, high = (row["times_cp"][key] for key in ("min", "median", "max"))
            memory = "" if "cp" in way else f", {row['peak_resident_MB']['median'] / 1e3:.2f} GB"
            cells.append(f"{row['seconds']['median']:.2f} s{memory}: {ratio:.2f}× ({low:.2f}–{high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    svd, dry = found["gpt2-xl, svd, --no-calibration, --no-verify"], found["dry run 45 GB"]
    versions = f"Python {found['versions']['python']}, numpy {found['versions']['numpy']}"
    svd_said = f"{svd['seconds']['median']:.0f} s, {svd['peak_resident_MB']['median'] / 1e3:.2f} GB"
    dry_said = f"{dry['seconds']['median']:.1f} s"
    note = (
        f"{found['machine']}, {versions}; seconds, peak memory and times `cp -r`, medians of {found['repeats']} rounds "
        f"in random order. `svd --no-calibration --no-verify` of gpt2-xl's shape, once: {svd_said}. `--dry-run` on a "
        f"checkpoint of {dry['source_bytes'] / 1e9:.0f} GB: {dry_said}."
    )
    return [*lines, "", *textwrap.wrap(note, 120, break_on_hyphens=False)]


def faults(found: dict[str, Any]) -> list[str]:
    """What was done to running commands, and what was lost: one row for each kind, --overwrite with the rest."""
    rows: dict[str, dict[str, int]] = {}
    for name, row in found["rows"].items():
        kind = rows.setdefault(name.removesuffix(", --overwrite"), dict.fromkeys(FAULTS, 0))
        for key in FAULTS:
            kind[key] += row[key]
    rows["**all**"] = {key: found["sum"][key] for key in FAULTS}
    lines = [f"| fault | {' | '.join(FAULTS.values())} |", "|---|" + "---|" * len(FAULTS)]
    lines += [f"| {name} | {' | '.join(f'{row[key]:,}' for key in FAULTS)} |" for name, row in rows.items()]
    return [*lines, "", f"{found['machine']}, Python {found['versions']['python']}, {found['date']}."]


FAULTS = {
    "trials": "runs",
    "met": "met it",
    "survived": "as it should be",
    "lost": "output lost",
    "source_changed": "source changed",
    "strays_after_next": "left behind after the next run",
}


def hostile(found: dict[str, Any]) -> list[str]:
    """Checkpoints made to do harm."""
    made, fuzzed = found["checkpoints"], found["fuzzed"]
    refused = sum(n for ends in fuzzed["became"].values() for end, n in ends.items() if end != "converted")
    rows: list[tuple[str, int, int, int, float, float]] = [
        (f"{made['number']}, made by hand, given to the commands", made["runs"], made["refused"], len(made["wrong"]),
         made["slowest refusal"], made["largest refusal MB"]),
        (f"drawn mutations, planned and converted in memory, seed {fuzzed['seed']}", fuzzed["inputs"], refused,
         len(fuzzed["escaped"]),
         fuzzed["slowest_s"], fuzzed["MB"]),
    ]  # fmt: skip
    return [
        "| checkpoints | runs | refused | wrong behaviour | slowest | most memory |",
        "|---|---|---|---|---|---|",
        *(
            f"| {what} | {n:,} | {no:,} | {bad} | {slowest:.1f} s | {most:.0f} MB |"
            for what, n, no, bad, slowest, most in rows
        ),
    ]


def mutants(found: dict[str, Any]) -> list[str]:
    """Does the suite notice when the code is wrong?"""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    ways = ", ".join(f"{count} by {way}" for way, count in found["noticed by"].items())
    later = f" {found['noticed later']} more by tests written since." if found["noticed later"] else ""
    told = f"{found['killed']} of {found['tried']} ({found['ratio']:.1%}) were noticed, {ways}.{later}"
    return [told, "", f"Seed {found['seed']}; {versions}."]


def soak(found: dict[str, Any]) -> list[str]:
    """Does a process that works all day grow?"""
    half, end = found["noted"][len(found["noted"]) // 2], found["noted"][-1]
    where = f"{found['machine']}, torch {found['versions']['torch']}"
    return [
        f"{found['rounds']} rounds in {found['minutes']:g} minutes ({where}).",
        "",
        "| | half-way | at the end | growth a round between |",
        "|---|---|---|---|",
        *(
            f"| {name} | {half[key]:,.0f} | {end[key]:,.0f} | {found['growth_per_round'][key]:+.3f} |"
            for name, key in (("resident memory, MB", "resident_MB"), ("open files", "files"), ("threads", "threads"))
        ),
    ]


PARTS = (
    (README, "summary", summary, ("methods-gpt2", "methods-t5", "recovery-gpt2", "recovery-t5")),
    (RESULTS, "speed", table, ("speed-cpu",)),
    (RESULTS, "variants", variants, ("variants-cpu",)),
    (RESULTS, "conversion", conversion, ("conversion",)),
    (TRUST, "faults", faults, ("faults",)),
    (TRUST, "hostile", hostile, ("hostile",)),
    (TRUST, "mutants", mutants, ("mutants",)),
    (TRUST, "soak", soak, ("soak",)),
)


def main() -> None:
    for page, part, make, files in PARTS:
        lines = make(*(json.loads((HERE / "results" / f"{file}.json").read_text()) for file in files))
        before, rest = page.read_text().split(END.format(part), 1)
        before = before[: before.rindex(BEGIN)]
        page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END.format(part) + rest)


if __name__ == "__main__":
    main()
