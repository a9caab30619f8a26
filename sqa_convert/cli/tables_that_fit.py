"""Tables for a terminal of any width: heads are broken between words, figures never are."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_NAMES = 12  # columns of the first cells, at least

_FRAME = 3  # columns of a cell's frame and margins


def fitted_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A table in so many columns of text; where its figures need more, a few lines for each row instead."""
    figures = [max([len(row[i]) for row in rows] or [0]) for i in range(1, len(columns))]
    heads = [_broken(head, size) for head, size in zip(columns[1:], figures, strict=True)]
    sizes = [max(size, *map(len, head)) for head, size in zip(heads, figures, strict=True)]
    first = max(map(len, [columns[0], *(row[0] for row in rows)]), default=0)
    if sum(sizes) + min(first, _NAMES) + _FRAME * len(columns) + 1 > width:
        return Group(*(_stacked(columns, row) for row in rows))
    table = Table()
    table.add_column(columns[0], overflow="fold")
    for head in heads:
        table.add_column("\n".join(head), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _broken(head: str, size: int) -> list[str]:
    """A head in lines of about the size of what is below it, broken between words."""
    longest = max(map(len, head.split()), default=0)
    return wrap(head, max(size, longest, 1), break_long_words=False, break_on_hyphens=False) or [""]


def _stacked(columns: Sequence[str], row: Sequence[str]) -> Text:
    lines = [row[0], *(f"  {head}: {cell}" for head, cell in zip(columns[1:], row[1:], strict=True) if cell)]
    return Text("\n".join(lines))
