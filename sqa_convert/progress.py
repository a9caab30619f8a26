"""How long work tells those who wait for it how far it is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol


class Progress(Protocol):
    """Is told how the work goes on: what is being done, how much of it is done, how much there is, and any news."""

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None: ...


def silent(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress that shows nothing."""


_bars: dict[str, Any] = {}


def in_notebooks(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress with a bar for each stage in a notebook; elsewhere it shows nothing."""
    if "ipykernel" not in sys.modules:
        return
    from tqdm.auto import tqdm

    bar = _bars.get(stage)
    if bar is None or done < bar.n or total != bar.total:  # a stage of other work that has the same name
        bar = _bars[stage] = tqdm(total=total, desc=stage)
    bar.update(done - bar.n)
    if news:
        bar.set_postfix_str(news)
    if done >= total:
        _bars.pop(stage).close()


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
