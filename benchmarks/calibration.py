"""What a calibrated conversion needs: time and peak memory on the sample and on a random checkpoint of GPT-2's shape.

    python benchmarks/calibration.py sample short
    python benchmarks/calibration.py full --device cuda

sample: the default on sample:gpt2, 12 heads to 8/4. short: GPT-2's shape (12 layers, 12 heads of 64, 124 M
parameters), --calibration-tokens 16384 --refine-steps 0. full: the same with every default. Each is a process of its
own; peak memory is what the kernel accounts for it. Adds to benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from conversion import run

RESULTS = Path(__file__).resolve().parent / "results" / "calibration.json"
HEADS = ["--q-groups", "8", "--kv-groups", "4", "--overwrite", "--quiet"]
CASES = {
    "sample": [],
    "short": ["--no-evaluate", "--calibration-tokens", "16384", "--refine-steps", "0"],
    "full": ["--no-evaluate"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="+", choices=CASES)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and options.device in ("auto", "cuda")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in options.case:
            source, output = "sample:gpt2", Path(scratch, "out")
            if case != "sample":
                transformers.set_seed(0)
                source = Path(scratch, "source")
                transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(source)
            seconds, megabytes = run(source, *HEADS, "-o", output, "--device", options.device, *CASES[case])
            report = json.loads((output / "report.json").read_text())
            results[f"{case}, {device}"] = {
                "flags": [*HEADS, *CASES[case]],
                "seconds": round(seconds, 1),
                "repeats": 1,
                "stages": report["seconds"],
                "peak_resident_MB": round(megabytes),
                "calibration": report["calibration"],
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "date": date.today().isoformat(),
            }
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{case}, {device}: {seconds:.1f} s, {megabytes:.0f} MB, {report['seconds']}", flush=True)


if __name__ == "__main__":
    main()
