"""Heads shared out among layers against the same number in each, by the default conversion and after uptraining.

    python benchmarks/allocation_trained.py sample:gpt2 sample:t5 --seeds 0 1 2
    python benchmarks/allocation_trained.py build/strangers/signatures --heads 4/2 --tokens 300k

Both see the same tokens: a sample the text of the recipe `quick`, a folder of benchmarks/strangers.py its own training
documents. Results are added to benchmarks/results/allocation-trained.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from allocation import held_out, record

from sqa_convert import Conversion, convert
from sqa_convert.evaluation.load import load_model
from sqa_convert.evaluation.measure import measure, predict
from sqa_convert.parse_amounts import amount

RESULTS = Path(__file__).resolve().parent / "results" / "allocation-trained.json"
WAYS = ("uniform", "adaptive")


def training(source: str, is_t5: bool) -> dict[str, Any]:
    """What `Conversion.uptrain` is told of the text."""
    if source.startswith("sample:"):
        return {}
    columns = {"source_column": "prompt", "target_column": "answer"} if is_t5 else {}
    return {"data": f"{source}.train.jsonl", **columns}


def measured(source: str, q: int, kv: int, seed: int, tokens: int) -> dict[str, Any]:
    """KL to the source and loss of both ways on text that was not trained on, before and after."""
    text = held_out(source)
    row: dict[str, Any] = {"source": Path(source).name, "heads": f"{q}/{kv}", "seed": seed, "tokens": tokens}
    for way in WAYS:
        begin = time.perf_counter()
        made: Conversion = convert(source, q, kv, seed=seed, allocation=way, evaluate=False, device="cpu")
        seconds = [time.perf_counter() - begin]
        expected = predict(load_model(made.source), text)
        found = [measure(predict(made.model, text), expected)]
        begin = time.perf_counter()
        made.uptrain(tokens=tokens, seed=seed, device="cpu", keep_anyway=True, **training(source, "order" in source))
        seconds.append(time.perf_counter() - begin)
        found.append(measure(predict(made.model.eval(), text), expected))
        row[way] = {
            "kl": [round(result.kl, 5) for result in found],
            "loss": [round(result.loss, 5) for result in found],
            "seconds": [round(s, 1) for s in seconds],
        }
        print(row["source"], row["heads"], seed, way, row[way], flush=True)
    row["source_loss"] = round(measure(expected).loss, 5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--heads", default="8/4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", default="600k")
    options = parser.parse_args()
    q, kv = map(int, options.heads.split("/"))
    for seed in options.seeds:
        for source in options.sources:
            row = measured(source, q, kv, seed, amount(options.tokens, "--tokens"))
            record(RESULTS, [row])


if __name__ == "__main__":
    main()
