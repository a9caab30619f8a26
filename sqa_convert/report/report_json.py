"""report.json: what a conversion did, as numbers."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoints.companions import left_behind
from ..checkpoints.small_files import REPORT, is_folder, is_ours, read_json
from ..checkpoints.source import Source
from ..conversion.attention_cost import Cost
from ..conversion.plan import Plan
from ..errors import CheckpointError, shown
from .provenance import machine, origin
from .source_card import source_card

if TYPE_CHECKING:
    from ..conversion.convert_site import SiteRecord
    from ..families import Site

SCHEMA = 1

NEXT_TO_NOTHING = 0.005
"""nats a token: a difference that another few thousand tokens of text can turn round"""

_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "datasets")

_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}


def conversion_report(
    plan: Plan,
    source: Source,
    output: Path | None,
    sites: Mapping[Site, SiteRecord] | None = None,
    calibration: dict[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """The report of a conversion, before anything is measured.

    Args:
        sites: how each was converted; None before any was.
        calibration: what calibration reports of itself.
        device: what is computed on, where that is known.
    """
    report = {
        "schema": SCHEMA,
        "sqa_convert": __version__,
        **origin(),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "architecture": plan.family.source_architecture(source.config),
            "files": source.files,
            "notes": list(plan.notes),
            "card": {} if source.folder is None else source_card(source.folder),
            "left_behind": _left_behind(source),
        },
        "output": None if output is None else str(output),
        "architecture": plan.config["architectures"][0],
        "method": plan.method,
        "seed": seed,
        "sites": [_site(site, (sites or {}).get(site), plan) for site in plan.sites],
        "context_tokens": plan.dimensions.context,
        "cost": {"before": _cost(plan.before), "after": _cost(plan.after)},
        "seconds": {},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "machine": machine(device),
    }
    return report if calibration is None else report | {"calibration": calibration}


def _left_behind(source: Source) -> list[str]:
    """Files that lie beside the source's weights; of the hub only what is needed was fetched."""
    if source.folder is None or source.revision is not None:
        return []
    return left_behind(source.folder, source.files)


def _site(site: Site, record: SiteRecord | None, plan: Plan) -> dict[str, Any]:
    if record is None:
        return {"kind": site.kind, "layer": site.layer, "partition": plan.partitions[site].groups}
    described: dict[str, Any] = {
        "kind": site.kind,
        "layer": site.layer,
        "method": record.method,
        "partition": record.partition.groups,
    }
    if record.errors:
        described["output_error"] = {stage: round(error, 6) for stage, error in record.errors.items()}
        described["kept"] = record.kept
    if record.half_errors:
        described["half_errors"] = {half: round(error, 6) for half, error in record.half_errors.items()}
    if record.similarity:
        described["similarity"] = record.similarity
    return described


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "query_heads": cost.q_heads,
        "key_value_heads": cost.kv_heads,
        "parameters": cost.parameters,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes,
        "attention_flops": cost.attention_flops,
        "score_flops": cost.score_flops,
    }


def auto_class(report: dict[str, Any], otherwise: str = "AutoModel") -> str:
    """The Auto class of transformers that loads the result."""
    architecture = str(report.get("architecture"))
    known = architecture.startswith("SQA")
    return next((auto for ending, auto in _AUTO_CLASSES.items() if known and architecture.endswith(ending)), otherwise)


def read_report(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError when the folder was not made by sqa-convert."""
    if not is_folder(folder):
        raise CheckpointError(f"{shown(str(folder), 300)}: no such folder")
    report = read_json(folder / REPORT, f"{folder} holds no {REPORT}: it was not made by sqa-convert")
    if not (is_ours(report) and auto_class(report, "") and isinstance(report.get("sites"), list)):
        raise CheckpointError(f"{folder / REPORT} is no report of sqa-convert")
    source = report.get("source")
    if not (isinstance(source, dict) and {"name", "revision", "architecture"} <= source.keys()):
        raise CheckpointError(f"{folder / REPORT} does not say what it was made from: its entry source is not whole")
    return report
