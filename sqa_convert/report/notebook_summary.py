"""A report at a glance, as text and as HTML: what a conversion shows of itself in Python and in a notebook."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import costs, quality_table
from .templates import filled

_WIDTH = 100


def text_summary(report: dict[str, Any], output: Path | None) -> str:
    """Cost and quality as plain text."""
    parts = [_title(report, output), _text(*costs(report))]
    columns, rows = quality_table(report)
    if rows:
        parts.append(_text(columns, rows))
    return "\n\n".join(parts)


def html_summary(report: dict[str, Any], output: Path | None) -> str:
    """The same as HTML."""
    columns, rows = quality_table(report)
    return filled(
        "summary.html",
        title=_title(report, output),
        tables=[costs(report), *([(columns, rows)] if rows else [])],
    )


def _title(report: dict[str, Any], output: Path | None) -> str:
    where = "in memory" if output is None else str(output)
    return f"{report['architecture']} from {report['source']['name']}, {where}"


def _text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    page = io.StringIO()
    Console(file=page, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
