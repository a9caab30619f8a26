"""How long work tells those who wait for it how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol


class Progress(Protocol):
    """Is told how the work goes on: what is being done, how much of it is done, how much there is, and any news."""

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None: ...


def silent(stage: str, done: int, total: int, news: str = "") -> None:
    """A Progress that shows nothing."""


class Stages:
    """A Progress that hands on what it is told, and keeps how long each stage took.

    Args:
        progress: is told all of it. One that also has `plan(stages)` is told first what is going to be done, and one
            that has `within(share)` how much of a step is done, some times a second.
        planned: names of the stages, in their order.
    """

    def __init__(self, progress: Progress, planned: Sequence[str] = ()) -> None:
        self._progress = progress
        self._began: list[tuple[str, float]] = []
        self._share = 0.0
        plan = getattr(progress, "plan", None)
        if plan is not None and planned:
            plan(list(planned))

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None:
        if not self._began or stage != self._began[-1][0]:
            self._began.append((stage, time.perf_counter()))
        self._share = 0.0
        self._progress(stage, done, total, news)

    def within(self, share: float | None) -> None:
        """Of the step that is being done; None where no more is done than before, and the work goes on."""
        self._share = self._share if share is None else share
        within = getattr(self._progress, "within", None)
        if within is not None:
            within(self._share)

    def seconds(self) -> list[dict[str, Any]]:
        """[{"name", "seconds"}] of each stage up to now, in their order; a stage ends where the next begins."""
        ends = [start for _, start in self._began[1:]] + [time.perf_counter()]
        return [
            {"name": name, "seconds": round(end - start, 2)}
            for (name, start), end in zip(self._began, ends, strict=True)
        ]


_within: ContextVar[Callable[[float | None], None] | None] = ContextVar("within", default=None)


@contextlib.contextmanager
def told_within(stages: Stages) -> Iterator[None]:
    """In the block `step_done` tells them."""
    token = _within.set(stages.within)
    try:
        yield
    finally:
        _within.reset(token)


def step_done(share: float | None = None) -> None:
    """Says, from deep inside, that the work goes on: so much of the step that is being done, 0 to 1, or as before."""
    tell = _within.get()
    if tell is not None:
        tell(share)


class Position:
    """Where in a plan the work is."""

    def __init__(self) -> None:
        self.planned: list[str] = []
        self.stage = ""
        self.number = 0
        """of the stage, from 1"""

    def plan(self, stages: Sequence[str]) -> bool:
        """Takes a plan, unless it is a part of the one that is being carried out; whether it was taken."""
        if set(stages) <= set(self.planned[self.number :]):
            return False
        self.planned, self.stage, self.number = list(stages), "", 0
        return True

    def enter(self, stage: str) -> bool:
        """Whether another stage begins. One that nobody planned is put in."""
        if stage == self.stage:
            return False
        if stage not in self.planned[self.number :]:
            self.planned.insert(self.number, stage)
        self.number = self.planned.index(stage, self.number) + 1
        self.stage = stage
        return True

    def __str__(self) -> str:
        return f"{self.number}/{len(self.planned)} {self.stage}"


class NotebookBars:
    """A Progress with a bar for each stage in a notebook; elsewhere it shows nothing."""

    def __init__(self) -> None:
        self._position, self._bars = Position(), dict[str, Any]()

    def plan(self, stages: Sequence[str]) -> None:
        self._position.plan(stages)

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None:
        if "ipykernel" not in sys.modules:
            return
        from tqdm.auto import tqdm

        bar = self._bars.get(stage)
        self._position.enter(stage)
        if bar is None or done < bar.n or total != bar.total:  # a stage of other work that has the same name
            bar = self._bars[stage] = tqdm(total=total, desc=str(self._position))
        bar.update(done - bar.n)
        if news:
            bar.set_postfix_str(news)
        if done >= total:
            self._bars.pop(stage).close()


in_notebooks = NotebookBars()


_heard = False  # whether other libraries may say what they like


def hear_others() -> None:
    """From now on `no_bars_of_others` lets transformers speak, in this process."""
    global _heard
    _heard = True


@contextlib.contextmanager
def no_bars_of_others() -> Iterator[None]:
    """Without the bars and notices of transformers about a moment's reading and writing of weights."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if level == logging.WARNING and not _heard:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(level)
