"""The processes of one run: which one writes, what the others see of it, and how they agree.

Under `torchrun` or `accelerate launch` every process runs the same code. What one must decide, the first decides for
all; a fault of one is a fault of all, so that none waits for another that has left.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import OutputError, RecipeError, SQAError, one_line

_T = TypeVar("_T")

_KNOWN: dict[str, Any] = {"group": None, "apart": False, "host": ""}  # to this process, from `join` and `look` on

_PATIENCE = timedelta(hours=3)
"""for another process, which may be writing a large model; one that ends is noticed at once"""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that decides, and writes the result."""
    return rank() == 0


def is_writer() -> bool:
    """Whether this process writes where it runs: the first, and one on each node that has a folder of its own."""
    return is_first() or (apart() and os.environ.get("LOCAL_RANK", "0") == "0")


def apart() -> bool:
    """Whether this process cannot see what the first one writes; known after `look`."""
    return bool(_KNOWN["apart"])


def first_host() -> str:
    """The name of the machine that the first process runs on; known after `look`."""
    return str(_KNOWN["host"])


def join(device: torch.device) -> None:
    """Sets up the talk of all processes, which the Trainer takes over. Raises RecipeError."""
    if count() == 1 or _KNOWN["group"] is not None:
        return
    from accelerate import PartialState

    cpu = device.type == "cpu"
    PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))
    if not distributed.is_initialized():
        raise RecipeError(f"--device {device} takes one process; several take --device cuda or cpu")
    _KNOWN["group"] = distributed.new_group(backend="gloo", timeout=_PATIENCE)  # through the CPU: no GPU is waited for


def leave() -> None:
    """Ends the talk of all processes at once: one that ends while another still talks would abort."""
    if not distributed.is_initialized():
        return
    if _KNOWN["group"] is not None:
        distributed.barrier(_KNOWN["group"])
        _KNOWN["group"] = None
    distributed.destroy_process_group()


def gather(value: _T) -> list[_T]:
    """The value of each process, in their order."""
    if _KNOWN["group"] is None:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value, group=_KNOWN["group"])
    return values


def any_says(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if _KNOWN["group"] is None:
        return flag
    level = torch.tensor(float(flag))
    distributed.all_reduce(level, distributed.ReduceOp.MAX, group=_KNOWN["group"])
    return bool(level)


def from_first(value: _T) -> _T:
    """The first process's value, in all of them."""
    if _KNOWN["group"] is None:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0, group=_KNOWN["group"])
    return values[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes end the block together, and an error in one is raised in all.

    The block must not ask the other processes anything. Raises what it raised here, else the first fault of the others.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    faults = gather(None if fault is None else _told(fault))
    if fault is not None:
        raise fault
    for other in faults:
        if other is not None:
            raise other


def _told(fault: Exception) -> SQAError:
    """An error as the other processes are told of it."""
    error_class = type(fault) if isinstance(fault, SQAError) else OutputError
    return error_class(f"{one_line(fault, 1000)} (process {rank()}, on {socket.gethostname()})")


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return count() > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error))


def look(folder: Path) -> None:
    """Finds out whether this process sees what the first one writes in its folder."""
    name, _KNOWN["host"] = from_first((f".{uuid.uuid4().hex}", socket.gethostname()))
    with together():
        if is_first() and count() > 1:
            (folder / name).touch()
    _KNOWN["apart"] = not is_first() and not (folder / name).exists()
    with together():
        pass
    if is_first():
        (folder / name).unlink(missing_ok=True)
