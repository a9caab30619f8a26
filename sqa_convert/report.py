"""What a conversion did and cost: report.json, the picture of the heads, the model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import Source, read_json
from .heads import METHODS
from .output import REPORT, write_json
from .pictures import heads_picture, similarity_picture
from .plan import Cost, Plan

if TYPE_CHECKING:
    from .execution import SiteRecord
    from .families import Site

SCHEMA = 1
CARD = "README.md"
PICTURE = "heads.svg"
SIMILARITY = "similarity.svg"
ROWS = ("source", "converted", "uptrained")
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
    return read_json(folder / REPORT, f"{folder} holds no {REPORT}: it was not made by sqa-convert")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json, and the picture and the model card made from it."""
    write_json(folder / REPORT, report)
    site = most_merged(report)
    (folder / PICTURE).write_text(heads_picture(site["partition"], f"{site['kind']} {site['layer']}"), encoding="utf-8")
    (folder / SIMILARITY).unlink(missing_ok=True)
    if any("similarity" in site for site in report["sites"]):
        (folder / SIMILARITY).write_text(similarity_picture(report["sites"]), encoding="utf-8")
    (folder / CARD).write_text(model_card(report), encoding="utf-8")


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
        *_markdown_table(*summary(report)),
        "",
    ]
    lines += [*(f"- {line}" for line in calibration_lines(report)), ""]
    if quality:
        lines += [
            f"Measured on {quality['tokens']:,} tokens of {quality['data']}. Loss above the source's is what it cost.",
            "",
        ]
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


def summary(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The one table of a report: a column a model, a row a quantity. Returns column heads and rows."""
    quality = report.get("quality", {})
    names = [name for name in ROWS if name in quality] or list(ROWS[:2])
    before, after = report["cost"]["before"], report["cost"]["after"]
    sides = [before, *[after] * (len(names) - 1)]
    context = report["context_tokens"]

    def heads(key: str) -> list[str]:
        return [_one_or_by_site(side[key]) for side in sides]

    def amount(key: str, unit: str, scale: float) -> list[str]:
        cells = [f"{before[key] / scale:,.4g} {unit}"]
        ratio = f" ({after[key] / before[key]:.2f}×)" if before[key] else ""
        return cells + [f"{side[key] / scale:,.4g} {unit}{ratio}" for side in sides[1:]]

    def measured(key: str, style: str) -> list[str]:
        return ["" if quality[name][key] is None else format(quality[name][key], style) for name in names]

    rows: list[tuple[str, ...]] = [
        ("query heads", *heads("query_heads")),
        ("key/value heads", *heads("key_value_heads")),
        ("parameters", *amount("parameters", "M", 1e6)),
        ("KV cache per token", *amount("kv_cache_bytes_per_token", "kB", 1e3)),
        (f"attention at {context:,} tokens", *amount("attention_flops", "GFLOP", 1e9)),
        ("  of which the T² products", *amount("score_flops", "GFLOP", 1e9)),
    ]
    if quality:
        rows += [
            ("loss, nats/token", *measured("loss", ".4f")),
            ("perplexity", *measured("perplexity", ",.2f")),
            ("KL to source, nats/token", *measured("kl", ".4f")),
            ("top-1 agreement", *measured("top1", ".1%")),
        ]
    return ["", *names], rows


def _one_or_by_site(counts: dict[str, int]) -> str:
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())
