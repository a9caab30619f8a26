"""One message, two spellings: errors name flags, and where they leave a public function its arguments.

The names are those of its signature: `--q-groups 8` is q_groups=8, `--no-evaluate` is evaluate=False, and what is a
setting of an argument, such as `--calibration-tokens`, is Calibration(tokens=…).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .errors import SQAError, shown

P = ParamSpec("P")

R = TypeVar("R")

_settled: ContextVar[bool] = ContextVar("settled", default=False)
"""whether somebody further out has a say: a public function, or a command, which leaves flags as they are"""

_COMMAND = re.compile(r"(?<!\S)sqa-(convert|uptrain|eval|bench|sweep) (\S.*?) (--[a-z][a-z-]*)(?=$|[;,)])")

_FLAG = re.compile(r"(?<![^\s(`])(?:--[a-z][a-z-]*|FOLDER|the flags?(?= --))(?![\w-])")

_LITERAL = re.compile(r"-?\d[\d_,.]*(?:e[+-]?\d+)?(?<![,.])(?!\w)|(?:cpu|cuda|mps|float32|bfloat16|float16)(?![\w:])")
"""values that messages advise, beside numbers"""

_FEW = 100
"""what is longer is text itself, not names"""

_OTHER_NAMES = {"--attn": ("--attention",), "--compile": ("--compiled",), "FOLDER": ("--folder", "--model")}

_FUNCTIONS = {"eval": "evaluate"}
"""of commands, where they are called otherwise"""


class _Argument(NamedTuple):
    """How an argument is written: `before` it the function that makes it, as in "Calibration(tokens"."""

    written: str
    value: Any = inspect.Parameter.empty
    """as it was given"""
    fixed: str = ""
    """what it is where the flag has no value, as True of a switch"""

    def with_value(self, value: str) -> str:
        if not value and "(" in self.written:
            value = "…"
        return f"{self.written}={value}{')' * self.written.count('(')}" if value else self.written


@contextlib.contextmanager
def flags_named() -> Iterator[None]:
    """While a command runs, errors name its flags."""
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


def names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose errors name its arguments, unless a command or another public function calls it."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if _settled.get():
            return function(*args, **kwargs)
        with flags_named():
            try:
                return function(*args, **kwargs)
            except SQAError as error:
                if error.args and isinstance(error.args[0], str):
                    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
                    error.args = (in_arguments(error.args[0], function, given, _foreign(error)), *error.args[1:])
                raise

    return wrapper


def in_arguments(
    message: str, function: Callable[..., Any], given: Mapping[str, Any], foreign: Collection[str] = ()
) -> str:
    """A message with the arguments of a function in the place of flags.

    Args:
        given: the arguments that the function was called with; what they hold is left as it is.
        foreign: other texts that are left.
    """
    known, values = _arguments(function, given), set(_texts(given))
    texts = {part for text in values for part in re.split(r"[/\\]", text) if _FLAG.search(part)} | {*foreign}
    whole = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
    written, at = "", 0
    while at < len(message):
        if command := _COMMAND.match(message, at):
            name, folder, flag = command.groups()
            written += f"sqa_convert.{_FUNCTIONS.get(name, name)}({folder!r}, {_name(flag)}=True)"
            at = command.end()
            continue
        flag, left = _FLAG.match(message, at), whole.match(message, at)
        text, end, has_value = _spelled(flag, known, values) if flag else (message[at], at + 1, False)
        if left and not has_value:
            text, end = left[0], left.end()
        written, at = written + text, end
    return written


def _spelled(found: re.Match[str], known: Mapping[str, _Argument], values: Iterable[str]) -> tuple[str, int, bool]:
    """How a flag and the value that follows it are written, where the message goes on, and whether it was given so."""
    flag, message, end = found[0], found.string, found.end()
    if flag.startswith("the flag"):
        return flag.replace("flag", "argument"), end, False
    flag = next((name for name in _OTHER_NAMES.get(flag, ()) if name in known), flag)
    argument = known.get(flag) or _Argument(_name(flag), fixed="False" if flag.startswith("--no-") else "")
    if argument.fixed:
        return argument.with_value(argument.fixed), end, False
    for text, value in [
        form for given in (argument.value, *sorted(values, key=len, reverse=True)) for form in _forms(given).items()
    ]:
        stop = end + 1 + len(text)
        if message[end:stop] == f" {text}" and re.match(r"$|[\s:;,)]|\.(?!\S)", message[stop:]):
            return argument.with_value(value), stop, True
    if literal := _LITERAL.match(message, end + 1):
        value = literal[0] if literal[0][-1].isdigit() and not literal[0][0].isalpha() else repr(literal[0])
        return argument.with_value(value), literal.end(), False
    return argument.with_value(""), end, False


def _forms(value: Any) -> dict[str, str]:
    """How a message may say a value, the longest first, and how it is written in Python."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if not isinstance(text, str) or not text:
            return {}
        home = f"{Path.home()}{text[1:]}" if text.startswith("~/") else text
        texts = {text, str(Path(text)), home, shown(text), text[:100], text[:200]}
        return {t: repr(t) for t in sorted(texts, key=len, reverse=True)} | {repr(text): repr(text)}
    if isinstance(value, tuple | list) and 0 < len(value) <= _FEW:
        return {",".join(map(str, value)): repr(value)}
    if value is None or isinstance(value, int | float):
        return {repr(str(value)): repr(value), str(value): repr(value)}
    return {}


def _arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, _Argument]:
    """A function's arguments by their flags, and the settings of those arguments that are dataclasses."""
    known: dict[str, _Argument] = {}
    nested: dict[str, _Argument] = {}
    names = getattr(inspect.unwrap(function), "__globals__", {})
    for name, parameter in inspect.signature(function).parameters.items():
        words, value = re.findall(r"\w+", str(parameter.annotation)), given.get(name, inspect.Parameter.empty)
        flag, negated = _flag(name), f"--no-{_flag(name)[2:]}"
        if "bool" not in words:
            known |= {flag: _Argument(name, value), negated: _Argument(name, fixed="None")}
        if "bool" in words and parameter.default is not False:
            known[negated] = _Argument(name, fixed="False")
        if "bool" in words and parameter.default is not True:
            known[flag] = _Argument(name, fixed="True")
        for kind in (*map(names.get, words), type(parameter.default), type(value)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                nested = _settings(kind, flag, value) | nested
    return nested | known


def _settings(kind: Any, flag: str, value: Any) -> dict[str, _Argument]:
    """The fields of a dataclass by their flags, of which some begin with the flag of the argument that it is."""
    known: dict[str, _Argument] = {}
    for field in dataclasses.fields(kind):
        switch = "bool" in str(field.type)
        given = getattr(value, field.name) if isinstance(value, kind) else inspect.Parameter.empty
        argument = _Argument(f"{kind.__name__}({field.name}", given, "True" if switch else "")
        known |= dict.fromkeys((_flag(field.name), f"{flag}-{_flag(field.name)[2:]}"), argument)
        if switch:
            known[f"--no-{_flag(field.name)[2:]}"] = argument._replace(fixed="False")
    return known


def _foreign(error: BaseException) -> set[str]:
    """What looks like a flag in the errors of others that led to this one, with the word before it."""
    found: set[str] = set()
    while error.__cause__ is not None:
        error = error.__cause__
        if not isinstance(error, SQAError):
            found |= {match[0] for match in re.finditer(r"\S+ --[a-z][a-z-]*", " ".join(str(error).split()))}
    return found


def _texts(value: Any) -> Iterator[str]:
    """All text in what was given."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str):
            yield text
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple | set) and len(value) <= _FEW:
        for one in value:
            yield from _texts(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _texts(list(vars(value).values()))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _name(flag: str) -> str:
    return flag.removeprefix("--").removeprefix("no-").replace("-", "_")
