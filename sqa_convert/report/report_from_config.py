"""The report of a converted model that has none with it: one that transformers' own `save_pretrained` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.find import open_source
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.small_files import REPORT, is_folder, read_config, write_json
from ..conversion.asked_partitions import site_name
from ..conversion.plan import make_plan
from ..conversion.request import Request
from ..errors import CheckpointError
from ..families import family_of
from ..heads import Partition
from .report_json import conversion_report, read_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def report_of(folder: Path, source: str | Path | PreTrainedModel | None = None) -> dict[str, Any]:
    """The report of a folder, made anew where it has none. Raises CheckpointError."""
    if (folder / REPORT).is_file():
        return read_report(folder)
    from .. import models

    table = read_config(str(folder), folder) if is_folder(folder) else {}
    classes = {known.model_type: known for known in (models.SQAGPT2Config, models.SQAT5Config)}
    if table.get("model_type") not in classes:
        return read_report(folder)  # which says what it is not
    config = classes[table["model_type"]].from_dict(table)
    return rebuilt_report(config, source) | {"output": str(folder)}


def with_report(folder: Path, source: str | Path | None) -> None:
    """Puts a report into a folder that has a converted model and none. Raises CheckpointError."""
    if not (folder / REPORT).is_file():
        write_json(folder / REPORT, report_of(folder, source))


def rebuilt_report(config: Any, source: str | Path | PreTrainedModel | None = None) -> dict[str, Any]:
    """What is known of a converted model by its config and its source: all but how each site was converted.

    Args:
        config: of the converted model.
        source: the unconverted model, by default the one that the config names.

    Raises:
        CheckpointError: it is no converted model, the source is not there, or it is not its source.
    """
    made = getattr(config, "sqa", None)
    if not isinstance(made, Mapping) or not {"source", "source_heads"} <= made.keys():
        raise CheckpointError("the model's config does not say what it was made from: it was not made by sqa-convert")
    if source is None:
        opened = open_source(str(made["source"]), made.get("revision"))
    else:
        opened = open_source(str(source)) if isinstance(source, str | Path) else ModelSource(source)
    family = family_of(opened.config)
    sizes, sites = family.dimensions(opened.config), family.sites(opened.config)
    becomes = family.architectures.get(family.source_architecture(opened.config))
    here = (becomes, sizes.heads, sizes.width, max(site.layer for site in sites if site.kind == sites[0].kind) + 1)
    there = (config.architectures[0], made["source_heads"], config.hidden_size, config.num_hidden_layers)
    if here != there:
        what = f"class, heads, width, layers {here}, not {there}"
        raise CheckpointError(f"{opened.name} is not what the model was made from: {what}")
    counts = {site_name(site): config.heads(site.kind, site.layer) for site in sites}
    partition = {name: Partition.contiguous(sizes.heads, *kept) for name, kept in counts.items()}
    request = Request(partition=partition, method="mean", calibration=None)
    report = conversion_report(make_plan(opened, request), opened, None)
    report |= {"method": made.get("method", "unknown"), "architecture": config.architectures[0]}
    known = made.get("partition") or {}
    for site in report["sites"]:
        site.pop("partition")  # it is not in the weights
        if site["layer"] < len(by_layer := known.get(site["kind"], ())):
            site["partition"] = by_layer[site["layer"]]
    return report
