"""Timing that can be trusted: warmed up, synchronised, alternating between what is compared."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import synchronize

WARM_UPS = 2
"""runs before the first that is timed"""

LEAST_SECONDS = 0.05
"""of one sample: shorter runs are repeated within it"""


@dataclass(frozen=True)
class Spread:
    """Of a number measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def seconds(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Of one run, the mean of `times` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, least: float = LEAST_SECONDS
) -> dict[str, list[float]]:
    """Seconds of each run in each round.

    A round times every run once, the first of one round being the last of the next: what slows the machine for a while
    slows all of them. Run i of a round belongs to run i of the others, so ratios are taken within a round.

    Args:
        runs: what to time, by name; each is run `WARM_UPS` times before.
        rounds: samples of each.
        least: seconds of a sample, at least; shorter runs are repeated within it.
    """
    times = {}
    for name, run in runs.items():
        for _ in range(WARM_UPS):
            run()
        times[name] = max(1, round(least / max(seconds(run, device), 1e-9)))
    order, samples = list(runs), {name: [] for name in runs}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for name in order:
            samples[name].append(seconds(runs[name], device, times[name]))
        order = order[1:] + order[:1]
    return samples


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a run holds at its peak above what was held before it; None where the system does not tell.

    On a GPU what torch's allocator gave out, on Linux the process's resident memory.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier run freed counts again
        reset.write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = _kilobytes(status, "VmRSS")
    run()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
