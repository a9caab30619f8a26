"""The register of methods: plain functions from the source's heads and a partition to the converted heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RecipeError, shown
from ..flags_as_arguments import names_arguments
from .partition import Partition
from .weights import AttentionHeads

Convert = Callable[[AttentionHeads[Any], Partition, Any], AttentionHeads[Any]]

AUTO = "auto"
"""the name that is no method's: several are tried on calibration text, and the best is taken"""


@dataclass(frozen=True)
class Method:
    """A way to turn the heads of a partition into fewer heads."""

    name: str
    summary: str
    """One line: what it does."""
    source: str
    """Where it was published."""
    convert: Convert
    """(heads, partition, statistics) -> heads; a group of one head is copied verbatim."""
    needs_statistics: bool = False
    """Of the site's inputs: from calibration text, or without it from the norms' weights; others use none, and take
    arrays as well as tensors."""

    def merged(self, heads: AttentionHeads[Any], partition: Partition, statistics: Any = None) -> AttentionHeads[Any]:
        """What `convert` makes of the heads. Raises RecipeError where that is no heads of the partition's shapes."""
        result = self.convert(heads, partition, statistics)
        if not isinstance(result, AttentionHeads):
            raise RecipeError(f"method {self.name} returned a {type(result).__name__}: it must return AttentionHeads")
        arrays = vars(result).items()
        result = replace(result, **{name: a.detach() for name, a in arrays if getattr(a, "requires_grad", False)})
        counts = dict.fromkeys(("query", "output", "query_bias", "position_bias"), len(partition.clusters))
        counts |= dict.fromkeys(("key", "value", "key_bias", "value_bias"), len(partition.groups))
        for name, source in vars(heads).items():
            shape = None if source is None else (counts.get(name, len(source)), *source.shape[1:])
            returned = _shape(getattr(result, name))
            if returned != shape:
                raise RecipeError(f"method {self.name} returned {name} of shape {returned}: it must be {shape}")
        return result


METHODS: dict[str, Method] = {}
"""The methods by name, the best first."""


def register_method(
    name: str, *, summary: str = "", source: str = "", needs_statistics: bool = False
) -> Callable[[Convert], Convert]:
    """Registers a function as a method, so that `convert(method=name)` finds it. A decorator.

    Args:
        name: that no other method has.
        summary: one line, for `--list-methods`; by default the first of the function's docstring.
        source: where it was published; by default where the function is defined.
        needs_statistics: whether the function is to be given `Statistics`. Then it is also treated as `svd` is: its
            partition is searched for, what it returns is refitted and refined on text, and heads are shared out among
            layers, unless told otherwise.

    Returns:
        What registers a function and returns it unchanged. The function takes the H heads of one attention, their
        partition and the statistics, and returns Hq query heads and Hkv key/value heads in the same layout. A function
        defined anew, as in a notebook's cell that runs twice, takes the place of its former self.

    Raises:
        RecipeError: another method has that name.
    """

    def register(convert: Convert) -> Convert:
        there = METHODS.get(name)
        if name == AUTO or (there is not None and _home(there.convert) != _home(convert)):
            raise RecipeError(f"there is a method {name} already: register this one under another name")
        METHODS[name] = _described(name, convert, summary, source, needs_statistics)
        return convert

    return register


@names_arguments
def get_method(given: str | Method | Convert) -> Method:
    """The method of a name; of a function, which is given statistics; or the one given.

    Raises:
        RecipeError: there is no such method, or another one has its name.
    """
    if isinstance(given, str):
        if given not in METHODS:
            raise RecipeError(f"--method {given}: choose one of {AUTO}, {', '.join(METHODS)}")
        return METHODS[given]
    if isinstance(given, Method):
        method = given
    elif callable(given):
        known = (method for method in METHODS.values() if method.convert is given)
        method = next(known, None) or _described(_name(given), given, "", "", needs_statistics=True)
    else:
        raise RecipeError(f"--method {shown(given)}: give a name, a Method or a function")
    if method.name == AUTO or METHODS.get(method.name, method) != method:
        raise RecipeError(f"--method: {method.name} is the name of another method: give this one a name of its own")
    return method


def _described(name: str, convert: Convert, summary: str, source: str, needs_statistics: bool) -> Method:
    first_line = (getattr(convert, "__doc__", None) or "").strip().partition("\n")[0]
    return Method(name, summary or first_line, source or _home(convert), convert, needs_statistics)


def _name(function: Callable[..., Any]) -> str:
    """Of a function; of `functools.partial` that of the function inside, of other objects that of their class."""
    inside = getattr(function, "func", function)
    return str(getattr(inside, "__name__", type(inside).__name__))


def _home(function: Callable[..., Any]) -> str:
    """Where a function is defined."""
    inside = getattr(function, "func", function)
    return f"{inside.__module__}.{getattr(inside, '__qualname__', type(inside).__qualname__)}"


def _shape(array: Any) -> tuple[int, ...] | None:
    return None if array is None else tuple(getattr(array, "shape", ()))
