"""What a conversion did and cost: report.json, the picture of the heads, the model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import read_json
from .errors import CheckpointError
from .heads import METHODS
from .output import REPORT, write_json
from .pictures import heads_picture, recovery_picture, similarity_picture, speed_picture
from .plan import Cost, Plan
from .sources import Source

if TYPE_CHECKING:
    from .execution import SiteRecord
    from .families import Site

SCHEMA = 1
CARD = "README.md"
PICTURE = "heads.svg"
SIMILARITY = "similarity.svg"
RECOVERY = "recovery"
SPEED = "speed"
ROWS = ("source", "converted", "uptrained", "control")
_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "datasets")
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTextEncoding": "feature-extraction",
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


def auto_class(report: dict[str, Any]) -> str:
    """The Auto class of transformers that loads the result."""
    return next(auto for ending, auto in _AUTO_CLASSES.items() if report["architecture"].endswith(ending))


def recovered(quality: dict[str, Any], key: str) -> float | None:
    """Share of the damage in "loss" or "kl" that uptraining took back: 1 is all of it."""
    if "uptrained" not in quality:
        return None
    start = quality["source"][key] or 0.0  # the source has no KL to itself
    damage = quality["converted"][key] - start
    return None if damage <= 0 else (quality["converted"][key] - quality["uptrained"][key]) / damage


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """What calibration did, in sentences; none where there was none."""
    done = report.get("calibration")
    if done is None:
        blind = report["method"] in METHODS and METHODS[report["method"]].needs_statistics
        return ["converted from the weights alone, fitted to no text"] if blind else []
    lines = [f"fitted on {done['tokens']:,} tokens, chosen on {done['held_out_tokens']:,} more: {done['text']}"]
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
    if "warning" in done:
        lines.append(f"warning: {done['warning']}")
    return lines


def most_merged(report: dict[str, Any]) -> dict[str, Any]:
    """The first site whose heads were merged, for a picture."""
    sites = report["sites"]
    return next((site for site in sites if any(len(c) > 1 for g in site["partition"] for c in g)), sites[0])


def read_report(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError when the folder was not made by sqa-convert."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    return read_json(folder / REPORT, f"{folder} holds no {REPORT}: it was not made by sqa-convert")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json, and the pictures and the model card made from it."""
    write_json(folder / REPORT, report)
    site = most_merged(report)
    (folder / PICTURE).write_text(heads_picture(site["partition"], f"{site['kind']} {site['layer']}"), encoding="utf-8")
    (folder / SIMILARITY).unlink(missing_ok=True)
    if any("similarity" in site for site in report["sites"]):
        (folder / SIMILARITY).write_bytes(similarity_picture(report["sites"]))
    for kind in ("svg", "png"):
        (folder / f"{RECOVERY}.{kind}").unlink(missing_ok=True)
        if report.get("uptraining", {}).get("curve"):
            (folder / f"{RECOVERY}.{kind}").write_bytes(recovery_picture(report, kind))
    if report.get("speed"):
        write_speed_pictures(folder, report["speed"])
    (folder / CARD).write_text(model_card(report), encoding="utf-8")


def write_speed_pictures(folder: Path, speed: dict[str, Any]) -> None:
    for kind in ("svg", "png"):
        (folder / f"{SPEED}.{kind}").write_bytes(speed_picture(speed, kind))


def model_card(report: dict[str, Any]) -> str:
    """README.md of the result."""
    from huggingface_hub import ModelCardData

    source, quality = report["source"]["name"], report.get("quality")
    auto, folder = auto_class(report), Path(report["output"] or source).name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(auto),
        base_model=source if report["source"]["revision"] else None,  # only models on the hub have one
        base_model_relation="finetune",
        tags=["sqa", "sparse-query-attention"],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {Path(report['output'] or source).name}", ""]
    lines += [
        (
            f"`{source}` with Sparse Query Attention ([arXiv 2510.01817](https://arxiv.org/abs/2510.01817)), "
            f"converted by sqa-convert {report['sqa_convert']}, method `{report['method']}`."
        ),
        "",
        f"![heads]({PICTURE})",
        "",
        *([f"![how alike the heads are]({SIMILARITY})", ""] if any("similarity" in s for s in report["sites"]) else []),
        *_markdown_table(*costs(report)),
        "",
    ]
    lines += [*(f"- {line}" for line in calibration_lines(report)), ""]
    if quality and quality_table(report)[1]:
        lines += [*_markdown_table(*quality_table(report)), ""]
        if report.get("uptraining", {}).get("curve"):
            lines += [f"![loss and KL while it was uptrained]({RECOVERY}.svg)", ""]
        lines += [*(f"- {line}" for line in uptraining_lines(report)), ""]
        lines += [
            f"Measured on {quality['tokens']:,} tokens of {quality['data']}. Loss above the source's is what it cost.",
            "",
        ]
    if report.get("speed"):
        lines += [*_markdown_table(*speed_rows(report["speed"])), "", f"![time against length]({SPEED}.svg)", ""]
        lines += [f"{speed_title(report['speed'])}.", ""]
    lines += [
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{folder}", trust_remote_code=True)  # or `import sqa_convert.models` first',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)',
        "```",
        "",
    ]
    return "\n".join(lines)


def _markdown_table(columns: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


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
    shares = {name: recovered(quality, name.lower()) for name in ("loss", "KL")}
    back = [f"{share:.1%} of the {name}" for name, share in shares.items() if share is not None]
    if back:
        lines.append(f"uptraining took back {' and '.join(back)} that conversion had cost")
    if any(share is not None and share < 0 for share in shares.values()):
        lines.append("less than nothing: more tokens or a smaller learning rate are needed")
    if "control" in quality:
        above = {name: quality["uptrained"]["loss"] - quality[name]["loss"] for name in ("source", "control")}
        lines.append(
            f"loss against the source's {above['source']:+.4f}, against the control's {above['control']:+.4f} "
            "(control: the source trained on the same tokens)"
        )
    return lines


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
    columns = {
        "loss": ("loss, nats/token", ".4f"),
        "perplexity": ("perplexity", ",.2f"),
        "kl": ("KL to source", ".4f"),
        "top1": ("top-1 as source", ".1%"),
        "exact_match": ("exact match", ".1%"),
        "rougeL": ("ROUGE-L", ".1%"),
    }
    shown = {key: how for key, how in columns.items() if any(key in found for found in measured.values())}

    def cell(value: float | None, style: str) -> str:
        return "" if value is None else format(value, style)

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
