"""Every method, as it converts, after refit and after refine, at many head counts: what is lost without any training.

    python benchmarks/methods.py sample:gpt2 sample:t5 --figure
    python benchmarks/methods.py --figure            (draws the figure, writes the tables of docs/methods.md)

For each source the calibration text, the activations and the sensitivities are made once and shared by all rows, so
the seconds of a row are those of its own fits. KL divergence to the source and loss are measured on the held-out part
of the built-in corpus, which no fit has seen; `auto` chooses on held-out calibration text. Writes
benchmarks/results/methods-NAME.json and methods.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from sqa_convert.calibration.calibrate import Calibrator
from sqa_convert.calibration.candidates import CANDIDATES
from sqa_convert.calibration.fitter import SiteFitter
from sqa_convert.calibration.load_source import load_source
from sqa_convert.calibration.memory_budget import memory_budget
from sqa_convert.checkpoints.find import open_source
from sqa_convert.conversion.build_model import build_model
from sqa_convert.conversion.convert_site import ConvertedSite
from sqa_convert.conversion.fitting import EFFORTS
from sqa_convert.conversion.plan import Plan, make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.measure import measure, predict
from sqa_convert.families import Site

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- written by benchmarks/methods.py -->", "<!-- end -->"
COUNTS = [(8, 4), (6, 3), (8, 8), (4, 4), (4, 1), (12, 4), (10, 5)]
METHODS = {
    "mean": ("mean", False),
    "first": ("first", False),
    "select": ("select", False),
    "procrustes": ("procrustes", True),
    "svd, contiguous": ("svd", False),
    "svd": ("svd", True),
}
STAGES = ("converted", "refit", "refined")
Made = dict[Site, ConvertedSite]


class Bench:
    """One source, and all that its rows share."""

    def __init__(self, name: str, seed: int) -> None:
        self.source = open_source(name)
        plan = self.plan(8, 4)
        start = time.perf_counter()
        cpu = torch.device("cpu")
        budget = memory_budget(plan, self.source, cpu)
        model = load_source(plan, self.source)
        self.calibrator = Calibrator(model, plan, self.source, cpu, budget, seed)
        self.fitters: dict[Site, SiteFitter] = dict(self.calibrator.fitters("fit"))
        for fitter in self.fitters.values():
            _ = fitter.statistics
        self.seconds = time.perf_counter() - start
        assert self.source.folder is not None
        self.held_out = prepare(self.source.folder, device="cpu")
        self.expected = predict(model, self.held_out)
        self.baseline = measure(self.expected)

    def plan(self, q: int, kv: int, **options: Any) -> Plan:
        return make_plan(self.source, Request(q, kv, **options))

    def rows(self, q: int, kv: int) -> Iterator[dict[str, Any]]:
        plan = self.plan(q, kv)
        by_stage: dict[str, dict[str, Made]] = {stage: {} for stage in STAGES}
        yield self.row(self.plan(q, kv, calibration=None), {}, "svd, no text", "converted", 0.0)
        for name, (method, searched) in METHODS.items():
            made: Made = {}
            for stage in STAGES:
                start = time.perf_counter()
                made = {
                    site: self.step(stage, fitter, made, plan, site, method, searched) for site, fitter in self.all()
                }
                seconds = time.perf_counter() - start
                by_stage[stage][name] = made
                yield self.row(plan, made, name, stage, seconds)
                if (q, kv) == COUNTS[0] and self.source.config.get("is_encoder_decoder"):
                    part = self.plan(q, kv, sites=["decoder", "cross"])
                    kept = {site: m for site, m in made.items() if site.kind != "encoder"}
                    yield self.row(part, kept, name, stage, seconds) | {"sites": "decoder, cross"}
        refit = {name: by_stage["refit"][name] for name in CANDIDATES}
        kl = {name: kl for name, choice in refit.items() if (kl := self.calibrator.kl(plan, choice)) is not None}
        chosen = min(kl, key=kl.__getitem__)
        note = {"chosen": chosen, "kl_on_calibration_text": kl}
        yield self.row(plan, refit[chosen], "auto", "refit", 0.0) | note
        yield self.row(plan, by_stage["refined"][chosen], "auto", "refined", 0.0) | note

    def all(self) -> list[tuple[Site, SiteFitter]]:
        return list(self.fitters.items())

    @staticmethod
    def step(
        stage: str, fitter: SiteFitter, made: Made, plan: Plan, site: Site, method: str, searched: bool
    ) -> ConvertedSite:
        if stage == "refined":
            return fitter.refine(made[site], EFFORTS["default"].refine_steps)
        return fitter.convert(method, plan.partitions[site], searched, with_refit=stage == "refit")

    def row(self, plan: Plan, made: Made, method: str, stage: str, seconds: float) -> dict[str, Any]:
        model = build_model(plan, self.source, made)[0].float()
        quality = measure(predict(model, self.held_out), self.expected)
        count = next(p for p in plan.partitions.values() if not p.is_identity)
        return {
            "q": len(count.clusters),
            "kv": len(count.groups),
            "sites": "all",
            "method": method,
            "stage": stage,
            "kl": round(quality.kl or 0.0, 5),
            "loss": round(quality.loss, 5),
            "seconds": round(seconds, 2),
        }


def run(name: str, seed: int, counts: list[tuple[int, int]]) -> None:
    bench = Bench(name, seed)
    print(f"{name}: prepared in {bench.seconds:.1f} s, loss {bench.baseline.loss:.4f}", flush=True)
    rows = []
    for q, kv in counts:
        for row in bench.rows(q, kv):
            rows.append(row)
            print(
                "{q:>2}/{kv:<2} {sites:15} {method:16} {stage:10} KL {kl:.4f} loss {loss:.4f} {seconds:.1f} s".format(
                    **row
                )
            )
        print(flush=True)
    result = {
        "command": f"python benchmarks/methods.py {name} --seed {seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": 1,
        "source_loss": round(bench.baseline.loss, 5),
        "held_out_tokens": bench.held_out.tokens,
        "calibration": bench.calibrator.report(bench.plan(8, 4)),
        "refine_steps": EFFORTS["default"].refine_steps,
        "seconds_prepare": round(bench.seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "rows": rows,
    }
    path = RESULTS / f"methods-{name.removeprefix('sample:')}.json"
    if path.exists():
        earlier = json.loads(path.read_text())["rows"]
        rows += [row for row in earlier if (row["q"], row["kv"]) not in counts]
        rows.sort(key=lambda row: COUNTS.index((row["q"], row["kv"])))
    path.write_text(json.dumps(result, indent=1) + "\n")


SHOWN = ["mean", "first", "select", "procrustes", "svd, contiguous", "svd", "auto"]
COLOURS = {"converted": "#888888", "refit": "#dd8452", "refined": "#4c72b0"}
SAID = {"converted": "in closed form", "refit": "refitted", "refined": "refined"}


def figure() -> None:
    """A row of panels a source, a panel a method: KL at every head count after each stage, one scale a row; in thin
    lines what `auto` comes to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = sorted(RESULTS.glob("methods-*.json"))
    order = sorted(COUNTS, reverse=True)
    pyplot.rcParams |= {"svg.hashsalt": "sqa", "svg.fonttype": "none", "font.size": 8}
    figure, axes = pyplot.subplots(
        len(files), len(SHOWN), figsize=(11, 2.9 * len(files)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, file in zip(axes, files, strict=True):
        rows = [r for r in json.loads(file.read_text())["rows"] if r["sites"] == "all"]

        def curve(method: str, stage: str, rows: list[dict[str, Any]] = rows) -> list[float]:
            found = {(r["q"], r["kv"]): r["kl"] for r in rows if (r["method"], r["stage"]) == (method, stage)}
            return [found.get(counts, float("nan")) for counts in order]

        best = curve("auto", "refined")
        for axis, method in zip(row, SHOWN, strict=True):
            axis.plot(best, color=COLOURS["refined"], linewidth=0.8, alpha=0.5)
            drawn = {stage: curve(method, stage) for stage in STAGES}
            drawn = {stage: values for stage, values in drawn.items() if values[0] == values[0]}  # measured
            for stage, values in drawn.items():
                axis.plot(values, color=COLOURS[stage], marker="o", markersize=3, linewidth=1.2)
            axis.set_title(method, fontsize=9, loc="left")
            axis.set_yscale("log")
            axis.set_xticks(range(len(order)), [f"{q}/{kv}" for q, kv in order], rotation=90, fontsize=7)
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"sample:{file.stem.removeprefix('methods-')}\nKL to the source, nats/token")
        for at, stage in zip((0.93, 0.85, 0.77), STAGES, strict=True):  # where `auto` has no curves
            row[-1].text(0.03, at, SAID[stage], transform=row[-1].transAxes, color=COLOURS[stage])
    figure.supxlabel(
        "query / key-value heads kept, of 12 / 12; the thin line in every panel is `auto`, refined", fontsize=8
    )
    figure.savefig(RESULTS / "methods.svg", metadata={"Date": None})


def tables() -> str:
    """The two tables of docs/methods.md, from the committed results."""
    results = {
        f.stem.removeprefix("methods-"): json.loads(f.read_text()) for f in sorted(RESULTS.glob("methods-*.json"))
    }

    def cells(columns: list[tuple[str, str, str, tuple[int, int]]]) -> str:
        found = []
        for name, method, stage, counts in columns:
            key = (*counts, method, stage, "all")
            rows = results[name]["rows"]
            kl = [r["kl"] for r in rows if (r["q"], r["kv"], r["method"], r["stage"], r["sites"]) == key]
            found.append(f"{kl[0]:.3f}" if kl else "")
        return " | ".join(found)

    lines = ["| KL to the source, 12 → 8/4 heads | " + " | ".join(f"{n}: {s}" for n in results for s in STAGES) + " |"]
    lines.append("|---" * (1 + len(results) * len(STAGES)) + "|")
    for method in [*METHODS, "auto"]:
        lines.append(f"| {method} | {cells([(n, method, s, COUNTS[0]) for n in results for s in STAGES])} |")
    order = sorted(COUNTS, reverse=True)
    lines += ["", "| KL to the source, heads kept | " + " | ".join(f"{q}/{kv}" for q, kv in order) + " |"]
    lines.append("|---" * (1 + len(order)) + "|")
    shown = [("mean", "converted"), ("svd, no text", "converted"), ("auto", "refit"), ("auto", "refined")]
    for name in results:
        for method, stage in shown:
            lines.append(f"| {name}, {method}, {stage} | {cells([(name, method, stage, c) for c in order])} |")
    return "\n".join(lines)


def write_tables() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="*", help="sample:gpt2, sample:t5, or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", help="such as 8/4,6/3; the other rows there are stay. Default: all")
    parser.add_argument(
        "--figure", action="store_true", help="draw the figure and write the tables, from the results there are"
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts = COUNTS
    if options.counts:
        counts = [(int(q), int(kv)) for q, kv in (pair.split("/") for pair in options.counts.split(","))]
    for name in options.source:
        run(name, options.seed, counts)
    if options.figure:
        figure()
        write_tables()


if __name__ == "__main__":
    main()
