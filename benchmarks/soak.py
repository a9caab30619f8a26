"""Conversions and uptrainings in one process, over and over: memory, open files and threads must not grow.

    python benchmarks/soak.py --minutes 50

Each round converts both samples from the weights alone and with a little text, in memory and to a folder, measures,
verifies, and uptrains the folder. After each round the process's resident memory, open files, threads and child
processes are noted. Growth is the slope over the second half of the rounds, where caches are warm. Writes
benchmarks/results/soak.json; exits with 1 where something grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import sqa_convert
from sqa_convert import Calibration, Recipe

RESULTS = Path(__file__).resolve().parent / "results"
LITTLE = Calibration(tokens=2048, refine_steps=2)
SHORT = Recipe(tokens=4096, batch_size=4, sequence_length=128, held_out_tokens=2048, evaluations=1)
MOST = {"resident_MB": 1.0, "files": 0.02, "threads": 0.02, "children": 0.02}
"""growth a round that is let pass"""


def one_round(work: Path) -> None:
    for name in ("gpt2", "t5"):
        source, folder = f"sample:{name}", work / name
        sqa_convert.convert(source, 6, 3, "mean")
        sqa_convert.convert(source, 8, 4, output=folder, calibration=LITTLE, overwrite=True, evaluate=True)
        sqa_convert.evaluate(folder, source, tokens=2048)
        sqa_convert.uptrain(folder, SHORT, keep_anyway=True)


def noted(process: psutil.Process) -> dict[str, float]:
    gc.collect()
    return {
        "resident_MB": process.memory_info().rss / 1e6,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=50)
    options = parser.parse_args()
    process, rounds = psutil.Process(), []
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as work:
        while time.monotonic() < end or len(rounds) < 4:
            start = time.monotonic()
            one_round(Path(work))
            rounds.append(noted(process) | {"seconds": round(time.monotonic() - start, 1)})
            print(len(rounds), rounds[-1], flush=True)
        left = sorted(path.name for path in Path(work).iterdir())
    late = rounds[len(rounds) // 2 :]
    growth = {key: statistics.linear_regression(range(len(late)), [r[key] for r in late]).slope for key in MOST}
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "versions": {
            name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "sqa-convert")
        },
        "minutes": options.minutes,
        "rounds": len(rounds),
        "growth_per_round": growth,
        "left_in_the_folder": left,
        "noted": rounds,
    }
    (RESULTS / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    grown = [key for key, slope in growth.items() if slope > MOST[key]]
    print(growth, left)
    if grown or left != ["gpt2", "t5"]:
        sys.exit(f"grows: {', '.join(grown) or 'what is in the folder'}")


if __name__ == "__main__":
    main()
