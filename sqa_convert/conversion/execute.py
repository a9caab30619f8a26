"""Carry out a plan: a few attention sites in memory at a time, the rest copied beside them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from ..checkpoints.dtypes import check_finite, decode, encode
from ..checkpoints.source import Source
from ..errors import CheckpointError
from ..families import Site
from ..progress import Progress, silent
from .convert_site import SiteRecord, Sites, convert_site, site_bytes, tensor_bytes, uses_torch
from .plan import OutputTensor, Plan

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Store = Callable[[OutputTensor, Iterable[memoryview]], None]
"""takes a tensor of the result and its bytes, in pieces of which each is good until the next; called by any thread"""

_SITE_ARRAYS = 12  # at most, of (H d, H d) in float64, while one site is converted from the weights alone

_SITE_BUDGET = 2**31  # bytes for all sites at a time; one site may take more

_LOOK_EVERY = 0.2  # seconds, to see how far the work is


def convert_all(
    plan: Plan,
    source: Source,
    calibrated: Sites,
    store: Store,
    progress: Progress = silent,
    trained: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[Site, SiteRecord]:
    """Gives every tensor of the result to `store`, by several threads.

    Each site is converted by one thread, so that the result does not depend on their number.

    Args:
        plan: what to do.
        source: what to convert.
        calibrated: sites that are converted already; the others are converted here, from the weights alone.
        store: takes the tensors, in any order.
        progress: is told of bytes.
        trained: tensors by name that take the place of what would be converted or copied.

    Returns:
        A record of each site.

    Raises:
        CheckpointError: a weight cannot be read, or is not finite.
    """
    work = _Work(plan, source, calibrated, store, trained)
    with _sites_at_a_time(plan) as at_a_time:
        workers = work.workers(at_a_time)
        with ThreadPoolExecutor(len(workers)) as pool:
            try:
                running = {pool.submit(worker) for worker in workers}
                while running:
                    ended, running = wait(running, _LOOK_EVERY, FIRST_EXCEPTION)
                    for future in ended:
                        future.result()  # raises what went wrong there
                    progress("convert", sum(work.bytes_stored), plan.nbytes)
            finally:
                work.stop.set()
    return work.records


class _Work:
    """What is left to do of a plan, as two queues that all threads take from: attention sites, and tensors to copy."""

    def __init__(
        self, plan: Plan, source: Source, calibrated: Sites, store: Store, trained: Mapping[str, Tensor]
    ) -> None:
        self.plan, self.source, self.calibrated, self.store, self.trained = plan, source, calibrated, store, trained
        self.copies = deque(tensor for tensor in plan.tensors if isinstance(tensor.origin, str))
        self.copies.reverse()  # the last first: the threads shall write to different files, as far as there are several
        tensors: dict[Site, list[OutputTensor]] = {}
        for tensor in plan.tensors:
            if isinstance(tensor.origin, Site):
                tensors.setdefault(tensor.origin, []).append(tensor)
        self.sites = deque(tensors.items())
        self.records: dict[Site, SiteRecord] = {}
        self.bytes_stored: list[int] = []  # of each tensor
        self.stop = threading.Event()

    def workers(self, at_a_time: int) -> list[Callable[[], None]]:
        """What each thread does, where memory allows to convert so many sites at a time.

        All but one begin with sites, which take longer; who is done with the one helps with the other.
        """
        if not self.source.concurrent:
            return [self.sites_then_copies]
        if at_a_time == 1:  # the second thread must not convert a site beside the first
            return [self.sites_then_copies, self.copy_tensors]
        return [*[self.sites_then_copies] * (at_a_time - 1), self.copies_then_sites]

    def sites_then_copies(self) -> None:
        self.convert_sites()
        self.copy_tensors()

    def copies_then_sites(self) -> None:
        self.copy_tensors()
        self.convert_sites()

    def convert_sites(self) -> None:
        for site, tensors in self._take(self.sites):
            converted = self.calibrated.get(site) or convert_site(self.plan, self.source, site)
            self.records[site] = converted.record
            pieces_of_each = site_bytes(self.plan, site, converted.heads, tensors, self.source.name)
            for tensor, pieces in zip(tensors, pieces_of_each, strict=True):
                self._store(tensor, pieces)

    def copy_tensors(self) -> None:
        for tensor in self._take(self.copies):
            pieces = copied_bytes(self.plan, self.source, tensor)
            self._store(tensor, takewhile(lambda _: not self.stop.is_set(), pieces))

    def _store(self, tensor: OutputTensor, pieces: Iterable[memoryview]) -> None:
        """Stores a tensor: what it was trained to be, else its bytes as they come."""
        if (trained := self.trained.get(tensor.name)) is not None:
            pieces = tensor_bytes(trained.numpy(), tensor, self.source.name)
        self.store(tensor, pieces)
        self.bytes_stored.append(tensor.nbytes)

    def _take(self, queue: deque[T]) -> Iterator[T]:
        """One entry after another, until none is left or another thread has failed."""
        while not self.stop.is_set():
            try:
                yield queue.popleft()
            except IndexError:
                return


@contextlib.contextmanager
def _sites_at_a_time(plan: Plan) -> Iterator[int]:
    """How many sites are converted at a time: as cores and memory allow, and torch's threads where it is used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = None
    if uses_torch(plan):
        import torch

        threads = torch.get_num_threads()
        cores = min(cores, threads)
    needed = _SITE_ARRAYS * 8 * (plan.dimensions.heads * plan.dimensions.head_dim) ** 2
    try:
        yield max(1, min(cores, _SITE_BUDGET // needed))
    finally:
        if threads is not None:  # converting sites changed it
            torch.set_num_threads(threads)


def copied_bytes(plan: Plan, source: Source, tensor: OutputTensor) -> Iterator[memoryview]:
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
