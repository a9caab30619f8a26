"""How numbers are stored: safetensors' dtypes, from bytes to numpy's arrays and back.

Needs no torch, which takes longer to import than copying a model of a gigabyte takes; and numpy only when it is used,
so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    Array = np.ndarray[Any, Any]

PIECE = 2**20
"""bytes handed on at a time: a power of two, and little enough to stay in the processor's cache"""

DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
"""safetensors' names of the dtypes a checkpoint may hold: torch's names and bytes"""

FLOATING = ("F64", "F32", "F16", "BF16")

_INFINITE = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
"""the bits of infinity: an exponent of ones, which every NaN has too and no number"""

_ENCODED = 2**18  # numbers at a time: few enough for the processor's cache

_COLUMNS = 16  # transposed at a time: what a line of the processor's cache holds


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of safetensors' name."""
    import torch

    return getattr(torch, DTYPES[name][0])


def dtype_name(dtype: torch.dtype) -> str | None:
    """safetensors' name of torch's dtype; None for one that no checkpoint may hold."""
    return next((name for name, (torch_name, _) in DTYPES.items() if str(dtype) == f"torch.{torch_name}"), None)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a safetensors file holds of a tensor on the CPU; shares its memory where that is contiguous."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def check_finite(data: memoryview, dtype: str, name: str, where: str) -> None:
    """Raises CheckpointError where the bytes of tensor `name` of `where` hold what is no number."""
    if dtype not in _INFINITE:
        return
    import numpy as np

    exponent = _INFINITE[dtype]
    for start in range(0, len(data), PIECE):
        bits = np.frombuffer(data[start : start + PIECE], f"u{DTYPES[dtype][1]}")
        if (bits & exponent).max() == exponent:
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values (in {DTYPES[dtype][0]})")


def decoded_dtype(dtype: str) -> str:
    """Of the numbers that `decode` makes: "float32", which holds all narrower ones exactly, or "float64"."""
    return "float64" if dtype == "F64" else "float32"


def decode(data: memoryview, dtype: str, into: Array | None = None) -> Array:
    """Stored floating-point numbers as a flat array of `decoded_dtype`: a new one, or `into`."""
    import numpy as np

    numbers = np.frombuffer(data, _numpy_dtype(dtype))
    if into is None:
        return numbers.astype(decoded_dtype(dtype))
    into[:] = numbers
    return into


def encode(array: Array, dtype: str) -> memoryview:
    """An array's bytes in C order, each number rounded to the nearest of `dtype`, of two as near to the even one.

    float64 is rounded to bfloat16 by way of float32, as torch does. What is too large for `dtype` becomes infinite.
    Shares the array's memory where nothing has to change.
    """
    import numpy as np

    array = _contiguous(array).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(_numpy_dtype(dtype), copy=False).view("u1").data


def encoded(array: Array, dtype: str) -> Iterator[memoryview]:
    """What `encode` makes of an array, some rows at a time, so that memory is needed for those alone."""
    rows = max(1, _ENCODED * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        yield encode(array[start : start + rows], dtype)


def _contiguous(array: Array) -> Array:
    import numpy as np

    if array.flags.c_contiguous or array.ndim != 2:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], _COLUMNS):  # as a whole, transposing takes three times as long
        copy[:, start : start + _COLUMNS] = array[:, start : start + _COLUMNS]
    return copy


def _numpy_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if name == "BF16" else DTYPES[name][0])
