"""What a conversion did and cost, as numbers (report.json), tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import read_json
from .companions import left_behind
from .errors import CheckpointError
from .figures import nats, perplexity
from .heads import METHODS
from .output import REPORT, is_ours
from .plan import Cost, Plan
from .source_card import source_card
from .sources import Source

if TYPE_CHECKING:
    from .families import Site
    from .sites import SiteRecord

SCHEMA = 1
ROWS = ("source", "converted", "before", "uptrained", "control", "mean")
"""models a report may hold measurements of; "before" is what a second uptraining began with, "mean" the source with its
heads averaged, for comparison"""
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
) -> dict[str, Any]:
    """The report of a conversion, before anything is measured.

    Args:
        sites: how each was converted; None before any was.
        calibration: what calibration reports of itself.
    """
    report = {
        "schema": SCHEMA,
        "sqa_convert": __version__,
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
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    return report if calibration is None else report | {"calibration": calibration}


def _left_behind(source: Source) -> list[str]:
    """Files that lie beside the source's weights; of the hub only what is needed was fetched."""
    if source.folder is None or source.revision is not None:
        return []
    return left_behind(source.folder, source.files)


def _site(site: Site, record: SiteRecord | None, plan: Plan) -> dict[str, Any]:
    if record is None:
        return {"kind": site.kind, "layer": site.layer, "partition": plan.partitions[site.kind].groups}
    described: dict[str, Any] = {
        "kind": site.kind,
        "layer": site.layer,
        "method": record.method,
        "partition": record.partition.groups,
    }
    if record.errors:
        described["output_error"] = {stage: round(error, 6) for stage, error in record.errors.items()}
        described["kept"] = record.kept
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


def presented(report: dict[str, Any]) -> dict[str, Any]:
    """What the card and the page both say of a report."""
    speed = report.get("speed")
    return {
        "report": report,
        "name": Path(report["output"] or report["source"]["name"]).name,
        "auto": auto_class(report),
        "how": [*source_lines(report), *calibration_lines(report)],
        "doubts": quality_lines(report),
        "uptraining": uptraining_lines(report),
        "speed_title": speed_title(speed) if speed else "",
    }


def recovered(quality: dict[str, Any], key: str) -> float | None:
    """Share of the damage in "loss" or "kl" that uptraining took back: 1 is all of it. None where conversion cost next
    to nothing, of which there is no share."""
    if "uptrained" not in quality:
        return None
    start = quality["source"][key] or 0.0  # the source has no KL to itself
    damage = quality["converted"][key] - start
    return None if damage < NEXT_TO_NOTHING else (quality["converted"][key] - quality["uptrained"][key]) / damage


def last_quality(report: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of the weights as they are now; None where nothing was."""
    quality = report.get("quality", {})
    return quality.get("uptrained" if "uptraining" in report else "converted")


def source_lines(report: dict[str, Any]) -> list[str]:
    """What there is to know of how the source was taken, in sentences; mostly nothing."""
    return [str(note) for note in report["source"].get("notes", [])]


def quality_lines(report: dict[str, Any]) -> list[str]:
    """Why not to trust what was measured, or why nothing was, in sentences."""
    lines = [f"warning: {doubt['text']}" for doubt in report.get("quality", {}).get("warnings", [])]
    return [*lines, f"not measured: {report['not_measured']}"] if "not_measured" in report else lines


def left_lines(report: dict[str, Any]) -> list[str]:
    """Which files of the source's folder the result does not have, in a sentence; none where it has all."""
    left = report["source"].get("left_behind")
    return [f"left behind of the source's folder: {', '.join(left)}"] if left else []


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """What calibration did, in sentences; none where there was none."""
    done = report.get("calibration")
    if done is None:
        blind = report["method"] in METHODS and METHODS[report["method"]].needs_statistics
        return ["converted from the weights alone, fitted to no text"] if blind else []
    lines = [f"warning: {doubt['text']}" for doubt in done.get("warnings", [])]
    lines.append(f"fitted on {done['tokens']:,} tokens, chosen on {done['held_out_tokens']:,} more: {done['text']}")
    if "kl_before_refine" in done:
        kl = sorted(done["kl_before_refine"].items(), key=lambda item: item[1])
        tried = " · ".join(f"{name} {value:.4f}" for name, value in kl)
        lines.append(f"chosen: {done['chosen']}; KL on the tokens to choose by, before refining: {tried}")
    for site in report["sites"]:
        errors = site.get("output_error", {})
        last = next(reversed(errors), None)
        if last is not None and site["kept"] != last:
            lines.append(
                f"{site['kind']} {site['layer']}: {last} would be worse on held-out text "
                f"({errors[last]:.4f}), kept as {site['kept']} ({errors[site['kept']]:.4f})"
            )
    return lines


def read_report(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError when the folder was not made by sqa-convert."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    report = read_json(folder / REPORT, f"{folder} holds no {REPORT}: it was not made by sqa-convert")
    if not (is_ours(report) and auto_class(report, "") and isinstance(report.get("sites"), list)):
        raise CheckpointError(f"{folder / REPORT} is no report of sqa-convert")
    return report


def uptraining_lines(report: dict[str, Any]) -> list[str]:
    """What uptraining did, in sentences; none where there was none."""
    done, quality = report.get("uptraining"), report.get("quality", {})
    if done is None:
        return []
    speed = f"{done['tokens']:,} tokens in {report['seconds']['uptrain']:g} s on {done['device']}"
    lines = [f"uptrained by {done['loss']} on {speed}, {done['tokens_per_second']:,} tokens/s"]
    if "mfu" in done:
        lines[0] += f", MFU {done['mfu']:.1%}"
    if "kept" in done:
        lines[0] += f"; kept: {done['kept']}"
    if "skipped_rows" in done:
        lines[0] += f"; {done['skipped_rows']:,} rows without text skipped"
    shares = {name: recovered(quality, name.lower()) for name in ("loss", "KL")}
    back = [f"{_share(share)} of the {name}" for name, share in shares.items() if share is not None]
    if back:
        lines.append(f"uptraining took back {' and '.join(back)} that conversion had cost")
    elif "uptrained" in quality:
        lines.append("conversion had cost next to nothing that uptraining could take back")
    if any(share is not None and share < 0 for share in shares.values()):
        lines.append("less than nothing: more tokens or a smaller learning rate are needed")
    if "control" in quality:
        loss = quality["uptrained"]["loss"]
        above = {name: nats(loss - quality[name]["loss"], "+") for name in ("source", "control")}
        tokens = done.get("kept_steps", done["steps"]) * done["sequence_length"] * done["batch_size"]
        lines.append(
            f"loss against the source's {above['source']}, against the control's {above['control']} "
            f"(control: the source trained on the same {tokens:,} tokens)"
        )
    return lines


def _share(share: float) -> str:
    """What is beyond all of the damage, or below none of it, is no share of it."""
    return "all" if share >= 1 else "none" if share <= 0 else f"{share:.1%}"


def costs(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """What the model needs, before and after: column heads and rows."""
    before, after = report["cost"]["before"], report["cost"]["after"]
    context = report["context_tokens"]

    def heads(key: str) -> list[str]:
        return [_one_or_by_site(side[key]) for side in (before, after)]

    def amount(key: str, unit: str, scale: float) -> list[str]:
        ratio = f" ({after[key] / before[key]:.2f}×)" if before[key] else ""
        return [f"{before[key] / scale:,.4g} {unit}", f"{after[key] / scale:,.4g} {unit}{ratio}"]

    rows: list[tuple[str, ...]] = [
        ("query heads", *heads("query_heads")),
        ("key/value heads", *heads("key_value_heads")),
        ("parameters", *amount("parameters", "M", 1e6)),
        ("KV cache per token", *amount("kv_cache_bytes_per_token", "kB", 1e3)),
        (f"attention at {context:,} tokens", *amount("attention_flops", "GFLOP", 1e9)),
        ("  of which the T² products", *amount("score_flops", "GFLOP", 1e9)),
    ]
    return ["", "source", "converted"], rows


def quality_table(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """How well each model of a report predicts: column heads, and a row a model; none where nothing was measured."""
    quality = report.get("quality", {})
    return quality_rows({name: quality[name] for name in ROWS if name in quality})


def quality_rows(measured: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """How well models predict: column heads, and a row a model."""
    share = "{:.1%}".format
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "loss": ("loss, nats/token", nats),
        "perplexity": ("perplexity", perplexity),
        "kl": ("KL to source", nats),
        "top1": ("top-1 as source", share),
        "exact_match": ("exact match", share),
        "rougeL": ("ROUGE-L", share),
    }
    shown = {key: how for key, how in columns.items() if any(key in found for found in measured.values())}

    def cell(value: float | None, style: Callable[[float], str]) -> str:
        return "" if value is None else style(value)

    rows = [
        (name, *(cell(found.get(key), style) for key, (_, style) in shown.items())) for name, found in measured.items()
    ]
    return ["", *(head for head, _ in shown.values())], rows


def speed_title(speed: dict[str, Any]) -> str:
    """Where, and how often, speed was measured."""
    row = speed["rows"][0]
    compiled = ", compiled" if speed["compiled"] else ""
    extended = ", ".join(speed["positions_extended"])
    repeated = f"; for timing alone {extended} repeat their positions beyond their own" if extended else ""
    return (
        f"{speed['device']} ({speed['machine']}), torch {speed['versions']['torch']}, {row['dtype']}, "
        f"{row['attention']}{compiled}, batch {row['batch']}; median (range) of {speed['repeats']} alternating rounds"
        f"{repeated}"
    )


def speed_rows(speed: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """How fast models are: column heads, and a row for each model, part, mode and length."""
    columns = ["", "tokens", "model", "ms", "tokens/s", "speed-up", "ideal", "peak MB", "cache MB"]

    def megabytes(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:,.1f}"

    rows: list[tuple[str, ...]] = []
    for row in speed["rows"]:
        took, gained = row["seconds"], row.get("speedup")
        first = row["model"] == next(iter(speed["heads"]))
        ms = "out of memory" if took is None else f"{_ms(took['median'])} ({_ms(took['low'])}–{_ms(took['high'])})"
        rows.append(
            (
                f"{row['part']}, {row['mode']}",
                f"{row['length']:,}",
                f"{row['model']} ({speed['heads'][row['model']]})",
                ms,
                "" if took is None else f"{row['tokens_per_second']:,.0f}",
                ""
                if first or gained is None
                else f"{gained['median']:.2f}× ({gained['low']:.2f}–{gained['high']:.2f})",
                "" if first or row["ideal"] is None else f"{row['ideal']:.2f}×",
                megabytes(row["peak_bytes"]),
                megabytes(row["cache_bytes"]),
            )
        )
    return columns, rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _one_or_by_site(counts: dict[str, int]) -> str:
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())
