"""How long work tells those who wait for it how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how the work goes on: what is being done, how much of it is done, how much there is, and any news."""

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None: ...


def silent(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress that shows nothing."""
