"""report.html: the report of a conversion as one page that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

from base64 import b64encode
from statistics import mean
from typing import Any

from .formatting import nats
from .layers_picture import differ, layers_picture
from .pictures import errors_picture, heads_picture, quality_picture, recovery_picture, similarity_colour, speed_picture
from .sentences import presented
from .speed_table import speed_rows
from .tables import ROWS, costs, quality_table
from .templates import filled
from .verdict import last_quality

PAGE = "report.html"

_MODELS = ("given", *ROWS)


def report_page(report: dict[str, Any], similarity: bytes | None = None) -> str:
    """The page of a report, HTML.

    Args:
        similarity: the picture of how alike the heads are, SVG.
    """
    from markupsafe import Markup

    def picture(content: bytes | str) -> Markup:
        return Markup(content.decode() if isinstance(content, bytes) else content)

    quality, sites = report.get("quality", {}), report["sites"]
    alike = [_alike(site) for site in sites]
    rows = quality_table(report)
    pictures: dict[str, Any] = {}
    if sum(quality.get(name, {}).get("kl") is not None for name in ROWS):
        pictures["quality"] = picture(quality_picture(quality, ROWS, "page"))
    if report.get("uptraining", {}).get("curve"):
        pictures["recovery"] = picture(recovery_picture(report, "page"))
    if any(site.get("output_error") for site in sites):
        pictures["errors"] = picture(errors_picture(sites, "page"))
    if differ(sites):
        pictures["layers"] = picture(layers_picture([site for site in sites if "partition" in site], "page"))
    if report.get("speed"):
        pictures["speed"] = picture(speed_picture(report["speed"], "page"))
    return filled(
        PAGE,
        **presented(report),
        tiles=_tiles(report),
        cost=costs(report),
        quality=rows if rows[1] else None,
        samples=[{name: text[name] for name in _MODELS if name in text} for text in report.get("samples", [])],
        heads=[
            picture(heads_picture(site["partition"], f"{site['kind']} {site['layer']}", likeness))
            for site, likeness in zip(sites, alike, strict=True)
            if "partition" in site
        ],
        scale=[similarity_colour(i / 10) for i in range(11)] if any(map(bool, alike)) else [],
        pictures=pictures,
        similarity=None if similarity is None else b64encode(similarity).decode(),
        speed=speed_rows(report["speed"]) if report.get("speed") else None,
    )


def _tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers to see first: (figure, what it is)."""
    before, after, quality = report["cost"]["before"], report["cost"]["after"], report.get("quality", {})
    tiles = [
        (f"{after[key] / before[key]:.2f}×", name)
        for key, name in (
            ("score_flops", "T² attention arithmetic"),
            ("kv_cache_bytes_per_token", "KV cache"),
            ("parameters", "parameters"),
        )
        if before[key]
    ]
    last = last_quality(report)
    if last is not None and "error" in last:
        tiles += [
            (f"{last['error']:.2%}", "error of the hidden state"),
            (f"{last['cosine']:.4f}", "cosine of mean vectors"),
        ]
    elif last is not None:
        tiles += [
            (nats(last["loss"] - quality["source"]["loss"], "+", 3), "nats/token of loss"),
            (f"{last['top1']:.1%}", "most likely token as the source's"),
        ]
    return tiles


def _alike(site: dict[str, Any]) -> dict[int, float] | None:
    """How alike each head is to those it shares a key and value with; None where that is not known."""
    if "similarity" not in site:
        return None
    matrices = list(site["similarity"].values())
    result = {}
    for group in site["partition"]:
        members = [head for cluster in group for head in cluster]
        for head in members:
            others = [matrix[head][other] for matrix in matrices for other in members if other != head]
            if others:
                result[head] = mean(others)
    return result
