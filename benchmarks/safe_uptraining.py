"""Randomly drawn uptraining runs: afterwards no folder is further from its source than before.

    python benchmarks/safe_uptraining.py --runs 200 --results build/safe_uptraining.json

A GPT-2 of one layer and random weights, with the tokenizer of sample:gpt2, is converted once. Each run trains a copy
of it by a recipe drawn from its number: a rate from 1e-6 to 10, 1 to 50 steps, schedule, warm-up, measurements. KL to
the source is measured before and after, from the folder, by `sqa_convert.evaluate`. What is done is in the file of
results and is not done again. Prints a summary; exits with 1 where a folder got worse.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import platform
import random
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sqa_convert
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.errors import QualityError
from sqa_convert.uptraining.recipe import SCHEDULES

HELD_OUT = 1024
SEQUENCE, BATCH = 32, 4


def prepare(work: Path) -> None:
    """Source, converted model and text."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=json.loads((SAMPLES / "gpt2" / "config.json").read_text())["vocab_size"],
        bos_token_id=0, eos_token_id=0, n_positions=64, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(work / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLES / "gpt2" / name, work / "source" / name)
    files = sorted(Path(sqa_convert.__file__).parent.rglob("*.py"))[:24]
    (work / "text").mkdir()
    for path in files:
        shutil.copyfile(path, work / "text" / f"{path.stem}.txt")
    sqa_convert.convert(work / "source", 2, 1, "mean", work / "converted")


def distance(work: Path, folder: Path) -> float:
    measured = sqa_convert.evaluate(folder, work / "source", data=str(work / "text"), tokens=HELD_OUT)
    return float(measured["model"]["kl"])


def one_run(work: Path, number: int, before: float) -> dict[str, Any]:
    draw = random.Random(number)
    rate, steps = math.exp(draw.uniform(math.log(1e-6), math.log(10))), draw.randint(1, 50)
    recipe = sqa_convert.Recipe(
        data=str(work / "text"), tokens=steps * SEQUENCE * BATCH, sequence_length=SEQUENCE, batch_size=BATCH,
        learning_rate=rate, schedule=draw.choice(SCHEDULES), warmup=draw.choice((0.0, 0.05, 0.3)),
        evaluations=draw.randint(1, 8), held_out_tokens=HELD_OUT, seed=number,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(work / "converted", folder)
        outcome = "replaced"
        try:
            sqa_convert.uptrain(folder, recipe, device="cpu")
        except QualityError as error:
            outcome = "stopped: rate too high" if "too high" in str(error) else "kept the start"
        after = distance(work, folder)
    return {"run": number, "rate": rate, "steps": steps, "outcome": outcome, "before": before, "after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--results", type=Path, default=Path("build/safe_uptraining.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(options.results.read_text())["runs"] if options.results.is_file() else []
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        prepare(work)
        before = distance(work, work / "converted")
        for number in range(len(done), options.runs):
            done.append(one_run(work, number, before))
            content = {
                "machine": platform.platform(),
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "sqa_convert": sqa_convert.__version__,
                "runs": done,
            }
            options.results.write_text(json.dumps(content, indent=1) + "\n")
    outcomes = collections.Counter(run["outcome"] for run in done)
    worse = [run for run in done if run["after"] > run["before"]]
    print(f"{len(done)} runs: {', '.join(f'{count} {name}' for name, count in outcomes.most_common())}")
    print(f"further from the source than before: {len(worse)}")
    for run in worse:
        print(f"  run {run['run']}: rate {run['rate']:.3g}, {run['steps']} steps, {run['before']} → {run['after']}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
