"""What is asked of a conversion of modules, and what each of them is to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..calibration.candidates import CANDIDATES
from ..conversion.fitting import EFFORTS
from ..errors import RecipeError, shown
from ..heads import AUTO, Convert, Method, Partition, get_method
from ..layers.asked_heads import asked_heads
from ..parse_amounts import check_steps
from .find_attention import Attentions

Candidates = dict[str, tuple[Method, bool]]
"""what is tried: method, and whether the partition is searched"""

_PARTITIONS = ("searched", "contiguous")


@dataclass(frozen=True)
class Asked:
    """Arguments of `convert_modules`, with their defaults."""

    q_groups: int | None
    kv_groups: int | None
    variant: str | None
    method: str | Method | Convert
    partition: str | Partition | Mapping[str, Partition] | None
    refit: bool | None
    refine_steps: int | None
    modules: Sequence[str] | None
    calibrated: bool

    def check(self) -> None:
        """Raises RecipeError for what is possible with no model."""
        if self.method != AUTO:
            get_method(self.method)
        if isinstance(self.partition, str) and self.partition not in _PARTITIONS:
            raise RecipeError(
                f"--partition {shown(self.partition)}: choose {', '.join(_PARTITIONS)}, or give a Partition"
            )
        check_steps(self.refine_steps, "--refine-steps")
        if (self.q_groups, self.kv_groups, self.variant) == (None,) * 3 and not self._given:
            raise RecipeError("nothing is asked for: give --q-groups and --kv-groups, or --variant")
        if not self.calibrated and (self.refit or self.refine_steps):
            raise RecipeError("--refit and --refine-steps need --calibration")

    @property
    def _given(self) -> bool:
        return isinstance(self.partition, Partition | Mapping)

    def planned(self, attentions: Attentions) -> dict[str, Partition]:
        """For each attention what is given for it, or neighbouring heads together. Raises RecipeError."""
        by_name = self.partition if isinstance(self.partition, Mapping) else {}
        for name in by_name:
            if name not in attentions:
                raise RecipeError(f"--partition for {shown(name)}: there are {shown(', '.join(attentions), 300)}")
        return {name: self._planned(name, module, by_name.get(name)) for name, module in attentions.items()}

    def _planned(self, name: str, module: nn.MultiheadAttention, given: Partition | None) -> Partition:
        heads = module.num_heads
        every = self.partition if isinstance(self.partition, Partition) else None
        if isinstance(self.partition, Mapping) and given is None and (self.q_groups, self.variant) == (None, None):
            return Partition.identity(heads)
        try:
            if given is not None:
                asked_heads(heads, None, None, None, given)
                return given
            counts = asked_heads(heads, self.q_groups, self.kv_groups, self.variant, every)
        except RecipeError as error:
            raise RecipeError(f"{error} ({name or type(module).__name__})") from error
        return every or Partition.contiguous(heads, *counts)

    def candidates(self, name: str) -> Candidates:
        """What is tried for an attention, by how it is called in the report."""
        given = isinstance(self.partition, Partition) or (
            isinstance(self.partition, Mapping) and name in self.partition
        )
        told = self.partition if isinstance(self.partition, str) else None
        if self.method != AUTO:
            method = get_method(self.method)
            searched = method.needs_statistics if told is None else told == "searched"
            return {method.name: (method, searched and not given)}
        if given:
            return {name: (get_method(name), False) for name in ("svd", "procrustes")}
        named = {name: (get_method(method), searched) for name, (method, searched) in CANDIDATES.items()}
        if told == "contiguous":
            return {"svd": (get_method("svd"), False), "procrustes": (get_method("procrustes"), False)}
        return {name: candidate for name, candidate in named.items() if told is None or candidate[1]}

    @property
    def fits(self) -> bool:
        """Whether the method is one that is fitted unless told otherwise."""
        return self.method == AUTO or get_method(self.method).needs_statistics

    @property
    def with_refit(self) -> bool:
        return self.fits if self.refit is None else self.refit

    @property
    def steps(self) -> int:
        return (EFFORTS["default"].refine_steps if self.fits else 0) if self.refine_steps is None else self.refine_steps
