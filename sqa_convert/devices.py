"""What is computed on."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from .errors import RecipeError

_BFLOAT16 = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}  # fmt: skip
"""FLOP/s of dense bfloat16 products, by the words of the name; the vendor's data sheets"""
_OTHER = re.compile(r"MIG|Laptop|Max-Q|SUPER|Ti\b|\bD\b|-\d+[ACQ]\b", re.IGNORECASE)
"""of names that begin like another GPU's, and of parts of a GPU"""


def choose_device(device: str | torch.device) -> torch.device:
    """The device to compute on.

    Args:
        device: "auto" is CUDA, then MPS, then what a package has added to torch, then the CPU; "cuda:1" is the second
            GPU.

    Raises:
        RecipeError: it is not there.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        **_registered(),
    }
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", *_registered(), "cpu") if counts[name]))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    # torch takes cuda:256 for cuda:0.
    if str(chosen) != str(device) or (chosen.index or 0) >= counts.get(chosen.type, 0):
        here = [name if count == 1 else f"{name}:0 … {name}:{count - 1}" for name, count in counts.items() if count]
        raise RecipeError(f"--device {device} is not available: choose auto, {', '.join(here)}")
    return chosen if chosen.type == "cuda" else torch.device(chosen.type)  # of the others there is one


@contextlib.contextmanager
def within_memory(work: str, device: torch.device, ways_out: str) -> Iterator[None]:
    """Raises RecipeError, which names ways out, where work in the block does not fit into memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RecipeError(f"{work} does not fit on {device}: {ways_out}") from error


def _registered() -> dict[str, int]:
    """The kind of accelerator that a package has added to torch, such as Ascend's "npu", and how many there are."""
    name = torch._C._get_privateuse1_backend_name()
    module = getattr(torch, name, None)
    return {name: module.device_count()} if module is not None and module.is_available() else {}


def own_device(device: torch.device) -> torch.device:
    """Of the processes that torchrun starts on a machine each has a GPU of its own. Raises RecipeError."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise RecipeError(f"--device {device}: each process has a GPU of its own; give --device cuda")
    if int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)) > count:
        raise RecipeError(f"there are more processes here than GPUs ({count}): start fewer, or --device cpu")
    return torch.device("cuda", number)


def device_name(device: torch.device) -> str:
    """What a report calls it: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_flops(device: torch.device, count: int = 1) -> float | None:
    """What `count` such GPUs can do in bfloat16, FLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for part, peak in _BFLOAT16.items() if re.search(rf"(?<!\w){part}(?!\w)", name))
    peak = None if _OTHER.search(name) else next(known, None)
    return None if peak is None else peak * count


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
