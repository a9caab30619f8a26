"""A report in tables: cost and quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from .formatting import nats, perplexity, within_reason

ROWS = ("source", "converted", "before", "uptrained", "control", "mean")
"""models a report may hold measurements of; "before" is what a second uptraining began with, "mean" the source with its
heads averaged, for comparison"""


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


def heads_by_layer(report: dict[str, Any]) -> dict[str, list[str]]:
    """ "Hq/Hkv" of each layer of the result, by kind of attention; empty where the layers of each kind are alike."""
    cost = report["cost"]["after"]
    result = {}
    for kind, queries in cost["query_heads"].items():
        pair = queries, cost["key_value_heads"][kind]
        layers = max(len(count) if isinstance(count, list) else 1 for count in pair)
        if layers > 1:
            both = (count if isinstance(count, list) else [count] * layers for count in pair)
            result[kind] = [f"{q}/{kv}" for q, kv in zip(*both, strict=True)]
    return result


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
        "error": ("error of the hidden state", "{:.2%}".format),
        "cosine": ("cosine of mean vectors", "{:.4f}".format),
        "exact_match": ("exact match", share),
        "rougeL": ("ROUGE-L", share),
    }
    shown = {key: how for key, how in columns.items() if any(key in quality for quality in measured.values())}

    def cell(quality: Mapping[str, float | None], key: str, style: Callable[[float], str]) -> str:
        value, error = quality.get(key), quality.get(f"{key}_error") if key == "kl" else None
        if value is None:
            return ""
        return style(value) if error is None or not within_reason(key, value) else f"{style(value)} ± {error:.4f}"

    rows = [
        (name, *(cell(quality, key, style) for key, (_, style) in shown.items())) for name, quality in measured.items()
    ]
    return ["", *(head for head, _ in shown.values())], rows


def _one_or_by_site(counts: Mapping[str, int | list[int]]) -> str:
    if all(count == next(iter(counts.values())) and not isinstance(count, list) for count in counts.values()):
        return str(next(iter(counts.values())))
    shown = {kind: _span(count) if isinstance(count, list) else str(count) for kind, count in counts.items()}
    return ", ".join(f"{kind} {text}" for kind, text in shown.items()) if len(shown) > 1 else next(iter(shown.values()))


def _span(by_layer: list[int]) -> str:
    return f"{min(by_layer)} to {max(by_layer)} by layer, mean {fmean(by_layer):.3g}"
