"""What a command shows while it works: the plan, then one live line; in a pipe or a log a line for each stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..progress import Position, silent

STARTING = "starting"
"""what is shown until the first stage begins: libraries are being imported"""

_REFRESHES = 4  # a second


@contextlib.contextmanager
def showing(console: Console, title: str, quiet: bool) -> Iterator[Callable[..., None]]:
    """A Progress that shows on a console how the work goes on.

    Args:
        console: of stderr.
        title: what is being done, in a line.
        quiet: show nothing.
    """
    if quiet:
        yield silent
    elif not console.is_terminal:
        logged = Logged(console, title)
        yield logged
        logged.end()
    else:
        with Live(console, title) as live:
            yield live


def clock(seconds: float, digits: int = 1) -> str:
    """Seconds as people read them: "7.4 s", "3 min 5 s", "2 h 14 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.{digits}f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Logged:
    """A Progress that prints the plan, and a line when a stage is over; a plan of one stage needs neither."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title, self.position = console, title, Position()
        self.start = self.stage_start = time.perf_counter()

    def plan(self, stages: Sequence[str]) -> None:
        if self.position.plan(stages) and len(stages) > 1:
            for line in filter(None, (self.title, f"{len(stages)} stages: {', '.join(stages)}")):
                self.say(line)

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None:
        if stage != self.position.stage:
            self.end()
            self.position.enter(stage)
            self.stage_start = time.perf_counter()
        if news:
            self.say(f"{stage} {done}/{total}: {news}")

    def end(self) -> None:
        """Says how long the stage took that is over."""
        if self.position.stage and len(self.position.planned) > 1:
            self.say(f"{self.position}: {clock(time.perf_counter() - self.stage_start)}")

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=not self.console.is_terminal)  # a pipe has no width


class Live(Bars):
    """A Progress as one live line, with what is over above it: stage k of n, a bar, elapsed, left, memory, news."""

    def __init__(self, console: Console, title: str) -> None:
        self._logged, self._news, self._done = Logged(console, title), "", 0
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            _Clock(self._logged.start),
            _Memory(),
        )
        super().__init__(*columns, console=console, refresh_per_second=_REFRESHES, transient=True, expand=True)
        self.add_task(STARTING, total=None)

    def plan(self, stages: Sequence[str]) -> None:
        self._logged.plan(stages)

    def __call__(self, stage: str, done: int, total: int, news: str = "") -> None:
        if stage != self._logged.position.stage:
            for task in self.task_ids:
                self.remove_task(task)
            self._logged(stage, done, total)
            self._news = ""
            self.add_task(str(self._logged.position), total=None if total <= 1 else total)
        self._news, self._done = news or self._news, done
        self.update(self.task_ids[-1], completed=done)

    def within(self, share: float) -> None:
        """A step is done in part: the bar moves on."""
        if self.task_ids:
            self.update(self.task_ids[-1], completed=self._done + share)

    def get_renderables(self) -> Iterator[RenderableType]:
        table = self.make_tasks_table(self.tasks)
        yield Group(table, Text(self._news, style="dim")) if self._news else table

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if raised[0] is None:
            self._logged.end()


class _Clock(ProgressColumn):
    """How long all of it took up to now, and how long this stage still takes at its pace."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self._start = start

    def render(self, task: Task) -> Text:
        left, spent = task.time_remaining, clock(time.perf_counter() - self._start, 0)
        known = left is not None and not task.finished
        return Text(f"{spent}, {clock(left or 0, 0)} left" if known else spent, style="cyan", no_wrap=True)


class _Memory(ProgressColumn):
    """What this process holds in memory."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        import psutil

        return Text(f"{psutil.Process().memory_info().rss / 1e9:.1f} GB", style="dim", no_wrap=True)
