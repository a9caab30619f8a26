"""One measurement of speed, and the ratio of two."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RecipeError
from .timing import Spread


@dataclass(frozen=True)
class Measurement:
    """One model in one mode at one length."""

    model: str
    part: str
    """of PARTS"""
    mode: str
    length: int
    batch: int
    dtype: str
    device: str
    attention: str
    tokens: int
    """in a run, of all rows"""
    seconds: list[float]
    """of a run, in each round; empty where memory did not suffice"""
    flops: int
    """as torch counts them"""
    bytes_read: int | None = None
    """of decoding: weights and cache"""
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    """held during a run above what is held between runs"""

    def to_json(self, base: Measurement) -> dict[str, Any]:
        """With what follows, beside `base`."""
        row = asdict(self)
        if self.seconds:
            spread = Spread.of(self.seconds)
            row["seconds"] = asdict(spread)
            row["tokens_per_second"] = self.tokens / spread.median
        else:
            row["seconds"], row["out_of_memory"] = None, True
        row["ideal"] = ideal(base, self)
        if self.seconds and base.seconds:
            row["speedup"] = asdict(speedup(base, self))
        return row


def speedup(base: Measurement, other: Measurement) -> Spread:
    """How many times as fast `other` is, round by round. Raises RecipeError where the two cannot be compared."""
    for key in ("part", "mode", "length", "batch", "dtype", "device", "attention"):
        if getattr(base, key) != getattr(other, key):
            raise RecipeError(
                f"{base.model} was measured with {key} {getattr(base, key)}, {other.model} with {getattr(other, key)}: "
                "these cannot be compared"
            )
    if len(base.seconds) != len(other.seconds):
        raise RecipeError(f"{base.model} was timed {len(base.seconds)} times, {other.model} {len(other.seconds)} times")
    return Spread.of([a / b for a, b in zip(base.seconds, other.seconds, strict=True)])


def ideal(base: Measurement, other: Measurement) -> float | None:
    """The speed-up that counting promises: of floating point operations, in decoding of bytes to be read.

    None in decoding where memory did not suffice for one of them, so that its bytes are not known.
    """
    if other.mode != "decode":
        return base.flops / other.flops
    if base.bytes_read is None or other.bytes_read is None:
        return None
    return base.bytes_read / other.bytes_read
