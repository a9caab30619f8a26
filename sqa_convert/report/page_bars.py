"""Bars of the page: figures as shares of a width, on one scale for all that stand together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .formatting import MOST_NATS, nats
from .speed_table import speed_labels

_ROOM = 2.0  # below the least figure on a logarithmic scale, so that it has a bar


@dataclass(frozen=True)
class Bar:
    """One figure."""

    name: str
    """what it is of"""
    shown: str
    share: float
    """of the width, in percent"""
    kind: str = ""
    """the name of the model, which has its colour everywhere"""
    mark: float | None = None
    """where the figure would be by counting, in percent"""
    note: str = ""
    parts: tuple[Bar, ...] = ()
    """on the same scale, thinner, below it"""


@dataclass(frozen=True)
class Bars:
    """Figures on one scale."""

    title: str
    bars: list[Bar]
    scale: str
    """the scale in words"""
    one: float | None = None
    """where the ratio 1 lies, in percent"""


def logarithmic(title: str, figures: Sequence[tuple[str, float, str, str]]) -> Bars:
    """Args: figures: (name, value, as it is shown, kind); of values that are not above zero there is no bar."""
    values = [min(value, MOST_NATS) for _, value, _, _ in figures if value > 0]
    low, high = (min(values) / _ROOM, max(values)) if values else (1.0, 1.0)

    def share(value: float) -> float:
        if value <= 0 or high <= low:
            return 0.0
        return round(100 * math.log(min(value, MOST_NATS) / low) / math.log(high / low), 1)

    bars = [Bar(name, shown, share(value), kind) for name, value, shown, kind in figures]
    return Bars(title, bars, f"logarithmic, {low:.2g} to {high:.2g}" if values else "all are zero")


def quality_bars(quality: Mapping[str, Any], rows: Iterable[str]) -> list[Bars]:
    """KL to the source, and loss above the source's, of each of `rows` that was measured."""
    known = [name for name in rows if quality.get(name, {}).get("kl") is not None]
    if not known:
        return []
    above = {name: quality[name]["loss"] - quality["source"]["loss"] for name in known}
    away = {name: quality[name]["kl"] for name in known}
    return [
        logarithmic("KL to the source, nats a token", [(n, away[n], nats(away[n]), n) for n in known]),
        logarithmic("Loss above the source's, nats a token", [(n, above[n], nats(above[n], "+"), n) for n in known]),
    ]


def kept_error(site: Mapping[str, Any]) -> float | None:
    """The error of a site's output as it was kept; None where that was not measured."""
    errors = site.get("output_error")
    return errors.get(site.get("kept"), next(reversed(errors.values()))) if errors else None


def error_bars(sites: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """The error of each site's output as it was kept, as a share of its variance, with those of its halves where they
    were measured; one scale a kind of attention."""
    result = []
    for kind in dict.fromkeys(site["kind"] for site in sites):
        figures = []
        for site in (site for site in sites if site["kind"] == kind and site.get("output_error")):
            value = kept_error(site) or 0.0
            figures.append((f"{kind} {site['layer']}", value, f"{value:.4f}", "converted"))
            figures += [(half, e, f"{half} {e:.4f}", half) for half, e in site.get("half_errors", {}).items()]
        if figures:
            chart = logarithmic(f"Error of each {kind} attention", figures)
            result.append(replace(chart, bars=_with_parts(chart.bars)))
    return result


def _with_parts(bars: Sequence[Bar]) -> list[Bar]:
    """Halves put below the attention that they follow."""
    result: list[Bar] = []
    for bar in bars:
        if bar.kind == "converted":
            result.append(bar)
        else:
            result[-1] = replace(result[-1], parts=(*result[-1].parts, bar))
    return result


def position_bars(row: Mapping[str, Any] | None) -> list[Bars]:
    """KL by how far into its document a token stands; none where that was not measured."""
    found = (row or {}).get("kl_by_position") or []
    figures = [(f"{part['from']:,}–{part['to']:,}", part["mean"], nats(part["mean"]), "converted") for part in found]
    return [logarithmic("KL by position in the document", figures)] if len(figures) > 1 else []


def speed_bars(speed: Mapping[str, Any]) -> list[Bars]:
    """How many times as fast as the first model each other one is, with what counting promises as a mark."""
    result = []
    labelled = [row for row in speed_labels(speed) if row["measured"] is not None]
    most = max([max(row["measured"], row["ideal"] or 0) for row in labelled], default=1.0)
    most = max(most, 1.0) * 1.05
    for what in dict.fromkeys(row["what"] for row in labelled):
        bars = [
            Bar(
                row["name"],
                row["shown"],
                round(100 * row["measured"] / most, 1),
                "converted" if row["measured"] >= 1 else "slower",
                None if row["ideal"] is None else round(100 * row["ideal"] / most, 1),
                "" if row["ideal"] is None else f"by count {row['ideal']:.2f}×",
            )
            for row in labelled
            if row["what"] == what
        ]
        result.append(Bars(what, bars, "times as fast as the source", round(100 / most, 1)))
    return result
