"""Many small problems by one thread of torch.

Several would mostly wait for each other, and long where other programs need the cores: 14 s for 0.5 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """In the block torch computes by one thread. Also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
