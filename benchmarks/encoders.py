"""What recipe `encoder` gains on the encoder of a small T5 that is not ours, after the default conversion.

    python benchmarks/strangers.py train
    python benchmarks/encoders.py STRANGERS

STRANGERS is where `benchmarks/strangers.py` wrote the T5 `order` and its documents. Its encoder is converted with its
training documents, then uptrained on them by recipe `encoder` with sequences of 256 tokens, eight in a step, at several
rates from the same start. Measured on documents that are held out of both, it writes benchmarks/results/encoders.json
and prints a table. Seconds are of a machine that other programs may share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, T5EncoderModel

import sqa_convert

RESULTS = Path(__file__).parent / "results" / "encoders.json"
RATES = (2e-4, 5e-4, 1e-3, 2e-3)


def trained(converted: Path, data: str, rate: float, tokens: int, place: Path) -> dict[str, Any]:
    recipe = sqa_convert.load_recipe(
        "encoder", data=data, tokens=tokens, sequence_length=256, batch_size=8, micro_batch=0, evaluations=4,
        learning_rate=rate,
    )  # fmt: skip
    start = time.perf_counter()
    report = sqa_convert.uptrain(converted, recipe, output=place / f"{rate:g}", restart=True, keep_anyway=True)
    row = report["quality"]["uptrained"]
    curve = [[round(point["tokens"]), point["error"]] for point in report["uptraining"]["curve"]]
    seconds = round(time.perf_counter() - start)
    return {"learning_rate": rate, "error": row["error"], "cosine": row["cosine"], "curve": curve, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strangers", type=Path)
    parser.add_argument("--heads", type=int, nargs=2, default=(4, 2), metavar=("Q", "KV"))
    parser.add_argument("--tokens", type=int, default=300_000)
    asked = parser.parse_args()
    data = str(asked.strangers / "order.train.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        T5EncoderModel.from_pretrained(asked.strangers / "order").save_pretrained(place / "source")
        AutoTokenizer.from_pretrained(asked.strangers / "order").save_pretrained(place / "source")
        how = {"output": place / "out", "calibration": data, "evaluate": True, "verify": False}
        quality = sqa_convert.convert(place / "source", *asked.heads, **how).report["quality"]
        rows = [trained(place / "out", data, rate, asked.tokens, place) for rate in RATES]
    figures = {name: {key: quality[name][key] for key in ("error", "cosine")} for name in ("mean", "converted")}
    result = {
        "model": "the encoder of the T5 order", "heads": [6, *asked.heads], "tokens": asked.tokens,
        "held_out_tokens": quality["tokens"], **figures, "uptrained": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "sqa_convert": sqa_convert.__version__},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("mean", "converted"):
        print(f"{name}: error {figures[name]['error']:.2%}, cosine {figures[name]['cosine']:.4f}")
    for row in rows:
        print(f"{row['learning_rate']:g}: error {row['error']:.2%}, cosine {row['cosine']:.4f}, {row['seconds']} s")


if __name__ == "__main__":
    main()
