"""Numbers as people write them: "400k" tokens, "2GB" of weights."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import RecipeError

LEAST_SHARD = 10**6
"""bytes of a weight file, at least: a size without its unit would make thousands of files"""
_AMOUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?) ?([kKmMbBgG]?)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4}
_MOST = 2**63


def amount(given: int | str, flag: str, *, thousand: int = 1000) -> int:
    """A whole number such as 4096, "400k", "1.5M" or "2e6".

    Args:
        given: as the user wrote it.
        flag: that it came from, for the message.
        thousand: what k stands for, and M for the square of; of lengths it is 1024.

    Raises:
        RecipeError: it is no such number.
    """
    match = _AMOUNT.fullmatch(str(given).strip())
    if match and not isinstance(given, bool):
        number = Fraction(match[1].replace("_", "")) * thousand ** _POWERS[match[2].lower()]
        if number.denominator == 1 and number < _MOST:
            return int(number)
    what = f"{flag} {str(given)[:100]!r}".strip()
    raise RecipeError(f"{what}: give a whole number such as 512, 4k or 5M (k = {thousand:,}, M = {thousand**2:,})")


def check_seed(seed: int) -> int:
    """The seed. Raises RecipeError unless everything that is random takes it."""
    if not hasattr(seed, "__index__") or not 0 <= seed < 2**32:
        raise RecipeError(f"--seed {str(seed)[:100]}: give a whole number between 0 and 2**32 - 1")
    return seed


def check_steps(steps: int | None, flag: str) -> None:
    """Raises RecipeError for what is no number of steps; None is what suits."""
    if steps is not None and (isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 0):
        raise RecipeError(f"{flag} {str(steps)[:100]}: give 0 or more whole steps")


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes of "300MB", "5GB" (powers of ten) or "5GiB", at least LEAST_SHARD. Raises RecipeError."""
    match = _SIZE.fullmatch(str(text).strip())
    size = 0
    if match:
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])
    if not LEAST_SHARD <= size < _MOST:
        raise RecipeError(f"{flag} {str(text)[:100]}: give a size with its unit, such as 300MB or 5GB; at least 1MB")
    return size
