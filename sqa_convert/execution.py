"""Run a plan: a few attention sites are in memory at a time, and beside them the rest is copied piece by piece."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .companions import GENERATION_CONFIG
from .errors import CheckpointError, one_line
from .families import Site
from .output import carry_files, write_json
from .plan import OutputTensor, Plan
from .progress import Progress, silent
from .shards import ShardWriter, flushing
from .sites import SiteRecord, Sites, convert_site, site_bytes, uses_torch
from .sources import ModelSource, Source
from .storage import check_finite, decode, encode, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
Store = Callable[[OutputTensor, Iterable[memoryview]], None]
"""is given a tensor of the result, and its bytes in pieces that are good until the next; by several threads"""

_SITE_ARRAYS = 12  # of (H d, H d) in float64, that converting one site from the weights alone holds at most
_SITE_BUDGET = 2**31  # bytes for all sites at a time, as long as it is one
_READERS = 2  # files verified at a time
_LOOKED_AT = 0.2  # seconds between two looks at how far the work is
MODELS = Path(__file__).parent / "models"


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


def write_model(
    plan: Plan, source: Source, folder: Path, calibrated: Sites, verify: bool, progress: Progress
) -> tuple[dict[Site, SiteRecord], dict[str, str]]:
    """Weights, config, modeling files and what is carried over, into an existing folder.

    Returns:
        A record of each site, and the SHA-256 of each file of weights where they are verified.
    """
    sums: dict[str, str] = {}
    writers = {file: ShardWriter(folder / file, tensors, verify) for file, tensors in plan.shards.items()}
    writer_of = {tensor.name: writers[file] for file, tensors in plan.shards.items() for tensor in tensors}

    def store(tensor: OutputTensor, pieces: Iterable[memoryview]) -> None:
        writer_of[tensor.name].write(tensor.name, pieces)

    with flushing(writers.values()):
        records = convert_all(plan, source, calibrated, store, progress)
    if verify:
        with ThreadPoolExecutor(_READERS) as pool:
            sums = dict(zip(writers, pool.map(ShardWriter.verify, writers.values()), strict=True))
    if len(plan.shards) > 1:
        weight_map = {tensor.name: file for file, tensors in plan.shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", result_config(plan, records))
    for file in plan.family.model_files:
        shutil.copyfile(MODELS / file, folder / file)
    if isinstance(source, ModelSource) and source.generation_config is not None:
        # Its own `save_pretrained` refuses what it takes for a mistake, such as a temperature that is not used.
        source.generation_config.to_json_file(folder / GENERATION_CONFIG)
    if source.folder is not None:
        tokenizer_class = source.config.get("tokenizer_class") or plan.family.tokenizer_class
        carry_files(source.folder, folder, tokenizer_class)
    return records, sums


def result_config(plan: Plan, records: Mapping[Site, SiteRecord]) -> dict[str, Any]:
    """config.json of the result, with the partition of every layer."""
    partition: dict[str, list[Any]] = {kind: [] for kind in plan.partitions}
    for site in plan.sites:
        partition[site.kind].append(records[site].partition.groups)
    return plan.config | {"sqa": plan.config["sqa"] | {"partition": partition}}


def check_copies(plan: Plan, source: Source) -> None:
    """Raises CheckpointError where tensors that should be one and the same hold different numbers."""
    for name, other in plan.copies:
        if not source.equal(name, other):
            raise CheckpointError(
                f"{source.name}: {other} and {name} differ, where config.json says that they are one tensor; if the "
                f"model has a head of its own, config.json has to say {plan.family.untied}"
            )


def check_loads(plan: Plan) -> None:
    """The result's config is accepted, and its model calls for the shapes that are planned. Builds no weights.

    Raises:
        CheckpointError: they do not fit, because config.json holds what transformers does not accept.
    """
    import torch

    try:
        config = config_class(plan).from_dict(plan.config)
        if config.dtype is not None and not config.dtype.is_floating_point:
            raise ValueError(f"weights of {config.dtype}")
        with torch.device("meta"):
            model = model_class(plan)(config)
    except Exception as error:  # validation, look-ups of activations and dtypes: each fails in its own way
        raise CheckpointError(f"config.json is not accepted by the model class: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "" if model.base_model_prefix in dict(model.named_children()) else f"{model.base_model_prefix}."
    for tensor in plan.tensors:
        shape = expected.get(tensor.name, expected.get(tensor.name.removeprefix(prefix)))
        if shape != tensor.shape and (shape is not None or isinstance(tensor.origin, Site)):
            raise CheckpointError(f"{tensor.name} has shape {tensor.shape}, the model class calls for {shape}")


def config_class(plan: Plan) -> type[PreTrainedConfig]:
    from . import models

    return getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2])


def build_model(
    plan: Plan, source: Source, calibrated: Sites, progress: Progress = silent
) -> tuple[PreTrainedModel, dict[Site, SiteRecord]]:
    """The converted model in memory, in eval mode, and a record of each site; arguments as `convert_all`."""
    import torch

    made: dict[str, Tensor] = {}

    def store(tensor: OutputTensor, pieces: Iterable[memoryview]) -> None:
        data, at = torch.empty(tensor.nbytes, dtype=torch.uint8), 0
        for piece in pieces:
            data.numpy()[at : at + len(piece)] = piece
            at += len(piece)
        made[tensor.name] = data.view(torch_dtype(tensor.dtype)).view(tensor.shape)

    records = convert_all(plan, source, calibrated, store, progress)
    tensors = {tensor.name: made[tensor.name] for tensor in plan.tensors}  # "auto" takes the dtype of the first
    config = config_class(plan).from_dict(result_config(plan, records))
    model = model_class(plan).from_pretrained(None, config=config, state_dict=tensors, dtype="auto")
    return model.eval(), records


def model_class(plan: Plan) -> type[PreTrainedModel]:
    from . import models

    return getattr(models, plan.config["architectures"][0])
