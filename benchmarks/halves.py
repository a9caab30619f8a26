"""Where conversion loses: patterns (queries, keys) and values (values, output projections) of each layer apart.

    python benchmarks/halves.py sample:gpt2 sample:t5 --heads 8/4
    python benchmarks/halves.py build/strangers/signatures --heads 4/2

Heads are fitted as `sqa_convert.convert(source, q, kv, method="svd")` fits them, before its polish. Then one half of
them is put back to the source's, of all layers and of one at a time, output projections fitted again, and the source
runs with that in place, on the calibration text's held-out part. Results are added to benchmarks/results/halves.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from allocation import record

from sqa_convert.calibration.calibrate import Calibrator
from sqa_convert.calibration.load_source import load_source
from sqa_convert.calibration.memory_budget import memory_budget
from sqa_convert.conversion.request import Request
from sqa_convert.heads.restored_half import CONVERTED_ALONE
from sqa_convert.pipeline.preflight import prepared

RESULTS = Path(__file__).resolve().parent / "results" / "halves.json"
RESTORED = {"patterns": "values", "values": "patterns"}
"""of the half that alone is converted, the one that is the source's"""


def measured(source: str, q: int, kv: int, seed: int) -> dict[str, Any]:
    """KL with both halves converted, with one alone, and what restoring one half of one layer takes off it."""
    start, of_errors = time.process_time(), 0.0
    opened, plan = prepared(source, Request(q, kv, method="svd"), lambda partitions: None)
    cpu = torch.device("cpu")
    budget = memory_budget(plan, opened, cpu)
    calibrator = Calibrator(load_source(plan, opened), plan, opened, cpu, budget, seed)
    both: dict[Any, Any] = {}
    alone: dict[str, dict[Any, Any]] = {half: {} for half in CONVERTED_ALONE}
    sites: dict[Any, dict[str, Any]] = {}
    for site, fitter in calibrator.fitters(""):
        made = fitter.convert("svd", plan.partitions[site], True, True)
        made, began = fitter.refine(made, plan.calibration.refine_steps), time.process_time()
        made = fitter.with_halves(made)
        of_errors += time.process_time() - began
        both[site] = made.heads
        for half, heads in alone.items():
            heads[site] = fitter.half_alone(made, half)
        sites[site] = {"kind": site.kind, "layer": site.layer, "error": round(made.record.error, 5)} | {
            f"error, {half} converted alone": round(error, 5) for half, error in made.record.half_errors.items()
        }
    kl = calibrator.replacement.kl
    row: dict[str, Any] = {"source": Path(source).name, "heads": f"{q}/{kv}", "seed": seed, "kl": round(kl(both), 5)}
    row |= {f"kl, {half} converted alone": round(kl(heads), 5) for half, heads in alone.items()}
    for site, told in sites.items():
        for half, restored in RESTORED.items():
            left = kl({**both, site: alone[half][site]})
            told[f"kl taken off by its {restored} restored"] = round(row["kl"] - left, 5)
    seconds = {"of the errors of halves": round(of_errors, 2), "of all": round(time.process_time() - start, 1)}
    return row | {"sites": list(sites.values()), "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--heads", default="8/4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    q, kv = map(int, options.heads.split("/"))
    for source in options.sources:
        row = measured(source, q, kv, options.seed)
        print(json.dumps(row, indent=1), flush=True)
        record(RESULTS, [row])


if __name__ == "__main__":
    main()
