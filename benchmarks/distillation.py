"""Peak memory and time of the distillation loss beside the plain formula, at GPT-2's vocabulary.

    python benchmarks/distillation.py [--rows 8 --length 1024 --width 768 --vocabulary 50257 --repeats 5]

Forward and backward of KL(teacher || student) from hidden states (rows, length, width) to the loss. Each repeat is a
process of its own, chunked and plain in turn; its peak is what the kernel accounts (CPU) or the allocator counts
(CUDA), less what was there before. Writes benchmarks/results/distillation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

from sqa_convert.calibration.distillation_loss import Targets, distillation_loss

RESULTS = Path(__file__).resolve().parent / "results" / "distillation.json"


def once(kind: str, rows: int, length: int, width: int, vocabulary: int) -> dict[str, float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, wanted = (torch.randn(rows, length, width, device=device) for _ in range(2))
    head, teacher = (torch.randn(vocabulary, width, device=device) / width**0.5 for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_()
    labels = torch.zeros(rows, length, dtype=torch.long, device=device)
    head.grad, hidden.grad = torch.zeros_like(head), torch.zeros_like(hidden)

    def peak() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    (torch.zeros(64, 64, device=device) @ torch.zeros(64, 64, device=device)).sum().item()
    before, start = peak(), time.perf_counter()
    if kind == "chunked":
        loss = distillation_loss(hidden, head, Targets(labels, wanted, teacher)) / labels.numel()
    else:
        student, target = ((h @ w.T).log_softmax(-1) for h, w in ((hidden, head), (wanted, teacher)))
        loss = nn.functional.kl_div(student.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
    loss.backward()
    after = peak()
    return {"MB": after - before, "seconds": time.perf_counter() - start, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shape = {"rows": 8, "length": 1024, "width": 768, "vocabulary": 50257}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", choices=("chunked", "plain"))
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in shape}
    if options.once:
        print(json.dumps(once(options.once, **shape)))
        return
    found: dict[str, list[dict[str, float]]] = {"chunked": [], "plain": []}
    for _ in range(options.repeats):
        for kind, runs in found.items():
            flags = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--once", kind, *flags]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    result = {
        "shape": shape,
        "repeats": options.repeats,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
        "date": date.today().isoformat(),
    }
    for kind, runs in found.items():
        result[kind] = {
            key: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for key in ("MB", "seconds", "loss")
            for v in [[run[key] for run in runs]]
        }
        print(kind, result[kind])
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
