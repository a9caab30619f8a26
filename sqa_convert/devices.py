"""What is computed on."""

from __future__ import annotations

import torch

from .errors import RecipeError

_BFLOAT16 = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""FLOP/s of dense bfloat16 products, by part of the name; the vendor's data sheets"""


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU. Raises RecipeError for a device that is not there."""
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(device):
        raise RecipeError(f"--device {device} is not available: choose auto, {', '.join(d for d in here if here[d])}")
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """What a report calls it: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_flops(device: torch.device, count: int = 1) -> float | None:
    """What `count` such GPUs can do in bfloat16, FLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * count for part, peak in _BFLOAT16.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
