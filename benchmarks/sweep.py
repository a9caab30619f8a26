"""A sweep of a sample as `sqa-sweep` makes it, with what it costs without shared statistics beside it.

    python benchmarks/sweep.py sample:gpt2

It writes benchmarks/results/sweep-NAME.json, the picture beside it, and prints the table. Seconds of the CPU are of all
threads; one conversion that shares nothing with the sweep, at the setting in its middle, is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import sqa_convert
from sqa_convert.report.sweep_report import frontier_picture, sweep_lines, sweep_rows

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--settings", default="", metavar="A/B,C/D", help="by default those of sqa-sweep")
    parser.add_argument("--refine-steps", type=int, help="by default those of sqa-sweep")
    options = parser.parse_args()
    calibration = sqa_convert.Calibration(refine_steps=options.refine_steps)
    start = time.process_time()
    settings = [tuple(map(int, word.split("/"))) for word in options.settings.split(",") if word]
    points = sqa_convert.sweep(options.source, settings or None, calibration=calibration, device="cpu")
    result = points.to_json()
    result["cpu_seconds"] = round(time.process_time() - start, 1)
    middle = points[len(points) // 2]
    start = time.process_time()
    sqa_convert.convert(
        options.source,
        middle.q_groups,
        middle.kv_groups,
        method="svd",
        allocation="uniform",
        calibration=replace(calibration, polish_steps=0),
        device="cpu",
    ).evaluate()
    result["cpu_seconds_of_one_conversion"] = round(time.process_time() - start, 1)
    name = f"sweep-{Path(options.source.replace(':', '/')).name}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.svg").write_bytes(frontier_picture(result, "svg"))
    for row in sweep_rows(result["points"])[1]:
        print(*row)
    print(*sweep_lines(result), sep="\n")
    print({key: result[key] for key in ("seconds", "cpu_seconds", "cpu_seconds_of_one_conversion")})


if __name__ == "__main__":
    main()
