"""report.html: the report of a conversion as one page that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

from base64 import b64encode
from statistics import mean
from typing import Any

from .formatting import perplexity
from .layers_picture import differ, layers_picture
from .page_bars import error_bars, position_bars, quality_bars, speed_bars
from .pictures import heads_picture, similarity_colour, training_pictures
from .sentences import halves_sentence, presented
from .speed_table import speed_details, speed_rows
from .tables import ROWS, costs, quality_table
from .templates import filled
from .verdict import last_quality, longest_prefill, plus_minus

PAGE = "report.html"

_HEAT = (1.0, 3.0, 10.0)
"""times the mean KL at which a token has the next colour"""

_MODELS = ("given", *ROWS)


def report_page(report: dict[str, Any], similarity: bytes | None = None) -> str:
    """The page of a report, HTML.

    Args:
        similarity: the picture of how alike the heads are, SVG.
    """
    from markupsafe import Markup

    quality, sites, speed = report.get("quality", {}), report["sites"], report.get("speed")
    alike = [_alike(site) for site in sites]
    known = [value for likeness in alike if likeness for value in likeness.values()]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    rows = quality_table(report)
    curves = training_pictures(report) if report.get("uptraining", {}).get("curve") else []
    parted = [site for site in sites if "partition" in site]
    return filled(
        PAGE,
        **presented(report),
        tiles=_tiles(report),
        cost=costs(report),
        quality=rows if rows[1] else None,
        quality_bars=quality_bars(quality, ROWS),
        errors=[*error_bars(sites), *position_bars(last_quality(report))],
        halves=halves_sentence(sites),
        polished=report.get("calibration", {}).get("polish", {}).get("kept", False),
        passages=_passages(last_quality(report)),
        samples=[{name: text[name] for name in _MODELS if name in text} for text in report.get("samples", [])],
        heads=[
            Markup(heads_picture(site["partition"], f"{site['kind']} {site['layer']}", likeness, (low, high)))
            for site, likeness in zip(sites, alike, strict=True)
            if "partition" in site
        ],
        scale=[similarity_colour(i / 10) for i in range(11)] if known else [],
        ends=(f"{low:.2f}", f"{high:.2f}"),
        layers=Markup(layers_picture(parted, "page").decode()) if differ(sites) else "",
        curves=[Markup(picture.decode()) for picture in curves],
        similarity=None if similarity is None else b64encode(similarity).decode(),
        speed=speed_bars(speed) if speed else None,
        speed_tables=[("", speed_rows(speed)), *speed_details(speed)] if speed else [],
    )


def _tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers to see first: (figure, what it is)."""
    before, after, quality = report["cost"]["before"], report["cost"]["after"], report.get("quality", {})
    last, tiles = last_quality(report), []
    if last is not None and last.get("error") is not None:
        tiles += [
            (f"{last['error']:.2%}", "error of the hidden state"),
            (f"{last['cosine']:.4f}", "cosine of mean vectors"),
        ]
    if last is not None and last.get("kl") is not None:
        source = quality["source"]
        tiles += [
            (plus_minus(last["loss"] - source["loss"], last.get("loss_error"), "+"), "loss above the source's, nats"),
            (f"{perplexity(source['perplexity'])} → {perplexity(last['perplexity'])}", "perplexity"),
            (plus_minus(last["kl"], last.get("kl_error")), "KL to the source, nats"),
        ]
        if last.get("top1") is not None:
            tiles.append((f"{last['top1']:.1%}", "most likely token as the source's"))
    counted = (("kv_cache_bytes_per_token", "cache"), ("score_flops", "T² arithmetic"), ("parameters", "parameters"))
    tiles += [(f"{after[key] / before[key]:.2f}×", f"the {name}, by count") for key, name in counted if before[key]]
    return [*tiles, (longest_prefill(report) or "not measured", "times as fast here, prefill")]


def _passages(row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The worst passages, each token with how far above the mean its KL is: 0 to 3."""
    mean = max((row or {}).get("kl") or 0.0, 1e-9)
    return [
        passage | {"tokens": [(text, kl, sum(kl >= times * mean for times in _HEAT)) for text, kl in passage["tokens"]]}
        for passage in (row or {}).get("worst_passages") or []
    ]


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
