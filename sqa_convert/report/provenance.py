"""How a report came about: the command or call, when, and on what machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import reprlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")

R = TypeVar("R")

_ASKED: ContextVar[str] = ContextVar("asked", default="")

_CPUS = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know the name


def origin() -> dict[str, str]:
    """The "command" that is at work, or the call from Python, and the "date", UTC in ISO 8601."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": _ASKED.get(), "date": now.replace("+00:00", "Z")}


def machine(device: str | None = None) -> dict[str, Any]:
    """The "platform", its "cpu", how many "cores" it has, and the "device" that is computed on, where that is known."""
    described = {"platform": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()}
    return described if device is None else described | {"device": device}


@contextlib.contextmanager
def asked_by(command: str) -> Iterator[None]:
    """Reports made in the block say that this made them. Of blocks within each other the outermost counts."""
    token = None if _ASKED.get() else _ASKED.set(command)
    try:
        yield
    finally:
        if token is not None:
            _ASKED.reset(token)


def asked_from_python(function: Callable[P, R]) -> Callable[P, R]:
    """A public function, whose reports say with which arguments it was called; long ones and objects are shortened."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [_SHORT.repr(value) for value in args]
        given += [f"{name}={_SHORT.repr(value)}" for name, value in kwargs.items()]
        with asked_by(f"sqa_convert.{function.__name__}({', '.join(given)})"):
            return function(*args, **kwargs)

    return wrapper


class _Short(reprlib.Repr):
    """As Python's own `repr`, but of containers the first few, and of objects little more than their class."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 3, 200

    def repr_instance(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, bool | float):
            return repr(x)
        if isinstance(x, os.PathLike):
            return self.repr1(os.fspath(x), level)
        if is_dataclass(x) and not isinstance(x, type):
            shown = [(f.name, self.repr1(getattr(x, f.name), level - 1), self.repr1(_default(f), 1)) for f in fields(x)]
            changed = [f"{name}={value}" for name, value, default in shown if value != default]
            return f"{type(x).__name__}({', '.join(changed)})"
        return str(getattr(x, "__name__", f"{type(x).__name__}(…)"))


_SHORT = _Short()


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _cpu() -> str:
    try:
        described = _CPUS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        described = ""
    names = (line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
