"""Peak memory of conversions at real sizes, of random weights: `python benchmarks/memory.py gpt2-xl`.

The text is random tokens, few of them, and heads are fitted by one method: the peak is of the weights and of batches,
which are whole. Prints and writes to results/memory.json the peak of all processes together, seconds and the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

from sqa_convert.report.provenance import machine

RESULTS = Path(__file__).parent / "results" / "memory.json"
SHARD = 2e9
QUICK = ["--method", "svd", "--partition", "contiguous"]

_T5 = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32, "num_layers": 24, "is_encoder_decoder": False}
_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
SHAPES = {
    # architecture, config, dtype, heads, flags
    "gpt2": (
        GPT2LMHeadModel, GPT2Config(), "float32", (8, 4),
        [*QUICK, "--calibration-tokens", "32k", "--refine-steps", "2"],
    ),
    "gpt2-xl": (
        GPT2LMHeadModel, GPT2Config(**_XL), "float32", (16, 8),
        ["--effort", "light", "--memory", "8GB", *QUICK, "--calibration-tokens", "2k", "--refine-steps", "0"],
    ),
    "t5-3b-encoder": (
        T5EncoderModel, T5Config(**_T5, is_decoder=False, use_cache=False), "bfloat16", (16, 8),
        ["--effort", "light", "--memory", "8GB", *QUICK, "--calibration-tokens", "2k", "--refine-steps", "0"],
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Random weights of a shape, in shards, and tokens to read."""
    architecture, config, dtype, _, _ = SHAPES[name]
    config.architectures, config.dtype = [architecture.__name__], dtype
    with init_empty_weights():
        model = architecture(config)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    tied = {"lm_head.weight", "encoder.embed_tokens.weight"}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        places.update(dict.fromkeys(shard, file))
        save_file(shard, folder / file, metadata={"format": "pt"})
        shard.clear()

    for key, parameter in model.named_parameters():
        if key in tied:
            continue
        drawn = torch.randn(parameter.shape, generator=generator) * 0.02
        norm = parameter.ndim == 1 and key.endswith("weight")
        shard[key] = (drawn + norm).to(getattr(torch, dtype))
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = torch.randint(config.vocab_size, (400, 1024 if name.startswith("gpt2") else 512), generator=generator)
    lines = (json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
    (folder / "tokens.jsonl").write_text("".join(lines))


def watched(command: list[str]) -> tuple[float, float, int]:
    """Seconds, the highest sum of resident bytes of a command and its children, and its exit code."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        for one in (root, *_children(root)):
            try:
                sizes.append(one.memory_info().rss)
            except psutil.Error:
                continue
        peak = max(peak, float(sum(sizes)))
        time.sleep(0.1)
    return time.perf_counter() - start, peak, process.returncode


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    for name in parser.parse_args().shapes:
        *_, (q, kv), flags = SHAPES[name]
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "source"
            folder.mkdir()
            make(name, folder)
            out = ["-o", f"{work}/out", "--data", str(folder / "tokens.jsonl"), "--device", "cpu", "-v"]
            command = [sys.executable, "-m", "sqa_convert", str(folder), "--q-groups", str(q), "--kv-groups", str(kv)]
            seconds, peak, code = watched([*command, *flags, *out])
            report = {} if code else json.loads((Path(work) / "out" / "report.json").read_text())
        found = {
            "peak_bytes": int(peak),
            "seconds": round(seconds, 1),
            "exit_code": code,
            "heads": [q, kv],
            "flags": flags,
            "stages": report.get("stages"),
            "warnings": [w["rule"] for w in report.get("calibration", {}).get("warnings", [])],
            "measured": sorted(report.get("quality", {})),
            "machine": machine(),
        }
        print(f"{name}: {peak / 1e9:.2f} GB, {seconds:.0f} s", json.dumps(found, indent=1), flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(results | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
