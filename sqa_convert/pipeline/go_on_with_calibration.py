"""`--resume` of a conversion: what its calibration depends on, and the folder beside the output that keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoints.companions import TOKENIZER_CONFIG, TOKENIZER_FILES
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.small_files import read_json, write_json
from ..checkpoints.source import Source, stamp
from ..checkpoints.staging import empty, folder_above, hold
from ..conversion.plan import Plan
from ..errors import (
    CheckpointError,
    DataError,
    InterruptedByUserError,
    OutputError,
    QualityError,
    RecipeError,
    SQAError,
    shown,
)
from ..families import Site
from ..heads import METHODS, Partition
from ..text.find_files import beginnings_of
from .run_options import RunOptions

if TYPE_CHECKING:
    from ..calibration.kept_for_resume import KeptParts

GO_ON = "repeat the command with --resume to go on from where it stopped"

KEPT = "calibration is kept: with --resume it is not done again"

_OF = "of.json"
"""in the folder: what the parts depend on"""


def folder_beside(output: Path) -> Path:
    """Where the parts of a calibration are kept until the output is there."""
    path = output.resolve()
    return path.with_name(f".{path.name}.calibration")


def differs(plan: Plan, source: Source, output: Path | None, options: RunOptions) -> str:
    """What keeps a run that shall go on from doing so, as a sentence; "" where nothing does.

    Raises RecipeError where there can be no calibration to go on with.
    """
    if not options.resume:
        return ""
    if output is None:
        raise RecipeError("--resume goes on beside an output folder: give --output")
    if plan.calibration is None:
        raise RecipeError("--resume goes on with calibration, and this conversion has none: leave it out")
    if not _comparable(plan):
        return (
            f"--resume: {plan.method} is a method of your own, which may be another by now: with it nothing is kept; "
            "calibration begins at its beginning"
        )
    folder = folder_beside(output)
    known = _known(folder)
    if not known:
        return f"--resume: no run to {output} was stopped; calibration begins at its beginning"
    from ..calibration.memory_budget import memory_budget
    from ..devices import choose_device

    new = _depends_on(plan, source, options, memory_budget(plan, source, choose_device(options.device)).lean)
    other = [name for name in {**known, **new} if known.get(name) != new.get(name)]
    if not other:
        return ""
    told = ", ".join(_told(name, known.get(name), new.get(name)) for name in other[:3])
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    return f"--resume: the run to {output} that was stopped had other settings: {told}{more}; calibration begins anew"


@contextlib.contextmanager
def kept_beside(
    plan: Plan, source: Source, output: Path, options: RunOptions, lean: bool
) -> Iterator[KeptParts | None]:
    """The parts that an earlier run has finished, or none, for the block that puts the output in its place.

    What the block finishes stays where it is stopped or fails, unless calibration itself fails in a way that would come
    again, or the source is another by now. No other run has the parts until they are gone.

    Raises OutputError where another run writes this output.
    """
    folder = folder_beside(output)
    keeps, there = plan.calibration is not None and _comparable(plan), folder.exists()
    if not (keeps or there) or (there and _known(folder) is None):
        yield None
        return
    with folder_above(folder, output), _held(folder, output):
        if not keeps:
            _forget(folder)
            yield None
            return
        with _kept(folder, _depends_on(plan, source, options, lean), source, options.resume) as kept:
            yield kept


@contextlib.contextmanager
def _held(folder: Path, output: Path) -> Iterator[None]:
    """A folder that no other run has while the block runs; where it cannot be made there is none."""
    lock = None
    try:
        lock = hold(folder)
    except BlockingIOError as error:
        raise OutputError(f"--output {output}: another run is writing it") from error
    except OSError:
        pass
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def _kept(folder: Path, of: Mapping[str, Any], source: Source, resume: bool) -> Iterator[KeptParts]:
    """The parts in a folder that nobody else has."""
    from ..calibration.kept_for_resume import KeptParts

    if not resume or _known(folder) != of:
        with contextlib.suppress(OSError):
            empty(folder, last=_OF)
            write_json(folder / _OF, of)
    kept = KeptParts(folder if folder.is_dir() else None, of)
    try:
        yield kept
    except BaseException as error:
        again = isinstance(error, DataError | QualityError)  # the same would come again
        other = any(stamp(path) != known for path, known in source.stamps.items())
        if (again and not kept.whole) or other or not kept.count:
            _forget(folder)
        elif isinstance(error, KeyboardInterrupt):
            raise InterruptedByUserError(f"interrupted; {GO_ON}") from error
        elif isinstance(error, SQAError):
            raise type(error)(f"{error}; {KEPT if again else GO_ON}") from error
        raise
    _forget(folder)


def _forget(folder: Path) -> None:
    """Removes parts that are kept. The file that says what they are goes last."""
    with contextlib.suppress(OSError):
        empty(folder, last=_OF)
        folder.rmdir()


def _known(folder: Path) -> dict[str, Any] | None:
    """What the parts in a folder depend on, nothing where there are none; None where it is no folder of ours."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {f".{_OF}.new"}:  # killed when it was made
            return {}
    try:
        known = read_json(folder / _OF, "")
    except CheckpointError:
        return None
    return known if "sqa_convert" in known else None


def _comparable(plan: Plan) -> bool:
    """Whether two plans that say the same are the same: a function of the user's own may have changed."""
    method = plan.own_method or METHODS.get(plan.method)
    return method is None or method.convert.__module__.startswith(f"{__package__.partition('.')[0]}.")


def _depends_on(plan: Plan, source: Source, options: RunOptions, lean: bool) -> dict[str, Any]:
    """All that the parts of a calibration depend on, beside text that others wrote, which is read again.

    Args:
        lean: whether there is too little memory for the source in float32.
    """
    import torch

    from ..devices import choose_device, device_name

    device = choose_device(options.device)
    settings = asdict(plan.fitting_on(device.type))
    text = settings.pop("text")
    settings["calibration text"] = text if isinstance(text, str) else type(text).__name__
    settings["prompts"] = _hash(beginnings_of(settings["prompts"])) if settings["prompts"] else None
    settings["asked"] = sorted(settings["asked"])
    depends = {
        "sqa_convert": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "source in": "bfloat16" if lean else "float32",
        "seed": options.seed,
        "source weights": _hash(fingerprint(source, plan.source_names)),
        "source config": _hash(plan.source_config),
        "tokenizer": _tokenizer(source),
        "method": plan.method,
        "searched": plan.searched,
        "partition": _hash([_groups(plan.partitions), _groups(plan.given), plan.partition_given]),
        "allocation": str(plan.request.allocation),
        "dtype": plan.request.dtype,
        **settings,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(depends, default=str))
    return as_read


def _groups(partitions: Mapping[Site, Partition]) -> dict[str, Any]:
    return {site.prefix: partition.groups for site, partition in partitions.items()}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tokenizer(source: Source) -> str:
    """Tells a tokenizer by its files."""
    if source.folder is None:
        return ""
    patterns = (*TOKENIZER_FILES, TOKENIZER_CONFIG)
    files = sorted({path for pattern in patterns for path in source.folder.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _told(name: str, before: Any, now: Any) -> str:
    """A setting that differs, with its values where they say something."""
    if name in ("source weights", "source config", "tokenizer", "partition", "prompts"):
        return f"another {name}"
    return f"{name.replace('_', ' ')} {shown(before, 40)}, now {shown(now, 40)}"
