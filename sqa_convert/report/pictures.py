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

_SCALE = "viridis"

_BOX = 32  # a head's side in the picture of the heads

_MOST_SHOWN = 12  # sites in the picture of similarities, evenly chosen

_MOST_NAMED = 16  # sites with their names below an axis


def heads_picture(
    groups: Sequence[Sequence[Sequence[int]]], kind: str, alike: Mapping[int, float] | None = None
) -> str:
    """The partition as SVG: source heads above, their query heads and key/value heads below, one colour a group.

    Args:
        groups: of source heads, a list of clusters each.
        kind: what the picture is of.
        alike: instead of the group's colour, source heads get one for how alike the heads merged with them are, 0 to 1;
            those that are not in it grey.
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
            boxes += [_source_box(head, center[head], source_y, _colour(g), alike) for head in cluster]
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


def _source_box(head: int, x: float, y: int, colour: str, alike: Mapping[int, float] | None) -> _Box:
    if alike is None:
        return _Box(x, y, str(head), colour)
    if head in alike:
        return _Box(x, y, str(head), similarity_colour(alike[head]), f"head {head}: alike {alike[head]:.2f}")
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


def recovery_picture(report: dict[str, Any], kind: str) -> bytes:
    """Held-out loss and KL against tokens of uptraining, with source and control, as "svg" or "png"."""
    from matplotlib.figure import Figure

    curve, quality = report["uptraining"]["curve"], report.get("quality", {})
    keys = {"loss": "held-out loss, nats/token", "kl": "held-out KL to the source, nats/token"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (key, label) in zip(panels, keys.items(), strict=True):
        points = [(point["tokens"], min(point[key], MOST_NATS)) for point in curve if key in point]
        if any(point.get(key, 0) > MOST_NATS for point in curve):
            label += f" (beyond {MOST_NATS:g} not shown)"
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_COLOURS[0], label="uptrained")
        lines = {"source": ("--", _GREY), "control": (":", _COLOURS[3])}
        for name, (style, colour) in lines.items():
            value = quality.get(name, {}).get(key)
            if value:
                panel.axhline(min(value, MOST_NATS), linestyle=style, color=colour, label=f"{name} {nats(value)}")
        panel.set(xlabel="tokens", ylabel=label)
        if key == "kl":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend(framealpha=0)
    figure.suptitle(f"{_plain(report['source']['name'])}: what uptraining took back")
    return rendered(figure, kind)


def speed_picture(speed: dict[str, Any], kind: str) -> bytes:
    """Time of a run against length, log-log, a panel for each part and mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in speed["rows"] if row["seconds"]]
    cells = list(dict.fromkeys((row["part"], row["mode"]) for row in rows))
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, (part, mode) in zip(panels, cells, strict=False):
        for i, (name, heads) in enumerate(speed["heads"].items()):
            shown = [row for row in rows if (row["part"], row["mode"], row["model"]) == (part, mode, name)]
            lengths = [row["length"] for row in shown]
            middle = [1e3 * row["seconds"]["median"] for row in shown]
            colour = _COLOURS[i % len(_COLOURS)]
            panel.plot(lengths, middle, marker="o", markersize=3, color=colour, label=f"{_plain(name)} ({heads})")
            low, high = ([1e3 * row["seconds"][end] for row in shown] for end in ("low", "high"))
            panel.fill_between(lengths, low, high, color=colour, alpha=0.2)
        panel.set(title=f"{part}: {mode}", xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
        ticks = sorted({row["length"] for row in rows})
        panel.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks], fontsize=8)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(MaxNLocator(4))  # a decade may lie beyond what is shown
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(cells) :]:
        panel.set_visible(False)
    figure.axes[0].legend(fontsize=8, framealpha=0)
    batch, dtype = rows[0]["batch"], rows[0]["dtype"]
    figure.suptitle(f"{speed['device']}, {dtype}, batch {batch}: median and range of {speed['repeats']}", fontsize=10)
    return rendered(figure, kind)


def quality_picture(quality: dict[str, Any], rows: Sequence[str], kind: str) -> bytes:
    """KL to the source, and loss above the source's, of each of `rows` that was measured."""
    from matplotlib.figure import Figure

    names = [name for name in reversed(rows) if quality.get(name, {}).get("kl") is not None]
    panels_of = {
        "KL to the source, nats/token": [quality[name]["kl"] for name in names],
        "loss above the source's, nats/token": [quality[name]["loss"] - quality["source"]["loss"] for name in names],
    }
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(names)), layout="constrained")
    for panel, (label, values) in zip(figure.subplots(1, 2), panels_of.items(), strict=True):
        lengths = [min(value, MOST_NATS) for value in values]
        bars = panel.barh(
            names, lengths, color=[_GREY if name == "mean" else _COLOURS[0] for name in names], height=0.6
        )
        panel.bar_label(bars, [nats(value) for value in values], padding=3)
        panel.set_xlabel(label)
        panel.margins(x=0.25)
        panel.axvline(0, color=_GREY, linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    return rendered(figure, kind)


def errors_picture(sites: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """The error of each site's output after each stage of its conversion, as a share of the output's variance."""
    from matplotlib.figure import Figure

    shown = [site for site in sites if site.get("output_error")]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panel = figure.subplots()
    stages = list(dict.fromkeys(stage for site in shown for stage in site["output_error"]))
    for i, stage in enumerate(stages):
        points = [(x, site["output_error"][stage]) for x, site in enumerate(shown) if stage in site["output_error"]]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=":", color=_colour(i), label=stage)
    names = [f"{site['kind']} {site['layer']}" for site in shown]
    step = -(-len(names) // _MOST_NAMED)
    panel.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right", fontsize=8)
    panel.set(ylabel="output error / variance", ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, framealpha=0)
    return rendered(figure, kind)


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
