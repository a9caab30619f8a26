"""The heads of every layer as a picture: where they went, where layers keep different numbers of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import pictures

_QUERY, _KEY_VALUE, _MOST_NAMED = "#8fb0d8", "#35618f", 24


def differ(sites: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the layers of some kind of attention keep different numbers of heads."""
    kept: dict[str, set[tuple[int, int]]] = {}
    for site in sites:
        if "partition" in site:
            kept.setdefault(site["kind"], set()).add(_counts(site))
    return any(len(counts) > 1 for counts in kept.values())


def _counts(site: Mapping[str, Any]) -> tuple[int, int]:
    return sum(map(len, site["partition"])), len(site["partition"])


def layers_picture(sites: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """Bars of query and key/value heads, a panel for each kind of attention, as "svg", "png" or for a "page".

    Args:
        sites: of a report, with partitions.
        kind: of picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(site["kind"] for site in sites))
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    most = max(sum(len(cluster) for group in site["partition"] for cluster in group) for site in sites)
    for panel, name in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        layers = {site["layer"]: _counts(site) for site in sites if site["kind"] == name}
        query = panel.bar(list(layers), [q for q, _ in layers.values()], color=_QUERY, label="query heads")
        panel.bar(list(layers), [kv for _, kv in layers.values()], 0.4, color=_KEY_VALUE, label="key/value heads")
        if len(layers) <= _MOST_NAMED // len(kinds):
            panel.bar_label(query, [f"{q}/{kv}" for q, kv in layers.values()], fontsize=7)
        panel.set(title=name, xlabel="layer", ylim=(0, most * 1.1))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend(fontsize=8, framealpha=0)
    return pictures.rendered(figure, kind)
