"""What a conversion from the weights alone needs, beside copying the folder.

    python benchmarks/conversion.py

Random checkpoints of the shapes of gpt2 (0.5 GB), gpt2-xl (6.2 GB, float32) and t5-3b (5.7 GB, bfloat16): `cp -r`,
`mean` without and with --no-verify, in random order, each begun when what the one before wrote is on the disk. `cp`
does not wait for that, a conversion does: so it is also measured with `sync`. For gpt2-xl also `svd`, once. A dry run
on t5-11b's shapes (45 GB), all header: sparse files that occupy no disk. Each command is a process of its own; peak
memory is what the kernel accounts for it. Needs 20 GB of disk. Writes benchmarks/results/conversion.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from sqa_convert.checkpoints.dtypes import DTYPES, torch_dtype
from sqa_convert.families import family_of

RESULTS = Path(__file__).resolve().parent / "results"
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
GPT2_XL = GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48}
T5_3B = {
    "model_type": "t5", "d_model": 1024, "d_kv": 128, "num_heads": 32, "d_ff": 16384, "num_layers": 24,
    "vocab_size": 32128, "is_encoder_decoder": True,
}  # fmt: skip
CASES = {"gpt2": (GPT2, "F32", (8, 4)), "gpt2-xl": (GPT2_XL, "F32", (20, 5)), "t5-3b": (T5_3B, "BF16", (16, 8))}
T5_11B = {
    "model_type": "t5", "d_model": 1024, "d_kv": 128, "num_heads": 128, "d_ff": 65536, "num_layers": 24,
    "vocab_size": 32128, "is_encoder_decoder": True,
}  # fmt: skip


def shards(config: dict, limit: float, item: int) -> list[dict[str, tuple[int, ...]]]:
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in family_of(config).required(config).items():
        if size and size + item * math.prod(shape) > limit:
            files.append({})
            size = 0
        size += item * math.prod(shape)
        files[-1][name] = shape
    return files


def write_source(folder: Path, config: dict, limit: float, *, dtype: str = "F32", sparse: bool = False) -> int:
    """Writes a checkpoint, random or with headers only; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = shards(config, limit, DTYPES[dtype][1])
    weight_map, total = {}, 0
    for i, shapes in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        if sparse:
            header, end = {}, 0
            for name, shape in shapes.items():
                start, end = end, end + 4 * math.prod(shape)
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
            os.truncate(folder / file, 8 + len(text) + end)
        else:
            import torch
            from safetensors.torch import save_file

            made = {n: (torch.randn(s) * 0.02).to(torch_dtype(dtype)) for n, s in shapes.items()}
            save_file(made, folder / file, {"format": "pt"})
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak resident MB of one sqa-convert process."""
    return run_process(sys.executable, "-m", "sqa_convert", *map(str, arguments))


def run_process(*arguments: str) -> tuple[float, float]:
    """Seconds and peak resident MB."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\nsys.exit(done.returncode)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1]) / (1 if sys.platform == "linux" else 1024)
    return time.perf_counter() - start, kilobytes * 1024 / 1e6


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(values), 2), "median": round(statistics.median(values), 2), "max": round(max(values), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", choices=CASES)
    options = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "numpy", "safetensors", "sqa-convert")}
        | {"python": platform.python_version()},
        "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, (config, dtype, (q, kv)) in CASES.items():
            if options.only and name not in options.only:
                continue
            source, output = Path(scratch, name), Path(scratch, "out")
            size = write_source(source, config, 5e9, dtype=dtype)
            heads = [source, "--q-groups", str(q), "--kv-groups", str(kv), "-o", output, "--no-evaluate", "-q"]
            ways: dict[str, Callable[[], tuple[float, float]]] = {
                "cp": lambda source=source, output=output: run_process("cp", "-r", str(source), str(output)),
                "cp, sync": lambda source=source, output=output: run_process(
                    "sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(output)
                ),
                "mean, --no-verify": lambda heads=heads: run(*heads, "--method", "mean", "--no-verify"),
                "mean": lambda heads=heads: run(*heads, "--method", "mean"),
            }
            order = random.Random(0)
            taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for i in range(options.repeats + 1):
                for way in order.sample([*ways], len(ways)):  # none always after the same
                    os.sync()
                    found = ways[way]()
                    shutil.rmtree(output)
                    if i:  # the first round only warms up
                        taken[way].append(found)
            if name == "gpt2-xl":
                taken["svd, --no-calibration, --no-verify"] = [
                    run(*heads, "--method", "svd", "--no-calibration", "--no-verify")
                ]
                shutil.rmtree(output)
            for way, runs in taken.items():
                seconds, megabytes = zip(*runs, strict=True)
                row = {"source_bytes": size, "repeats": len(runs), "seconds": spread(seconds)}
                row["peak_resident_MB"] = spread(megabytes)
                if len(runs) == len(taken["cp"]):
                    row["times_cp"] = spread([a / b for a, (b, _) in zip(seconds, taken["cp"], strict=True)])
                result[f"{name}, {way}"] = row
                print(name, way, row, flush=True)
            shutil.rmtree(source)
        giant = Path(scratch, "giant")
        size = write_source(giant, T5_11B, 5e9, sparse=True)
        runs = [
            run(giant, "--q-groups", "64", "--kv-groups", "32", "--dry-run", "--json") for _ in range(options.repeats)
        ]
        seconds, megabytes = zip(*runs, strict=True)
        result["dry run 45 GB"] = {
            "source_bytes": size,
            "seconds": spread(seconds),
            "peak_resident_MB": spread(megabytes),
        }
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "conversion.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
