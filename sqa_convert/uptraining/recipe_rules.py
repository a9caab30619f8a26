"""What a setting can be, and all that is wrong with the settings of a recipe in one line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import RecipeError
from ..flags_as_arguments import names_arguments
from ..parse_amounts import amount, check_seed
from .other_trainers_names import HINTS

_Class = TypeVar("_Class", bound=Any)

_RULES = {
    "bool_type": "true or false",
    "finite_number": "finite",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
"""by pydantic's name of the fault"""


def must_be(rule: str) -> PydanticCustomError:
    """What a validator raises: the rule that a value breaks."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def sentence(text: str) -> PydanticCustomError:
    """What a validator raises where the setting to change is another: all that is said."""
    return PydanticCustomError("sentence", "{text}", {"text": text})


def _read(read: Callable[[Any], Any], rule: str) -> BeforeValidator:
    def check(given: Any) -> Any:
        try:
            return read(given)
        except (TypeError, ValueError) as error:
            raise must_be(rule) from error

    return BeforeValidator(check)


Count = Annotated[int, _read(lambda given: amount(str(given), ""), "a whole number, such as 512, 400k or 5M")]

Seed = Annotated[int, _read(lambda given: check_seed(amount(str(given), "")), "between 0 and 2**32 - 1")]

Number = Annotated[
    float, _read(lambda given: float(str(given)), "a number, such as 0.1 or 2e-4"), Field(allow_inf_nan=False)
]

Text = Annotated[str, _read(os.fspath, "text")]

Switch = Annotated[bool, Field(strict=True)]


def in_one_line(recipe: type[_Class]) -> type[_Class]:
    """Lets a dataclass of pydantic raise one RecipeError for all that is wrong with its fields."""
    create, names = recipe.__init__, [field.name for field in dataclasses.fields(recipe)]

    @functools.wraps(create)
    def init(self: _Class, /, *given: Any, **named: Any) -> None:
        try:
            create(self, *given, **named)
        except ValidationError as error:
            raise RecipeError("; ".join(_said(fault, names) for fault in error.errors())) from error

    recipe.__init__ = names_arguments(init)
    return recipe


def _said(fault: ErrorDetails, names: list[str]) -> str:
    """What was given for a setting, and what is allowed."""
    place, context = fault["loc"][0], fault.get("ctx", {})
    numbered: dict[Any, str] = dict(enumerate(names))  # where it was given without its name
    name = numbered.get(place, str(place))
    if fault["type"] == "sentence":
        return fault["msg"]
    if name not in names:
        return f"{name}: no such setting{_hint(name, names)}"
    rule = _RULES.get(fault["type"], fault["msg"]).format(**context)
    if fault["type"] == "literal_error":
        rule = context["expected"].replace("'", "").replace(", ", " or ")
    return f"{name}: {fault['input']!r} must be {rule}"


def _hint(name: str, names: list[str]) -> str:
    """What an unknown setting may have been meant for: by what other trainers call it, or by its letters."""
    hint = HINTS.get(name.lower().replace("-", "_").replace(" ", "_"))
    if hint is not None:
        return f"; here it is {hint}"
    close = difflib.get_close_matches(name, names, 1)
    return f", did you mean {close[0]}?" if close else ""
