"""What a conversion needs: peak memory and time on a 2 GB checkpoint, the time of a plan for a 45 GB one.

    python benchmarks/conversion.py

The 2 GB source is a random GPT-2 of gpt2-xl's width with 14 layers, in float32; the 45 GB one has t5-11b's shapes and
is all header: sparse files that occupy no disk. Each command is a process of its own; peak memory is what the kernel
accounts for it. Writes benchmarks/results/conversion.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from sqa_convert.families import family_of

RESULTS = Path(__file__).resolve().parent / "results"
GPT2_2GB = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 14, "n_positions": 1024, "vocab_size": 50257}
T5_11B = {
    "model_type": "t5", "d_model": 1024, "d_kv": 128, "num_heads": 128, "d_ff": 65536, "num_layers": 24,
    "vocab_size": 32128, "is_encoder_decoder": True,
}  # fmt: skip


def shards(config: dict, limit: float) -> list[dict[str, tuple[int, ...]]]:
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in family_of(config).required(config).items():
        if size and size + 4 * math.prod(shape) > limit:
            files.append({})
            size = 0
        size += 4 * math.prod(shape)
        files[-1][name] = shape
    return files


def write_source(folder: Path, config: dict, limit: float, *, sparse: bool) -> int:
    """Writes a float32 checkpoint, random or with headers only; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = shards(config, limit)
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

            save_file({n: torch.randn(s) * 0.02 for n, s in shapes.items()}, folder / file, {"format": "pt"})
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak resident MB of one sqa-convert process."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\nsys.exit(done.returncode)"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", code, sys.executable, "-m", "sqa_convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1]) / (1 if sys.platform == "linux" else 1024)
    return time.perf_counter() - start, kilobytes * 1024 / 1e6


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 2), "median": round(statistics.median(values), 2), "max": round(max(values), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "safetensors", "sqa-convert")}
        | {"python": platform.python_version()},
        "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "source"), Path(scratch, "out")
        size = write_source(source, GPT2_2GB, 5e8, sparse=False)
        heads = ["--q-groups", "20", "--kv-groups", "5", "--method", "mean"]
        heads += ["-o", str(output), "--overwrite", "--no-evaluate", "-q"]
        for name, extra in (("verified", []), ("no-verify", ["--no-verify"])):
            runs = [run(source, *heads, "--max-shard-size", "300MB", *extra) for _ in range(options.repeats)]
            seconds, megabytes = zip(*runs, strict=True)
            result[f"convert 2 GB, mean, 300MB shards, {name}"] = {
                "source_bytes": size,
                "seconds": spread(seconds),
                "peak_resident_MB": spread(megabytes),
            }
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
