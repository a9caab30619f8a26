"""What is asked of a measurement of speed."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError
from .workloads import MODES

DTYPES = ("float32", "bfloat16", "float16")

PARTS = ("model", "attention")

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")

LONGEST = 2**22
"""tokens"""

LENGTHS = {"cpu": (256, 1024), "mps": (1024, 4096), "cuda": (1024, 4096, 32768)}
"""tokens, where none are told"""

GRID = ("mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "xsmqa")
"""the variants of SQA's paper (arXiv 2510.01817, table 1)"""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    lengths: tuple[int, ...] = ()
    """Tokens; empty: as suits the device."""
    modes: tuple[str, ...] = MODES
    """Of "prefill", "decode" and "train"."""
    batch: int = 1
    """Rows."""
    dtype: str = "auto"
    """"float32", "bfloat16", "float16"; "auto": as stored, which must be the same for all."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    attention: str = "sdpa"
    """The attention kernel, a name of ATTENTION."""
    repeats: int = 5
    """Rounds; each times every model once."""
    compiled: bool = False
    """By torch.compile with dynamic shapes."""
    parts: tuple[str, ...] = PARTS
    """Of "model" (the whole) and "attention" (one layer)."""

    def check(self) -> None:
        """Raises RecipeError for what cannot be."""
        if any(not 2 <= length <= LONGEST for length in self.lengths):
            raise RecipeError(f"--lengths {','.join(map(str, self.lengths))}: give 2 to {LONGEST:,} tokens")
        for flag, value in (("--batch", self.batch), ("--repeats", self.repeats)):
            if value < 1:
                raise RecipeError(f"{flag} {value}: give 1 or more")
        for flag, given, known in (("--modes", self.modes, MODES), ("--parts", self.parts, PARTS)):
            if not given or not set(given) <= set(known):
                raise RecipeError(f"{flag} {','.join(given)}: choose of {', '.join(known)}")
        choices: dict[str, tuple[str, tuple[str, ...]]] = {
            "--dtype": (self.dtype, ("auto", *DTYPES)),
            "--attn": (self.attention, ATTENTION),
        }
        for flag, (one, allowed) in choices.items():
            if one not in allowed:
                raise RecipeError(f"{flag} {one}: choose {', '.join(allowed)}")
