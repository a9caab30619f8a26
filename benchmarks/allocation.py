"""Heads shared out among layers against the same number in each, at equal totals: KL after fitting, before training.

    python benchmarks/allocation.py sample:gpt2 sample:t5
    python benchmarks/allocation.py build/strangers/signatures --heads 4/2

Both are made as `sqa_convert.convert(source, q, kv, method="svd", allocation=…)` makes them, without its polish, from
text and statistics that are computed once a source. A sample is measured on the built-in held-out text, a folder of
benchmarks/strangers.py on its own held-out documents. Results are added to benchmarks/results/allocation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from sqa_convert import resolve
from sqa_convert.calibration.allocation import METHOD, cheapest, site_costs
from sqa_convert.calibration.calibrate import Calibrator
from sqa_convert.calibration.load_source import load_source
from sqa_convert.calibration.memory_budget import memory_budget
from sqa_convert.conversion.build_model import build_model
from sqa_convert.conversion.heads_by_layer import as_text
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.measure import measure, predict
from sqa_convert.heads import Partition
from sqa_convert.pipeline.preflight import prepared

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "allocation.json"
CPU = torch.device("cpu")


def held_out(source: str) -> HeldOut:
    """A sample's usual text, or the true held-out documents of a stranger."""
    if source.startswith("sample:"):
        return prepare(resolve(source), device="cpu")
    from strangers import MEASURED, STRANGERS, batch_of, encoded

    folder = Path(source)
    stranger = STRANGERS[folder.name]
    is_t5 = isinstance(stranger.config, transformers.T5Config)
    lines = (folder.parent / f"{folder.name}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = encoded(tokenizer, [json.loads(line) for line in lines], is_t5, stranger.longest)[:MEASURED]
    return HeldOut([batch_of(rows[i : i + 64]) for i in range(0, len(rows), 64)], "its own documents", 0, CPU)


def measured(source: str, settings: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    """A row for each setting: KL with the same heads in each layer, with heads shared out, and where they went."""
    start, text = time.process_time(), held_out(source)
    opened, plan = prepared(source, Request(*max(settings), method=METHOD), lambda partitions: None)
    budget = memory_budget(plan, opened, CPU)
    model = load_source(plan, opened)
    calibrator = Calibrator(model, plan, opened, CPU, budget, seed)
    costs: dict[tuple[int, int], dict[Any, Any]] = {counts: {} for counts in settings}
    for site, fitter in calibrator.fitters(""):
        for counts in settings:
            alone = fitter.convert(METHOD, Partition.contiguous(plan.dimensions.heads, *counts), True, True)
            kl = calibrator.replacement.kl({site: alone.heads})
            assert kl is not None
            costs[counts][site] = site_costs(fitter, kl, counts)
    shared = {counts: cheapest(costs[counts], counts) for counts in settings}
    order = {site: [s for s in plan.sites if s.kind == site.kind].index(site) for site in plan.converted_sites}
    fits = {}
    for site, fitter in calibrator.fitters(""):
        for counts in {*settings, *(shared[c][site.kind][order[site]] for c in settings)}:
            heads = plan.dimensions.heads
            if counts != (heads, heads):
                fit = fitter.convert(METHOD, Partition.contiguous(heads, *counts), True, True)
                fits[site, counts] = fitter.refine(fit, plan.calibration.refine_steps)
    expected = predict(model, text)
    rows = []
    for counts in settings:
        ways = {"uniform": dict.fromkeys(order, counts)}
        ways["adaptive"] = {site: shared[counts][site.kind][order[site]] for site in order}
        row: dict[str, Any] = {"source": Path(source).name, "heads": "/".join(map(str, counts)), "seed": seed}
        for way, kept in ways.items():
            by_layer = {kind: [c for site, c in kept.items() if site.kind == kind] for kind in shared[counts]}
            asked = replace(plan.request, q_groups=None, kv_groups=None, allocation=as_text(by_layer))
            chosen = {site: fits[site, c] for site, c in kept.items() if (site, c) in fits}
            converted = build_model(make_plan(opened, asked), opened, chosen)[0]
            row[way] = round(measure(predict(converted, text), expected).kl, 5)
        row |= {"share": round(row["adaptive"] / row["uniform"], 3), "layers": as_text(shared[counts])}
        print(row, flush=True)
        rows.append(row)
    rows[-1]["cpu_seconds_of_all"] = round(time.process_time() - start, 1)
    return rows


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a file of results, with the machine and the versions."""
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results["rows"] += rows
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--heads", default="10/5,8/4,6/3")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = [tuple(map(int, word.split("/"))) for word in options.heads.split(",")]
    for source in options.sources:
        rows = measured(source, settings, options.seed)
        record(RESULTS, rows)


if __name__ == "__main__":
    main()
