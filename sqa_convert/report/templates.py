"""The page and the pictures that are templates, filled in."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("sqa_convert"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def filled(template: str, /, **values: Any) -> str:
    """A template of this package with its values, escaped where they are not marked as markup."""
    return str(_environment().get_template(template).render(values))
