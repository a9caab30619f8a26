"""Run a plan: a few attention sites are in memory at a time, and beside them the rest is copied piece by piece."""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointError, one_line
from .families import Site
from .heads import AttentionHeads, Partition, get_method
from .output import ShardWriter, carry_files, write_json
from .plan import OutputTensor, Plan
from .sources import ModelSource, Source, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


class Progress(Protocol):
    """Is told how the work goes on: what is being done, how much of it is done, how much there is, and any news."""

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None: ...


_SITE_ARRAYS = 12  # of (H d, H d) in float64, that converting one site from the weights alone holds at most
_SITE_BUDGET = 2**31  # bytes for all sites at a time, as long as it is one
_READERS = 2  # files verified at a time
_LOOKED_AT = 0.2  # seconds between two looks at how far copying is
MODELS = Path(__file__).parent / "models"


def silent(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class SiteRecord:
    """How one attention site was converted, for the report."""

    method: str
    partition: Partition
    errors: dict[str, float] = field(default_factory=dict)
    """of the site's output on held-out text, as a share of its variance, after each stage"""
    similarity: dict[str, list[list[float]]] | None = None
    """of the source's heads"""

    @property
    def kept(self) -> str:
        """The stage whose heads were kept: the first of the least error."""
        return min(self.errors, key=self.errors.__getitem__)

    @property
    def error(self) -> float:
        """Of what was kept."""
        return self.errors[self.kept]


@dataclass(frozen=True)
class ConvertedSite:
    """The heads of a converted site."""

    heads: AttentionHeads
    record: SiteRecord


Sites = Mapping[Site, ConvertedSite]


@dataclass(frozen=True)
class Calibrated:
    """What calibration gives a conversion."""

    sites: Sites
    """those it has converted"""
    report: dict[str, Any] | None
    """what it did, None where there was none"""


def converted(
    plan: Plan, source: Source, calibrated: Sites, records: dict[Site, SiteRecord]
) -> Generator[tuple[OutputTensor, Tensor], None, None]:
    """The tensors of one attention site after the other.

    Args:
        plan: what to do.
        source: what to convert.
        calibrated: sites that are converted already; the others are converted here, from the weights alone.
        records: is given a record of each site.

    Raises:
        CheckpointError: a weight cannot be read, or is not finite.
    """
    of_site: dict[Site, list[OutputTensor]] = {}
    for tensor in plan.tensors:
        if isinstance(tensor.origin, Site):
            of_site.setdefault(tensor.origin, []).append(tensor)
    blind = _converted_blindly(plan, source, [site for site in of_site if site not in calibrated])
    for site, tensors in of_site.items():
        made = calibrated.get(site) or next(blind)
        records[site] = made.record
        written = plan.family.write(site, made.heads)
        for tensor in tensors:
            result = written.pop(tensor.name).to(torch_dtype(tensor.dtype)).contiguous()
            check_finite(result, tensor.name, source.name)
            yield tensor, result


def _converted_blindly(plan: Plan, source: Source, sites: list[Site]) -> Iterator[ConvertedSite]:
    """Sites from the weights alone, in order; where that takes computing, as many at a time as there are threads.

    Each is computed by one thread, so the result does not depend on their number.
    """
    import torch

    threads = torch.get_num_threads()
    needed = _SITE_ARRAYS * 8 * (plan.dimensions.heads * plan.dimensions.head_dim) ** 2
    workers = max(1, min(threads, _SITE_BUDGET // needed))
    kept = all(plan.partitions[site.kind].is_identity for site in sites)
    if kept or threads == 1 or not (get_method(plan.method).needs_statistics or plan.searched):
        for site in sites:
            yield _blind_conversion(plan, source, site)()
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running: deque[Future[ConvertedSite]] = deque()
        for site in sites:
            running.append(pool.submit(_blind_conversion(plan, source, site)))  # reads here, computes there
            if len(running) > workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def carried(plan: Plan, source: Source, tensor: OutputTensor) -> Iterator[Tensor]:
    """A tensor that only changes its name, and perhaps its dtype, in flat pieces. Raises CheckpointError."""
    assert isinstance(tensor.origin, str)
    for piece in source.pieces(plan.source_names[tensor.origin]):
        result = piece.to(torch_dtype(tensor.dtype))
        check_finite(result, tensor.name, source.name)
        yield result


def _blind_conversion(plan: Plan, source: Source, site: Site) -> Callable[[], ConvertedSite]:
    """Reads one site; what is returned converts it. Raises CheckpointError."""
    heads, partition = read_site(plan, source, site), plan.partitions[site.kind]
    if partition.is_identity:
        return lambda: ConvertedSite(heads, SiteRecord("none", partition))
    method = get_method(plan.method)
    if not (method.needs_statistics or plan.searched):
        return lambda: ConvertedSite(method.convert(heads, partition, None), SiteRecord(method.name, partition))
    norms = [_norm(plan, source, prefix) for prefix in plan.family.norms(site)]

    def convert() -> ConvertedSite:
        import torch

        from .heads.search import search
        from .heads.statistics import from_norms

        chosen = partition
        statistics = from_norms(heads, plan.family.attention(site, plan.source_config), *norms)
        if plan.searched:
            counts = len(partition.clusters), len(partition.groups)
            chosen = search(heads, statistics, *counts, torch.Generator().manual_seed(0))
        return ConvertedSite(method.convert(heads, chosen, statistics), SiteRecord(method.name, chosen))

    return convert


def read_site(plan: Plan, source: Source, site: Site) -> AttentionHeads:
    """The source's heads of one site. Raises CheckpointError."""
    return plan.family.read(site, lambda name: _get(plan, source, name), plan.dimensions)


def _norm(plan: Plan, source: Source, prefix: str) -> tuple[Tensor, Tensor | None]:
    bias = f"{prefix}.bias"
    return (
        _get(plan, source, f"{prefix}.weight"),
        _get(plan, source, bias) if bias in plan.source_names else None,
    )


def _get(plan: Plan, source: Source, name: str) -> Tensor:
    import torch

    tensor = _read(plan, source, name)
    check_finite(tensor, name, source.name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _read(plan: Plan, source: Source, name: str) -> Tensor:
    return source.read(plan.source_names[name])


def check_finite(tensor: Tensor, name: str, source: str) -> None:
    """Raises CheckpointError where a tensor of `source` holds what is no number."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # allocates nothing, and NaN shows in both
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values (in {tensor.dtype})")


def write_model(
    plan: Plan, source: Source, folder: Path, calibrated: Sites, verify: bool, progress: Progress
) -> tuple[dict[Site, SiteRecord], dict[str, str]]:
    """Weights, config, modeling files and what is carried over, into an existing folder.

    What only changes its name is copied beside the computing of what changes.

    Returns:
        A record of each site, and the SHA-256 of each file of weights where they are verified.
    """
    records: dict[Site, SiteRecord] = {}
    sums: dict[str, str] = {}
    writers = {file: ShardWriter(folder / file, tensors, verify) for file, tensors in plan.shards.items()}
    _write_tensors(plan, source, calibrated, records, writers, progress)
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
        source.generation_config.save_pretrained(folder)
    if source.folder is not None:
        tokenizer_class = source.config.get("tokenizer_class") or plan.family.tokenizer_class
        carry_files(source.folder, folder, tokenizer_class)
    return records, sums


def _write_tensors(
    plan: Plan,
    source: Source,
    calibrated: Sites,
    records: dict[Site, SiteRecord],
    writers: Mapping[str, ShardWriter],
    progress: Progress,
) -> None:
    writer_of = {tensor.name: writers[file] for file, tensors in plan.shards.items() for tensor in tensors}
    done = {"computed": 0, "copied": 0}  # bytes, each counted by one thread
    stop = threading.Event()

    def pieces(tensor: OutputTensor) -> Iterator[Tensor]:
        for piece in carried(plan, source, tensor):
            if stop.is_set():
                return
            yield piece

    def copy(said: Progress = silent) -> None:
        for tensor in plan.tensors:
            if isinstance(tensor.origin, str) and not stop.is_set():
                writer_of[tensor.name].write(tensor.name, pieces(tensor))
                done["copied"] += tensor.nbytes
                said("convert", sum(done.values()), plan.nbytes)

    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy) if source.concurrent else None
        computed = converted(plan, source, calibrated, records)
        try:
            for tensor, values in computed:
                writer_of[tensor.name].write(tensor.name, [values])
                done["computed"] += tensor.nbytes
                progress("convert", sum(done.values()), plan.nbytes)
                if copying is not None and copying.done():
                    copying.result()  # raises what went wrong there
            if copying is None:
                copy(progress)
            while copying is not None and not wait([copying], _LOOKED_AT).done:
                progress("convert", sum(done.values()), plan.nbytes)
            if copying is not None:
                copying.result()
        finally:
            stop.set()
            computed.close()
    progress("convert", plan.nbytes, plan.nbytes)


def result_config(plan: Plan, records: Mapping[Site, SiteRecord]) -> dict[str, Any]:
    """config.json of the result, with the partition of every layer."""
    partition: dict[str, list[Any]] = {kind: [] for kind in plan.partitions}
    for site in plan.sites:
        partition[site.kind].append(records[site].partition.groups)
    return plan.config | {"sqa": plan.config["sqa"] | {"partition": partition}}


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
        if isinstance(tensor.origin, Site) and shape != tensor.shape:
            raise CheckpointError(f"{tensor.name} has shape {tensor.shape}, the model class calls for {shape}")


def config_class(plan: Plan) -> type[PreTrainedConfig]:
    from . import models

    return getattr(models, plan.config["auto_map"]["AutoConfig"].rpartition(".")[2])


def model_tensors(
    plan: Plan, source: Source, calibrated: Sites, records: dict[Site, SiteRecord], progress: Progress = silent
) -> dict[str, Tensor]:
    """All tensors of the result; arguments as `converted`."""
    made = {}
    for tensor in plan.tensors:
        if isinstance(tensor.origin, str):
            result = _read(plan, source, tensor.origin).to(torch_dtype(tensor.dtype))
            check_finite(result, tensor.name, source.name)
            made[tensor.name] = result
    done = sum(tensor.nbytes for tensor in made.values())
    for tensor, result in converted(plan, source, calibrated, records):
        made[tensor.name] = result
        done += tensor.nbytes
        progress("convert", done, plan.nbytes)
    return made


def build_model(plan: Plan, tensors: Mapping[str, Tensor], records: Mapping[Site, SiteRecord]) -> PreTrainedModel:
    """The converted model in memory, in eval mode."""
    config = config_class(plan).from_dict(result_config(plan, records))
    return model_class(plan).from_pretrained(None, config=config, state_dict=dict(tensors), dtype="auto").eval()


def model_class(plan: Plan) -> type[PreTrainedModel]:
    from . import models

    return getattr(models, plan.config["architectures"][0])
