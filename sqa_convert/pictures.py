"""Pictures of a conversion, as SVG."""

from __future__ import annotations

import io
from typing import Any

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
_MOST_SHOWN = 12  # sites in the picture of similarities, evenly chosen


def heads_picture(groups: Any, kind: str) -> str:
    """The partition as SVG: source heads above, their query heads and key/value heads below, one colour a group."""
    step, size, left = 44, 32, 96
    clusters = [(g, cluster) for g, group in enumerate(groups) for cluster in group]
    order = [(g, h) for g, cluster in clusters for h in cluster]
    width, height = left + step * len(order) + 8, 230
    at = {head: left + step * i + size / 2 for i, (_, head) in enumerate(order)}
    lines, boxes = [], []

    def box(x: float, y: float, text: str, group: int) -> None:
        colour = _COLOURS[group % len(_COLOURS)]
        boxes.append(f'<rect x="{x - size / 2:g}" y="{y:g}" width="{size}" height="{size}" rx="6" fill="{colour}"/>')
        boxes.append(f'<text x="{x:g}" y="{y + 21:g}" fill="#fff" text-anchor="middle">{text}</text>')

    def line(x1: float, y1: float, x2: float, y2: float) -> None:
        lines.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="#888" stroke-width="2"/>')

    group_queries: dict[int, list[float]] = {}
    for i, (g, cluster) in enumerate(clusters):
        x = sum(at[h] for h in cluster) / len(cluster)
        for h in cluster:
            line(at[h], 40 + size, x, 110)
            box(at[h], 40, f"{h}", g)
        box(x, 110, f"q{i}", g)
        group_queries.setdefault(g, []).append(x)
    for g, queries in group_queries.items():
        x = sum(queries) / len(queries)
        for query in queries:
            line(query, 110 + size, x, 180)
        box(x, 180, f"kv{g}", g)
    labels = [("source heads", 61), ("query heads", 131), ("key/value", 201)]
    texts = [f'<text x="4" y="{y}" fill="#777">{text}</text>' for text, y in labels]
    title = f"{len(order)} heads become {len(clusters)} query and {len(group_queries)} key/value heads ({kind})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" role="img" aria-label="{title}" '
        f'font-family="system-ui,sans-serif" font-size="13"><title>{title}</title>'
        f'<text x="4" y="20" fill="#777">{title}</text>{"".join(texts + lines + boxes)}</svg>\n'
    )


def similarity_picture(sites: list[dict[str, Any]]) -> str:
    """How alike the source's heads are, a row a site: patterns on the left, output maps on the right.

    Heads stand in the order of their groups; a frame goes around each key/value group, a thicker one around each
    cluster.
    """
    shown = [site for site in sites if "similarity" in site]
    shown = shown[:: -(-len(shown) // _MOST_SHOWN)]
    heads = sum(len(cluster) for group in shown[0]["partition"] for cluster in group)
    cell = max(6, min(18, 260 // heads))
    side, left, top, gap = cell * heads, 96, 48, 28
    names = list(shown[0]["similarity"])
    width, height = left + (side + gap) * len(names), top + (side + gap) * len(shown)
    title = "How alike the source's heads are: grouped heads are framed"
    parts = [f'<text x="4" y="18" fill="#777">{title}</text>']
    parts += [f'<text x="{left + i * (side + gap)}" y="38" fill="#777">{name}</text>' for i, name in enumerate(names)]
    for row, site in enumerate(shown):
        y = top + row * (side + gap)
        label = f"{site['kind']} {site['layer']}"
        parts.append(f'<text x="4" y="{y + side / 2:g}" fill="#777">{label}</text>')
        for i, name in enumerate(names):
            parts.append(_heat_map(site["similarity"][name], site["partition"], left + i * (side + gap), y, cell))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}" '
        f'font-family="system-ui,sans-serif" font-size="13"><title>{title}</title>{"".join(parts)}</svg>\n'
    )


def _heat_map(matrix: list[list[float]], groups: Any, x: float, y: float, cell: int) -> str:
    order = [h for group in groups for cluster in group for h in cluster]
    parts = []
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            shade = max(0.0, min(1.0, matrix[a][b]))
            colour = f"rgb({247 - 239 * shade:.0f},{251 - 203 * shade:.0f},{255 - 148 * shade:.0f})"
            parts.append(
                f'<rect x="{x + j * cell:g}" y="{y + i * cell:g}" width="{cell}" height="{cell}" fill="{colour}"/>'
            )
    start = 0
    for group in groups:
        size = sum(map(len, group))
        parts.append(_frame(x, y, start, size, cell, 1))
        for cluster in group:
            parts.append(_frame(x, y, start, len(cluster), cell, 2.5))
            start += len(cluster)
    return "".join(parts)


def _frame(x: float, y: float, start: int, size: int, cell: int, stroke: float) -> str:
    at, side = start * cell, size * cell
    return (
        f'<rect x="{x + at:g}" y="{y + at:g}" width="{side}" height="{side}" fill="none" '
        f'stroke="#dd8452" stroke-width="{stroke}"/>'
    )


def recovery_picture(report: dict[str, Any], kind: str) -> bytes:
    """Held-out loss and KL against tokens of uptraining, with source and control, as "svg" or "png"."""
    from matplotlib.figure import Figure

    curve, quality = report["uptraining"]["curve"], report.get("quality", {})
    keys = {"loss": "held-out loss, nats/token", "kl": "held-out KL to the source, nats/token"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (key, label) in zip(panels, keys.items(), strict=True):
        points = [(point["tokens"], point[key]) for point in curve if key in point]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_COLOURS[0], label="uptrained")
        lines = {"source": ("--", "#555555"), "control": (":", _COLOURS[3])}
        for name, (style, colour) in lines.items():
            value = quality.get(name, {}).get(key)
            if value:
                panel.axhline(value, linestyle=style, color=colour, label=f"{name} {value:.4f}")
        panel.set(xlabel="tokens", ylabel=label)
        if key == "kl":
            panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{report['source']['name']}: what uptraining took back")
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
