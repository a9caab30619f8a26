"""Two conversions side by side: what their reports say, what they do not share, and a page of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .formatting import nats, perplexity
from .page_bars import Bar, Bars, error_bars, kept_error, logarithmic
from .report_json import read_report
from .tables import costs, quality_table
from .templates import filled
from .verdict import SURE, above, last_quality, longest_prefill, plus_minus, verdict

BESIDE_PAGE = "beside.html"

KINDS = ("first", "second")
"""what has the colour of which report"""

Report = Mapping[str, Any]
Pair = tuple[Report, Report]
Table = tuple[list[str], list[tuple[str, ...]]]


def read_two(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The reports of folders. Raises CheckpointError where one is missing, or not whole."""
    reports = []
    for folder in folders:
        report = read_report(folder)
        try:
            costs(report), quality_table(report), verdict(report), error_bars(report["sites"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{folder}/report.json is not whole: convert again ({error!r:.80})") from error
        reports.append(report)
    return reports


def names_of(folders: Sequence[Path]) -> tuple[str, str]:
    """What to call two folders: their own names, or all of their paths where these are the same."""
    first, second = (folder.resolve() for folder in folders)
    if first.name != second.name:
        return first.name, second.name
    return str(folders[0]), str(folders[1])


def beside_page(reports: Pair, names: tuple[str, str]) -> str:
    """The page, HTML."""
    case, said = compared(reports, names)
    return filled(
        BESIDE_PAGE,
        names=names,
        kinds=KINDS,
        case=case,
        said=said,
        needs=needed(reports, names),
        notes=differences(reports),
        verdicts=list(zip(names, map(verdict, reports), strict=True)),
        quality=quality_rows(reports, names),
        quality_bars=_quality_bars(reports, names),
        cost=cost_rows(reports, names),
        errors=_error_bars(reports),
        made=_made_rows(reports, names),
    )


def compared(reports: Pair, names: tuple[str, str]) -> tuple[str, str]:
    """Which one is nearer to its source, as (case, sentence): "apart" where that cannot be said, "noise" or "good"."""
    rows = [_measured(report) for report in reports]
    for name, row in zip(names, rows, strict=True):
        if row is None:
            return "apart", f"{name} has no KL to its source, so nothing says which one lost less."
    if not _same_source(reports):
        return "apart", "They were made from different sources: what one lost is no measure of the other."
    if not _same_text(reports):
        return "apart", "They were measured on different text: what one lost there is no measure of the other."
    figures, errors = [row["kl"] for row in rows if row], [row.get("kl_error") or 0.0 for row in rows if row]
    told = " against ".join(plus_minus(row["kl"], row.get("kl_error")) for row in rows if row)
    if abs(figures[0] - figures[1]) <= SURE * math.hypot(*errors):
        return "noise", f"What they lost cannot be told apart: KL {told} nats a token."
    nearer = names[figures[1] < figures[0]]
    return "good", f"{nearer} is nearer to the source: KL {told} nats a token."


def needed(reports: Pair, names: tuple[str, str]) -> str:
    """What each needs of what its source does, in a sentence."""
    keys = {"kv_cache_bytes_per_token": "cache", "score_flops": "T² arithmetic", "parameters": "parameters"}
    told = []
    for report, name in zip(reports, names, strict=True):
        before, after = report["cost"]["before"], report["cost"]["after"]
        shares = [f"{after[key] / before[key]:.2f}× the {what}" for key, what in keys.items() if before.get(key)]
        fast = longest_prefill(report)
        told.append(f"{name} needs {', '.join(shares)}{f', and prefill ran {fast} as fast there' if fast else ''}")
    return f"By count {'; '.join(told)}."


def differences(reports: Pair) -> list[str]:
    """What makes the two hard to compare, in sentences."""
    first, second = reports
    lines = []
    if not _same_source(reports):
        lines.append(f"different sources: {' and '.join(_source(report) for report in reports)}")
    if all(map(_measured, reports)) and not _same_text(reports):
        texts = (f"{r['quality']['tokens']:,} tokens of {r['quality']['data']}" for r in reports)
        lines.append(f"measured on different text: {' and '.join(texts)}")
    if first["sqa_convert"] != second["sqa_convert"]:
        lines.append(f"different versions of sqa-convert: {first['sqa_convert']} and {second['sqa_convert']}")
    versions = [report.get("versions", {}) for report in reports]
    for library in dict.fromkeys((*versions[0], *versions[1])):
        pair = [known.get(library, "not recorded") for known in versions]
        if pair[0] != pair[1]:
            lines.append(f"different versions of {library}: {' and '.join(pair)}")
    machines = [_machine(report) for report in reports]
    if machines[0] != machines[1]:
        lines.append(f"made on different machines: {' and '.join(machines)}; seconds and speed cannot be compared")
    return lines


def quality_rows(reports: Pair, names: tuple[str, str]) -> Table | None:
    """Figures of both, a row a measure; None where nothing was measured of either."""
    rows = [_measured(report) for report in reports]
    if not any(rows):
        return None

    def cells(show: Any) -> tuple[str, ...]:
        return tuple("" if row is None else show(row, report) for row, report in zip(rows, reports, strict=True))

    return ["", *names], [
        ("loss above the source's, nats", *cells(lambda row, r: plus_minus(above(r), row.get("loss_error"), "+"))),
        ("KL to the source, nats", *cells(lambda row, r: plus_minus(row["kl"], row.get("kl_error")))),
        ("perplexity", *cells(lambda row, r: perplexity(row["perplexity"]))),
        ("source's perplexity", *cells(lambda row, r: perplexity(r["quality"]["source"]["perplexity"]))),
        ("top-1 as source", *cells(lambda row, r: "" if row.get("top1") is None else f"{row['top1']:.1%}")),
    ]


def cost_rows(reports: Pair, names: tuple[str, str]) -> Table:
    """What the source and both results need."""
    tables = [costs(dict(report))[1] for report in reports]
    same_length = reports[0]["context_tokens"] == reports[1]["context_tokens"]
    rows: list[tuple[str, ...]] = []
    for (what, before, first), (_, other, second) in zip(*tables, strict=True):
        rows.append(
            (
                what if same_length else what.split(" at ")[0],
                before if before == other else f"{before}, {other}",
                first,
                second,
            )
        )
    return ["", "source", *names], rows


def _made_rows(reports: Pair, names: tuple[str, str]) -> Table:
    def calibration(report: Report) -> str:
        done = report.get("calibration")
        return f"{done['tokens']:,} tokens: {done['text']}" if done else "no text"

    def uptraining(report: Report) -> str:
        done = report.get("uptraining")
        return f"{done['tokens']:,} tokens, {done['loss']}" if done else "none"

    shown = {
        "source": _source,
        "method": lambda report: report["method"],
        "fitted on": calibration,
        "uptraining": uptraining,
        "seed": lambda report: str(report["seed"]),
        "seconds": lambda report: f"{sum(report['seconds'].values()):,.1f}",
        "date": lambda report: report.get("date", "not recorded"),
        "machine": _machine,
        "command": lambda report: report.get("command") or "not recorded",
    }
    return ["", *names], [(what, *(show(report) for report in reports)) for what, show in shown.items()]


def _quality_bars(reports: Pair, names: tuple[str, str]) -> list[Bars]:
    rows = [(name, _measured(r), r, kind) for name, r, kind in zip(names, reports, KINDS, strict=True)]
    kl = [(name, row["kl"], nats(row["kl"]), kind) for name, row, _, kind in rows if row]
    loss = [(name, above(report), nats(above(report), "+"), kind) for name, row, report, kind in rows if row]
    charts = {"KL to the source, nats a token": kl, "Loss above the source's, nats a token": loss}
    return [logarithmic(title, figures) for title, figures in charts.items()] if len(kl) == 2 else []


def _error_bars(reports: Pair) -> list[Bars]:
    """Errors of each attention that both have, and KL by position where both were measured on the same text."""
    sites = [{(site["kind"], site["layer"]): site for site in report["sites"]} for report in reports]
    both = [key for key in sites[0] if all(kept_error(side.get(key, {})) is not None for side in sites)]
    charts = []
    for kind in dict.fromkeys(kind for kind, _ in both):
        keys = [key for key in both if key[0] == kind]
        pairs = [(f"{kind} {key[1]}", [kept_error(side[key]) for side in sites]) for key in keys]
        charts.append(_paired(f"Error of each {kind} attention", pairs))
    by_position = [{(p["from"], p["to"]): p["mean"] for p in _positions(report)} for report in reports]
    shared = [place for place in by_position[0] if place in by_position[1]]
    if len(shared) > 1 and _same_text(reports):
        pairs = [(f"{place[0]:,}–{place[1]:,}", [side[place] for side in by_position]) for place in shared]
        charts.append(_paired("KL by position in the document", pairs))
    return charts


def _paired(title: str, pairs: Sequence[tuple[str, Sequence[Any]]]) -> Bars:
    """Two figures a row, on one scale."""
    flat = [(name, value, f"{value:.4f}", kind) for name, two in pairs for value, kind in zip(two, KINDS, strict=True)]
    chart = logarithmic(title, flat)
    bars = [
        Bar(first.name, first.shown, first.share, first.kind, parts=(second,))
        for first, second in zip(chart.bars[::2], chart.bars[1::2], strict=True)
    ]
    return Bars(chart.title, bars, chart.scale)


def _positions(report: Report) -> list[dict[str, Any]]:
    return (last_quality(report) or {}).get("kl_by_position") or []


def _measured(report: Report) -> dict[str, Any] | None:
    row = last_quality(report)
    return row if row is not None and row.get("kl") is not None and row.get("loss") is not None else None


def _same_source(reports: Pair) -> bool:
    weights = [report.get("source_weights") for report in reports]
    if all(weights):
        return weights[0] == weights[1]
    return _source(reports[0]) == _source(reports[1])


def _same_text(reports: Pair) -> bool:
    first, second = (report.get("quality", {}) for report in reports)
    return all(first.get(key) == second.get(key) for key in ("data", "tokens", "documents"))


def _source(report: Report) -> str:
    revision = report["source"].get("revision")
    return f"{report['source']['name']}{f' at {revision}' if revision else ''}"


def _machine(report: Report) -> str:
    machine = report.get("machine", {})
    shown = [machine.get("cpu"), f"{machine['cores']} cores" if "cores" in machine else None, machine.get("device")]
    return ", ".join(str(part) for part in shown if part) or "not recorded"
