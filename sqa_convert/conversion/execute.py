"""Carry out a plan: a few attention sites in memory at a time, the rest copied beside them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from ..checkpoints.dtypes import check_finite, decode, encode
from ..checkpoints.source import Source
from ..errors import CheckpointError
from ..families import Site
from ..progress import Progress, silent
from .convert_site import SiteRecord, Sites, convert_site, site_bytes, uses_torch
from .plan import OutputTensor, Plan

T = TypeVar("T")

Store = Callable[[OutputTensor, Iterable[memoryview]], None]
"""is given a tensor of the result, and its bytes in pieces that are good until the next; by several threads"""

_SITE_ARRAYS = 12  # of (H d, H d) in float64, that converting one site from the weights alone holds at most

_SITE_BUDGET = 2**31  # bytes for all sites at a time, as long as it is one

_LOOKED_AT = 0.2  # seconds between two looks at how far the work is


def convert_all(
    plan: Plan, source: Source, calibrated: Sites, store: Store, progress: Progress = silent
) -> dict[Site, SiteRecord]:
    """Gives every tensor of the result to `store`.

    One thread begins with what only changes its name, the others with attention sites; who is done with the one helps
    with the other, as far as memory allows. Each site is converted by one thread, so that the result does not depend on
    their number.

    Args:
        plan: what to do.
        source: what to convert.
        calibrated: sites that are converted already; the others are converted here, from the weights alone.
        store: takes the tensors, in any order.
        progress: is told of bytes.

    Returns:
        A record of each site.

    Raises:
        CheckpointError: a weight cannot be read, or is not finite.
    """
    copies = deque(tensor for tensor in plan.tensors if isinstance(tensor.origin, str))
    copies.reverse()  # the last first: the threads shall write to different files, as far as there are several
    of_site: dict[Site, list[OutputTensor]] = {}
    for tensor in plan.tensors:
        if isinstance(tensor.origin, Site):
            of_site.setdefault(tensor.origin, []).append(tensor)
    sites = deque(of_site.items())
    records: dict[Site, SiteRecord] = {}
    done: list[int] = []  # bytes
    stop = threading.Event()

    def taken(queue: deque[T]) -> Iterator[T]:
        while not stop.is_set():
            try:
                yield queue.popleft()
            except IndexError:
                return

    def pieces(tensor: OutputTensor) -> Iterator[memoryview]:
        for piece in carried(plan, source, tensor):
            if stop.is_set():
                return
            yield piece

    def copy_rest() -> None:
        for tensor in taken(copies):
            store(tensor, pieces(tensor))
            done.append(tensor.nbytes)

    def convert_sites() -> None:
        for site, tensors in taken(sites):
            made = calibrated.get(site) or convert_site(plan, source, site)
            records[site] = made.record
            for tensor, data in zip(tensors, site_bytes(plan, site, made.heads, tensors, source.name), strict=True):
                store(tensor, data)
                done.append(tensor.nbytes)

    def work(*stages: Callable[[], None]) -> None:
        for stage in stages:
            stage()

    with _sites_at_a_time(plan) as count:
        works: list[tuple[Callable[[], None], ...]] = [(convert_sites, copy_rest)]
        if source.concurrent:
            works = works * max(count - 1, 1) + [(copy_rest, convert_sites) if count > 1 else (copy_rest,)]
        with ThreadPoolExecutor(len(works)) as pool:
            try:
                running = {pool.submit(work, *stages) for stages in works}
                while running:
                    ended, running = wait(running, _LOOKED_AT, FIRST_EXCEPTION)
                    for future in ended:
                        future.result()  # raises what went wrong there
                    progress("convert", sum(done), plan.nbytes)
            finally:
                stop.set()
    return records


@contextlib.contextmanager
def _sites_at_a_time(plan: Plan) -> Iterator[int]:
    """As many as there are cores and memory for; where torch converts them, its number of threads is kept to."""
    count, threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, None
    if uses_torch(plan):
        import torch

        threads = torch.get_num_threads()
        count = min(count, threads)
    needed = _SITE_ARRAYS * 8 * (plan.dimensions.heads * plan.dimensions.head_dim) ** 2
    try:
        yield max(1, min(count, _SITE_BUDGET // needed))
    finally:
        if threads is not None:
            torch.set_num_threads(threads)


def carried(plan: Plan, source: Source, tensor: OutputTensor) -> Iterator[memoryview]:
    """The bytes of a tensor that only changes its name, and perhaps its dtype. Raises CheckpointError."""
    assert isinstance(tensor.origin, str)
    if tensor.origin in plan.zeros:
        yield memoryview(bytes(tensor.nbytes))
        return
    name = plan.source_names[tensor.origin]
    stored = source.index[name].dtype
    for piece in source.pieces(name):
        if tensor.dtype != stored:
            piece = encode(decode(piece, stored), tensor.dtype)
        check_finite(piece, tensor.dtype, tensor.name, source.name)
        yield piece


def check_copies(plan: Plan, source: Source) -> None:
    """Raises CheckpointError where tensors that should be one and the same hold different numbers."""
    for name, other in plan.copies:
        if not source.equal(name, other):
            raise CheckpointError(
                f"{source.name}: {other} and {name} differ, where config.json says that they are one tensor; if the "
                f"model has a head of its own, config.json has to say {plan.family.untied}"
            )
