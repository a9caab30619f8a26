"""Measured figures as they are shown: what is beyond reason is said to be so, not written out."""

from __future__ import annotations

import math

MOST_NATS = 20.0
"""a loss or a divergence beyond it tells nothing more: guessing among a million tokens costs 13.8"""

MOST_PERPLEXITY = 1e6


def nats(value: float, sign: str = "", digits: int = 4) -> str:
    """A loss or a divergence; `sign` "+" also writes that of what is above zero."""
    if not abs(value) <= MOST_NATS:
        return f"{'under -' if value < 0 else 'over ' + sign}{MOST_NATS:g}"
    return f"{value:{sign}.{digits}f}"


def perplexity(value: float) -> str:
    return f"{value:,.2f}" if value <= MOST_PERPLEXITY else f"over {MOST_PERPLEXITY:,.0f}"


def within_reason(key: str, value: float) -> bool:
    """Of a figure of `Quality`."""
    return math.isfinite(value) and value <= (MOST_PERPLEXITY if key == "perplexity" else MOST_NATS)
