"""Everything about speed that a GPU has to say, in one run of less than ten minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --short --device cpu      (the same script, small)

One attention layer in all variants of the SQA paper (arXiv 2510.01817) from 1k to 131k tokens in bfloat16; whole
models of its dense shape (width 256, 8 layers, 16 heads, random weights) at 1k in batches of 128, at 32k and 131k, its
published ratios beside ours; the calibrated conversion of GPT-2 small's shape; the throughput of uptraining. Writes
benchmarks/results/gpu.json, and the results of the scripts it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recovery
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sqa_convert import bench
from sqa_convert.models import SQAGPT2Config, SQAGPT2ForCausalLM
from sqa_convert.report.pictures import speed_picture
from sqa_convert.speed.bench import bench_layers
from sqa_convert.speed.settings import Settings

HERE = Path(__file__).resolve().parent
PUBLISHED = {  # forward seconds on an A100, without synchronisation: 1k, 32k, 131k tokens
    "mha": (0.0869, 0.3727, 1.2648), "sqa": (0.0642, 0.1991, 0.6308), "xsqa": (0.0570, 0.1348, 0.3759),
}  # fmt: skip
MODELS = {"mha": None, "sqa": (8, 4), "ssqa": (8, 8), "xsqa": (4, 4)}


def paper_models(folder: Path, positions: int, small: bool) -> dict[str, Path]:
    stock = GPT2Config(
        vocab_size=10_000, n_layer=2 if small else 8, n_embd=256, n_head=16, n_positions=positions,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folders = {}
    for name, heads in MODELS.items():
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(stock)
        if heads is not None:
            kept = {"n_head": heads[0], "num_key_value_heads": heads[1], "head_dim": 16}
            model = SQAGPT2ForCausalLM(SQAGPT2Config(**stock.to_dict() | kept))
        folders[name] = folder / name
        model.save_pretrained(folders[name])
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path, default=recovery.RESULTS)
    options = parser.parse_args()
    begin = time.perf_counter()
    lengths = (128, 256, 512) if options.short else (1024, 32_768, 131_072)
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    repeats = 2 if options.short else 5
    found: dict[str, Any] = {"published": {"seconds": PUBLISHED, "lengths": [1024, 32_768, 131_072]}}

    def keep(name: str, result: Any) -> None:
        found[name] = result
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)
        (options.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        for row in result.get("rows", []) if isinstance(result, dict) else []:
            if "speedup" in row:
                gained = row["speedup"]["median"]
                print(f"{name}: {row['part']} {row['mode']} {row['length']} x {row['batch']} {row['model']} "
                      f"{gained:.2f} of {row['ideal']:.2f}", flush=True)  # fmt: skip

    grid = Settings(lengths=lengths, dtype=dtype, device=options.device, repeats=repeats)
    keep("layers", bench_layers(16, 16, settings=grid))
    (options.output / "gpu-layers.svg").write_bytes(speed_picture(found["layers"], "svg"))
    wide = Settings(lengths=lengths[:2], dtype=dtype, device=options.device, repeats=repeats)
    keep("layers of 12 heads of 64", bench_layers(12, 64, ("mha", "8/4", "6/3"), wide))
    with tempfile.TemporaryDirectory() as scratch:
        folders = paper_models(Path(scratch), lengths[-1], options.short)
        for length, batch in zip(lengths, (2 if options.short else 128, 1, 1), strict=True):
            settings = Settings(
                lengths=(length,), batch=batch, modes=("prefill", "train"), parts=("model",), dtype=dtype,
                device=options.device, repeats=repeats,
            )  # fmt: skip
            keep(f"models at {length} x {batch}", bench(folders, settings))
        settings = Settings(
            lengths=lengths, batch=8, modes=("decode",), parts=("model",), dtype=dtype, device=options.device,
            repeats=repeats,
        )  # fmt: skip
        keep("decoding", bench(folders, settings))
    small = ["--layers", "2", "--width", "192", "--context", "128", "--vocabulary", "5000", "--rows", "4",
             "--steps", "6", "--rounds", "1"] if options.short else []  # fmt: skip
    subprocess.run(
        [sys.executable, HERE / "throughput.py", "--device", options.device, "--output", options.output, *small],
        check=True,
    )
    keep("throughput", "throughput-*.json")
    if not options.short:
        subprocess.run([sys.executable, HERE / "calibration.py", "full", "--device", options.device], check=True)
        keep("conversion", "calibration.json")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
