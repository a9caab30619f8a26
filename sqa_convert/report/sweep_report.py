"""What a person sees of a sweep: rows of a table, sentences, the frontier as a picture, and a page of all that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import pictures
from .formatting import MOST_NATS, nats
from .templates import filled

SWEEP_PAGE = "sweep.html"

_COLOURS = {"uniform": "#888888", "adaptive": "#4c72b0"}

_NAME = 0.045, 0.045  # width and height of a point's name, shares of the panel


def sweep_rows(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Column heads, and a row for each point; a star before those of the frontier, two before the knee."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}×"

    rows: list[tuple[str, ...]] = [
        (
            f"{'**' if p['knee'] else '* ' if p['frontier'] else '  '} {p['name']}",
            nats(p["kl"]),
            share(p["parameters"]),
            share(p["flops"]),
            share(p["cache"]),
            share(p["prefill"]),
            share(p["decode"]),
        )
        for p in points
    ]
    return ["heads", "KL", "params", "FLOPs", "cache", "prefill", "decode"], rows


def sweep_lines(result: Mapping[str, Any]) -> list[str]:
    """What the table says, and of what, in sentences."""
    lines = [
        "* no other point has less KL at no more operations of attention and cache; ** the knee of these",
        f"KL to the source in nats a token, on {result['tokens']:,} tokens: {result['data']}; all else in shares of it",
    ]
    if result["timed_tokens"]:
        lines.append(
            f"prefill of {result['timed_tokens']:,} tokens and a decoding step behind them, one row, timed here"
        )
    if why := result["not_timed"]:
        lines.append(f"nothing was timed: {why}; all else is of the source in bfloat16")
    if result["spearman"] is not None:
        lines.append(
            f"what layers cost alone, added up, ranks these points as measured: Spearman {result['spearman']:.3f}"
        )
    return lines


def frontier_picture(result: Mapping[str, Any], kind: str) -> bytes:
    """KL against what attention and cache cost; and against the KL predicted. As "svg", "png" or for a "page"."""
    from matplotlib.figure import Figure

    points = result["points"]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    cost, predicted = figure.subplots(1, 2, width_ratios=(3, 2))
    for allocation, colour in _COLOURS.items():
        shown = [p for p in points if p["allocation"] == allocation]
        for panel, key in ((cost, "cost"), (predicted, "predicted_kl")):
            values = [min(p["kl"], MOST_NATS) for p in shown]
            panel.scatter([p[key] for p in shown], values, s=18, color=colour, label=allocation)
    frontier = sorted((p for p in points if p["frontier"]), key=lambda p: (p["cost"], -p["kl"]))
    line = [p for i, p in enumerate(frontier) if all(p["kl"] < cheaper["kl"] for cheaper in frontier[:i])]
    cost.plot([p["cost"] for p in line], [p["kl"] for p in line], color=_COLOURS["adaptive"], linewidth=0.8)
    cost.set(xlabel="attention's operations and cache, mean share of the source's", ylabel="KL, nats a token")
    both = [value for p in points for value in (p["kl"], p["predicted_kl"]) if value > 0]
    if both:
        predicted.plot([min(both), max(both)], [min(both), max(both)], color="#888888", linewidth=0.8, linestyle=":")
    predicted.set(xlabel="sum of what layers cost alone", xscale="log")
    for panel in (cost, predicted):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    cost.legend(framealpha=0, fontsize=8)
    cost.margins(x=0.08)  # room for the last one's name
    places = cost.transAxes.inverted().transform(cost.transData.transform([(p["cost"], p["kl"]) for p in line]))
    for point in (line[i] for i in _apart(places.tolist(), [i for i, p in enumerate(line) if p["knee"]])):
        name = f"{point['q_groups']}/{point['kv_groups']}" + (" (knee)" if point["knee"] else "")
        cost.annotate(name, (point["cost"], point["kl"]), (4, 4), textcoords="offset points", fontsize=8)
    return pictures.rendered(figure, kind)


def _apart(places: Sequence[Sequence[float]], first: Sequence[int]) -> list[int]:
    """Points, by number, whose names do not lie upon another: those that come first, then in their order.

    Args:
        places: of the points in the panel, shares of its width and height.
        first: are named at any rate.
    """
    named = list(first)
    for i, (x, y) in enumerate(places):
        if all(abs(x - places[j][0]) >= _NAME[0] or abs(y - places[j][1]) >= _NAME[1] for j in named):
            named.append(i)
    return named


def sweep_page(result: Mapping[str, Any]) -> str:
    """The page, HTML, that needs nothing else."""
    from markupsafe import Markup

    return filled(
        SWEEP_PAGE,
        result=result,
        table=sweep_rows(result["points"]),
        lines=sweep_lines(result),
        picture=Markup(frontier_picture(result, "page").decode()),
        kinds=list(result["points"][0]["layers"]),
    )
