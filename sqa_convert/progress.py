"""How long work tells those who wait for it how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """Is told how the work goes on: what is being done, how much of it is done, how much there is, and any news."""

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None: ...


def silent(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress that shows nothing."""


@contextlib.contextmanager
def no_bars_of_others() -> Iterator[None]:
    """Without the bars that transformers shows for a moment's reading and writing of weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
