"""Pictures of a conversion, as "svg", "png", or "page": an SVG that stands inside a page and takes its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any

from .formatting import MOST_NATS, nats
from .templates import filled

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")

_GREY = "#888888"  # to be seen on white and on black

_MODELS = {"source": _GREY, "converted": _COLOURS[0], "uptrained": "#3a8a4d", "control": _COLOURS[3], "mean": "#b07aa1"}
"""of each model, the same everywhere"""

_NAME_HEIGHT = 0.075  # of a line of text, as a share of a panel's height

_SCALE = "viridis"

_BOX = 32  # a head's side in the picture of the heads

_MOST_SHOWN = 12  # sites in the picture of similarities, evenly chosen


def heads_picture(
    groups: Sequence[Sequence[Sequence[int]]],
    kind: str,
    alike: Mapping[int, float] | None = None,
    ends: tuple[float, float] = (0.0, 1.0),
) -> str:
    """The partition as SVG: source heads above, their query heads and key/value heads below, one colour a group.

    Args:
        groups: of source heads, a list of clusters each.
        kind: what the picture is of.
        alike: instead of the group's colour, source heads get one for how alike the heads merged with them are, 0 to 1;
            those that are not in it grey.
        ends: the likeness of the first and the last colour.
    """
    step, left, rows = 44, 96, {"source heads": 40, "query heads": 110, "key/value": 180}
    source_y, query_y, kv_y = rows.values()
    heads = [head for group in groups for cluster in group for head in cluster]
    center = {head: left + step * i + _BOX / 2 for i, head in enumerate(heads)}
    lines, boxes, number = [], [], count()
    for g, group in enumerate(groups):
        queries = [fmean(center[head] for head in cluster) for cluster in group]
        for x, cluster in zip(queries, group, strict=True):
            lines += [f"M{center[head]:g} {source_y + _BOX}L{x:g} {query_y}" for head in cluster]
            boxes += [_source_box(head, center[head], source_y, _colour(g), alike, ends) for head in cluster]
            boxes.append(_Box(x, query_y, f"q{next(number)}", _colour(g)))
        lines += [f"M{x:g} {query_y + _BOX}L{fmean(queries):g} {kv_y}" for x in queries]
        boxes.append(_Box(fmean(queries), kv_y, f"kv{g}", _colour(g)))
    title = f"{len(heads)} heads become {next(number)} query and {len(groups)} key/value heads ({kind})"
    return filled(
        "heads.svg", title=title, width=left + step * len(heads) + 8, size=_BOX, rows=rows, lines=lines, boxes=boxes
    )


@dataclass(frozen=True)
class _Box:
    """A head in a picture."""

    x: float
    """of its middle"""
    y: int
    """of its upper edge"""
    text: str
    colour: str
    tip: str = ""

    @property
    def ink(self) -> str:
        return "#000" if sum(int(self.colour[i : i + 2], 16) for i in (1, 3, 5)) > 384 else "#fff"


def _source_box(
    head: int, x: float, y: int, colour: str, alike: Mapping[int, float] | None, ends: tuple[float, float]
) -> _Box:
    if alike is None:
        return _Box(x, y, str(head), colour)
    if head in alike:
        share = (alike[head] - ends[0]) / max(ends[1] - ends[0], 1e-9)
        return _Box(x, y, str(head), similarity_colour(share), f"head {head}: alike {alike[head]:.2f}")
    return _Box(x, y, str(head), _GREY, f"head {head}: shares with none")


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def similarity_colour(value: float) -> str:
    """The colour of a similarity from 0 to 1."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[_SCALE](value))


def similarity_picture(sites: list[dict[str, Any]], kind: str = "svg") -> bytes:
    """How alike the source's heads are: a row a site, patterns on the left, output maps on the right.

    Heads stand in the order of their groups; a thin frame goes around each key/value group, a thick one around each
    cluster.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shown = [site for site in sites if "similarity" in site]
    shown = shown[:: -(-len(shown) // _MOST_SHOWN)]
    names = list(shown[0]["similarity"])
    side = 2.6
    figure = Figure(figsize=(side * len(names) + 1.2, side * len(shown) + 0.8), layout="constrained")
    panels = figure.subplots(len(shown), len(names), squeeze=False)
    for row, site in zip(panels, shown, strict=True):
        order = [h for group in site["partition"] for cluster in group for h in cluster]
        for panel, name in zip(row, names, strict=True):
            matrix = site["similarity"][name]
            image = panel.imshow([[matrix[a][b] for b in order] for a in order], vmin=0, vmax=1, cmap="Blues")
            panel.set_title(f"{site['kind']} {site['layer']}: {name}", fontsize=9)
            panel.set_xticks(range(len(order)), order, fontsize=6)
            panel.set_yticks(range(len(order)), order, fontsize=6)
            start = 0.0
            for group in site["partition"]:
                sizes = [len(cluster) for cluster in group]
                frames = [(start, sum(sizes), 0.8)]
                frames += [(start + sum(sizes[:i]), size, 2.0) for i, size in enumerate(sizes)]
                for at, size, width in frames:
                    panel.add_patch(
                        Rectangle((at - 0.5, at - 0.5), size, size, fill=False, edgecolor=_COLOURS[1], linewidth=width)
                    )
                start += sum(sizes)
    figure.colorbar(image, ax=panels, shrink=0.4, label="alike: 0 not at all, 1 the same")
    figure.suptitle(
        "The source's heads; those merged are framed (thick: one query head, thin: one key and value)", fontsize=9
    )
    return rendered(figure, kind)


_CURVES = {
    "loss": "held-out loss, nats/token",
    "kl": "held-out KL to the source, nats/token",
    "error": "held-out error of the hidden state",
    "cosine": "held-out cosine of mean vectors",
}


def recovery_picture(report: dict[str, Any], kind: str) -> bytes:
    """What was measured against tokens of uptraining, with source and control, as "svg" or "png"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for panel, key in zip(figure.subplots(1, 2), _measured(report), strict=True):
        _curve(panel, report, key)
    figure.suptitle(f"{_plain(report['source']['name'])}: what uptraining took back")
    return rendered(figure, kind)


def training_pictures(report: dict[str, Any]) -> list[bytes]:
    """The same for a page, a picture each."""
    from matplotlib.figure import Figure

    pictures = []
    for key in _measured(report):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        _curve(figure.subplots(), report, key)
        pictures.append(rendered(figure, "page"))
    return pictures


def _measured(report: dict[str, Any]) -> tuple[str, str]:
    """The two measures of a run."""
    of_hidden_states = any("error" in point for point in report["uptraining"]["curve"])
    return ("error", "cosine") if of_hidden_states else ("loss", "kl")


def _curve(panel: Any, report: dict[str, Any], key: str) -> None:
    """One measure as it went: the model as a curve, source, start and control as lines with their names at the end."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    curve, quality, label = report["uptraining"]["curve"], report.get("quality", {}), _CURVES[key]
    points = [(point["tokens"], min(point[key], MOST_NATS)) for point in curve if key in point]
    if any(point.get(key, 0) > MOST_NATS for point in curve):
        label += f" (beyond {MOST_NATS:g} not shown)"
    panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_MODELS["uptrained"])
    names = {"uptrained": points[-1][1]} if points else {}
    for name, style in (("source", "--"), ("converted", "-."), ("control", ":")):
        value = quality.get(name, {}).get(key)
        if value:
            names[name] = min(value, MOST_NATS)
            panel.axhline(names[name], linestyle=style, color=_MODELS[name], linewidth=1)
    panel.set(xlabel="tokens", ylabel=label)
    if key in ("kl", "error"):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}" if _within_a_decade(names) else "")
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.tick_params(labelsize=8, which="both")
    panel.grid(alpha=0.3)
    _name_at_the_end(panel, names)


def _within_a_decade(values: Mapping[str, float]) -> bool:
    positive = [value for value in values.values() if value > 0]
    return bool(positive) and max(positive) < 10 * min(positive)


def _name_at_the_end(panel: Any, values: Mapping[str, float]) -> None:
    """Names beside the right edge, at the height of what they name, but never on each other."""
    low, high = panel.get_ylim()
    scale = panel.yaxis.get_transform().transform
    bottom, top = scale([low, high])
    heights = {name: float((scale([value])[0] - bottom) / (top - bottom)) for name, value in values.items()}
    free = -1.0
    for name in sorted(heights, key=heights.__getitem__):
        free = max(heights[name], free + _NAME_HEIGHT)
        text = f"{name} {nats(values[name])}"
        panel.text(1.02, free, text, transform=panel.transAxes, va="center", fontsize=8, color=_MODELS[name])


def speed_picture(speed: dict[str, Any], kind: str) -> bytes:
    """How many times as fast models are as the first, a panel for each part and mode, with the ratio of counting."""
    from matplotlib.figure import Figure

    first, *others = speed["heads"]
    rows = [row for row in speed["rows"] if row.get("speedup") and row["model"] in others]
    cells = list(dict.fromkeys((row["part"], row["mode"]) for row in rows)) or [("", "")]
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    lengths = sorted({row["length"] for row in rows})
    figure = Figure(
        figsize=(3.6 * columns, 1 + lines * (1.0 + 0.28 * len(lengths) * max(1, len(others)))), layout="constrained"
    )
    for panel, (part, mode) in zip(figure.subplots(lines, columns, squeeze=False).flat, cells, strict=False):
        shown = [row for row in rows if (row["part"], row["mode"]) == (part, mode)]
        names = [_size(row["length"]) + (f" {_plain(row['model'])}" if len(others) > 1 else "") for row in shown]
        heights = [len(shown) - i for i in range(len(shown))]
        bars = panel.barh(heights, [row["speedup"]["median"] for row in shown], height=0.6, color=_MODELS["converted"])
        panel.bar_label(bars, [f"{row['speedup']['median']:.2f}×" for row in shown], padding=3, fontsize=8)
        for at, row in zip(heights, shown, strict=True):
            if row["ideal"] is not None:
                panel.plot([row["ideal"]] * 2, [at - 0.4, at + 0.4], color=_COLOURS[1], linewidth=2)
        panel.axvline(1, color=_GREY, linewidth=1)
        panel.set_yticks(heights, names, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.set_title(f"{part}: {mode}", fontsize=10)
        panel.set_xlim(0, 1.25 * max([max(row["speedup"]["median"], row["ideal"] or 0) for row in shown] + [1]))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(figure.axes)[len(cells) :]:
        panel.set_visible(False)
    title = f"times as fast as {_plain(first)} ({speed['heads'][first]}); orange: by count. {speed['device']}"
    figure.suptitle(title, fontsize=9)
    return rendered(figure, kind)


def _size(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _plain(name: str) -> str:
    """A name in which dollars are no mathematics."""
    return name.replace("$", r"\$")


def rendered(figure: Any, kind: str) -> bytes:
    """The figure as a file. In a page, words are words, black is the page's colour of text, and nothing lies below."""
    from matplotlib import rc_context

    content, page = io.BytesIO(), kind == "page"
    settings: dict[Any, Any] = {"svg.hashsalt": "sqa_convert"} | ({"svg.fonttype": "none"} if page else {})
    metadata = {"svg": {"Date": None}, "page": dict.fromkeys(("Creator", "Date", "Format", "Type"))}.get(kind)
    with rc_context(settings):  # the same picture is the same file
        figure.savefig(content, format="svg" if page else kind, dpi=144, metadata=metadata, transparent=page)
    if not page:
        return content.getvalue()
    svg = content.getvalue().decode()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # names that nothing refers to
    return svg.replace("#000000", "currentColor").encode()
