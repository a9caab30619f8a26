"""How many tokens it takes to win a converted model back, from four starts, against a control on the same tokens.

    python benchmarks/recovery.py sample:gpt2 sample:t5 --figure   (CPU; more than an hour for each on one core)
    python benchmarks/recovery.py --figure                         (the figure, and the table of docs/results.md)

The starts, at 12 heads to 8/4: `mean` and cross-entropy, the way of the GQA paper (arXiv 2305.13245); `mean`,
`procrustes` and the default, each towards the source's predictions (KL); and the default by cross-entropy.
For each start the learning rates of a grid are tried with one seed, the one of the least held-out KL (of the default by
cross-entropy: of the least loss) is run with two more. Every run sees the same tokens; the control is the source
trained on them by cross-entropy at the rate of the default's own run by cross-entropy. Writes
benchmarks/results/recovery-NAME.json, and goes on from what is there: a rate once tried is not tried again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from sqa_convert import Recipe, convert, uptrain
from sqa_convert.devices import choose_device, device_name

RESULTS = Path(__file__).resolve().parent / "results"
RECIPE = Recipe(tokens=600_000, sequence_length=256, batch_size=8, evaluations=6)
STARTS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "mean, CE": ({"method": "mean"}, "ce", (2e-4, 5e-4, 1e-3, 2e-3)),
    "default, KL": ({}, "kl", (2e-4, 4e-4, 8e-4)),
    "default, CE": ({}, "ce", (1e-5, 3e-5, 1e-4, 3e-4)),
    "mean, KL": ({"method": "mean"}, "kl", (1e-3, 2e-3)),
    "procrustes, KL": ({"method": "procrustes"}, "kl", (5e-4, 1e-3)),
}
SEEDS = (0, 1, 2)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- written by benchmarks/recovery.py -->", "<!-- end of recovery -->"


def start_of(how: dict[str, Any], source: Path | str, heads: tuple[int, int], scratch: Path) -> Path:
    """The converted model a run begins with; made once."""
    folder = scratch / f"start-{heads[0]}-{heads[1]}-{how.get('method', 'default')}"
    if not folder.exists():
        convert(source, *heads, output=folder, evaluate=False, seed=0, **how)
    return folder


def run(start: Path, recipe: Recipe, control: bool, device: str) -> dict[str, Any]:
    """One uptraining of a copy of a start."""
    folder = start.with_name(f"run-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    begin = time.perf_counter()
    report = uptrain(folder, recipe, control=control, restart=True, keep_anyway=True, device=device)
    shutil.rmtree(folder)
    done = report["uptraining"]
    found = {
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "loss": report["quality"]["uptrained"]["loss"],
        "kl": report["quality"]["uptrained"]["kl"],
        "top1": report["quality"]["uptrained"]["top1"],
        "curve": done["curve"],
        "seconds": round(time.perf_counter() - begin, 1),
        "tokens_per_second": done["tokens_per_second"],
    }
    if "mfu" in done:
        found["mfu"] = done["mfu"]
    if control:
        found["control"] = report["quality"]["control"] | {"curve": done["control_curve"]}
    return found


def spread(runs: list[dict[str, Any]], key: str) -> dict[str, float]:
    values = [found[key] for found in runs]
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def measure(
    source: str | Path, name: str, heads: tuple[int, int], recipe: Recipe, seeds: tuple[int, ...], only: list[str],
    device: str, scratch: Path, into: dict[str, Any],
) -> None:  # fmt: skip
    """All starts of one source at one pair of head counts."""
    starts = into.setdefault(f"{heads[0]}/{heads[1]}", {})
    for label, (how, loss, grid) in STARTS.items():
        before = starts.get(label, {"grid": [], "runs": []})
        tried = {point["learning_rate"]: point for point in before["grid"]}
        if (only and label not in only) or (set(grid) <= tried.keys() and len(before["runs"]) >= len(seeds)):
            continue
        start = start_of(how, source, heads, scratch)
        key = "loss" if label == "default, CE" else "kl"
        runs = before["runs"]
        for rate in grid:
            if rate not in tried:
                found = run(start, replace(recipe, loss=loss, learning_rate=rate, seed=seeds[0]), False, device)
                print(f"{name} {heads} {label} lr {rate:g}: loss {found['loss']:.4f} KL {found['kl']:.4f} "
                      f"{found['seconds']} s", flush=True)  # fmt: skip
                tried[rate] = {k: found[k] for k in ("learning_rate", "loss", "kl")}
                runs.append(found)
        best = min(tried.values(), key=lambda point: point[key])["learning_rate"]
        runs = [found for found in runs if found["learning_rate"] == best]
        if label == "default, CE":  # the run with the first seed brings the control
            runs = [found for found in runs if found["seed"] != seeds[0] or "control" in found]
        for seed in seeds:
            if not any(found["seed"] == seed for found in runs):
                again = replace(recipe, loss=loss, learning_rate=best, seed=seed)
                runs.append(run(start, again, label == "default, CE" and seed == seeds[0], device))
        runs.sort(key=lambda found: found["seed"])
        starts[label] = {
            "grid": sorted(tried.values(), key=lambda point: point["learning_rate"]),
            "learning_rate": best,
            "loss": spread(runs, "loss"),
            "kl": spread(runs, "kl"),
            "runs": runs,
        }
        print(f"{name} {heads} {label}: lr {best:g} KL {starts[label]['kl']}", flush=True)
        write(name, into)


def write(name: str, found: dict[str, Any]) -> None:
    path = RESULTS / f"recovery-{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


def describe(device: str, recipe: Recipe) -> dict[str, Any]:
    where = device_name(choose_device(device))
    return {
        "recipe": asdict(recipe),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {where}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    }


def figure() -> None:
    """recovery.svg of what is committed, and the table of docs/results.md."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    found = {
        path.stem.removeprefix("recovery-"): json.loads(path.read_text()) for path in RESULTS.glob("recovery-*.json")
    }
    found = {name: found[name] for name in ("gpt2", "t5") if name in found}
    chart = Figure(figsize=(10, 4), layout="constrained")
    panels = chart.subplots(1, len(found), squeeze=False)[0]
    lines = ["| start | trained by |" + "".join(f" {name}: rate | KL | loss, first seed |" for name in found)]
    lines.append("|---|---|" + "---:|" * 3 * len(found))
    for panel, (name, results) in zip(panels, found.items(), strict=True):
        ends = {}
        for i, (label, start) in enumerate(results["8/4"].items()):
            curves = [run["curve"] for run in start["runs"]]
            tokens = [point["tokens"] for point in curves[0]]
            values = [[curve[j]["kl"] for curve in curves] for j in range(len(tokens))]
            means = [statistics.mean(v) for v in values]
            panel.plot(tokens, means, marker="o", markersize=3, color=f"C{i}")
            ends[label] = (means[-1], f"C{i}")
            panel.fill_between(tokens, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.2)
        panel.set(title=f"sample:{name}", xlabel="tokens", ylabel="held-out KL to the source, nats/token", yscale="log")
        panel.grid(alpha=0.3)
        low, high = map(math.log, panel.get_ylim())
        height = -1.0  # of the last name, which the next one must not cover
        for label, (value, colour) in sorted(ends.items(), key=lambda end: end[1]):
            height = max(height + 0.06, (math.log(value) - low) / (high - low))
            panel.text(1.01, height, label, transform=panel.transAxes, color=colour, va="center", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.spines[["top", "right"]].set_visible(False)
    chart.suptitle("12 heads to 8/4: mean and range of the seeds")
    chart.savefig(RESULTS / "recovery.svg", metadata={"Date": None})
    for label, (_, loss, _) in STARTS.items():
        if not any(label in results["8/4"] for results in found.values()):
            continue
        cells = []
        for results in found.values():
            start = results["8/4"].get(label)
            cells += ["", "", ""] if start is None else [
                f"{start['learning_rate']:g}", ranged(start["kl"]), f"{start['runs'][0]['loss']:.4f}"
            ]  # fmt: skip
        lines.append(f"| {label.partition(',')[0]} | {loss} | {' | '.join(cells)} |")
    for name in ("source", "control"):
        cells = []
        for results in found.values():
            control = results["8/4"].get("default, CE", {}).get("runs", [{}])[0].get("control")
            cells += ["", "", ""]
            if control is not None:  # which begins as the source
                cells[-1] = f"{(control if name == 'control' else control['curve'][0])['loss']:.4f}"
        lines.append(f"| {name} | | {' | '.join(cells)} |")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])


def ranged(values: dict[str, float]) -> str:
    return f"{values['mean']:.4f} ({values['min']:.4f}–{values['max']:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="*")
    parser.add_argument("--only", action="append", default=[], choices=STARTS)
    parser.add_argument("--tokens", type=int, default=RECIPE.tokens)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", action="store_true")
    options = parser.parse_args()
    recipe = replace(RECIPE, tokens=options.tokens)
    for source in options.source:
        name = source.partition(":")[2] or Path(source).name
        path = RESULTS / f"recovery-{name}.json"
        found = (
            json.loads(path.read_text()) if path.exists() else {"source": source, **describe(options.device, recipe)}
        )
        if found["recipe"] != asdict(recipe):
            parser.error(f"{path} holds runs of another recipe: move it away first")
        with tempfile.TemporaryDirectory() as scratch:
            measure(
                source, name, (8, 4), recipe, SEEDS[: options.seeds], options.only, options.device, Path(scratch), found
            )
    if options.figure:
        figure()


if __name__ == "__main__":
    main()
