"""How many heads each layer keeps, where they differ: asked for in words, or as counts written and read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import RecipeError, shown
from ..families import Config, Family, Site
from ..heads import check_head_counts
from .asked_partitions import HeadCounts, site_kinds

UNIFORM, ADAPTIVE = "uniform", "adaptive"

DEFAULT_ALLOCATION = "auto"
"""adaptive where that can be judged and nobody has said what a layer keeps, else uniform"""

CountsByLayer = Mapping[str, tuple[tuple[int, int], ...]]
"""(Hq, Hkv) of every layer, by kind of attention"""

_WAYS = f"choose {DEFAULT_ALLOCATION}, {UNIFORM} or {ADAPTIVE}, or give counts of every layer such as 4/2,8/4,10/5,10/5"


def as_text(counts: CountsByLayer, named: bool = False) -> str:
    """Counts as `counts_of` takes them: "4/2,8/4", of several kinds "encoder:8/4,8/4,decoder:4/2,6/3".

    Args:
        counts: of every layer.
        named: write the kind even where there is one.
    """
    layers = {kind: ",".join(f"{q}/{kv}" for q, kv in each) for kind, each in counts.items()}
    return ",".join(f"{kind}:{text}" if kind and (named or len(layers) > 1) else text for kind, text in layers.items())


def counts_of(asked: Any) -> CountsByLayer | None:
    """The counts that are asked for; None where it is one of the words. Kind "" is the only one of a model.

    Raises RecipeError where it is neither.
    """
    if asked in (DEFAULT_ALLOCATION, UNIFORM, ADAPTIVE):
        return None
    if isinstance(asked, Mapping):
        asked = as_text(asked, named=True) if asked and all(_are_pairs(each) for each in asked.values()) else asked
    if not isinstance(asked, str) or not asked:
        raise RecipeError(f"--allocation {shown(asked)}: {_WAYS}")
    counts: dict[str, list[tuple[int, int]]] = {}
    kind = ""
    for word in asked.split(","):
        match = re.fullmatch(r"(?:([a-z]+):)?(\d{1,6})/(\d{1,6})", word.strip())
        if match is None:
            raise RecipeError(f"--allocation {shown(asked)}: {_WAYS}")
        kind = match[1] or kind
        counts.setdefault(kind, []).append((int(match[2]), int(match[3])))
    return {kind: tuple(layers) for kind, layers in counts.items()}


def _are_pairs(layers: Any) -> bool:
    return isinstance(layers, Collection) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in layers)


def counts_by_site(
    counts: CountsByLayer, family: Family, config: Config, kinds: Collection[str], asked: HeadCounts
) -> dict[Site, tuple[int, int]]:
    """(Hq, Hkv) of every attention site that is converted.

    Args:
        counts: of every layer, as `counts_of` gives them.
        kinds: of attention, to be converted.
        asked: head counts that must not be there.

    Raises:
        RecipeError: the counts are not possible, or not those of this model's layers.
    """
    if asked != HeadCounts(None, None, None):
        raise RecipeError("--allocation has the counts of every layer: leave out --q-groups, --kv-groups and --variant")
    heads, result = family.dimensions(config).heads, {}
    if set(counts) == {""} and len(kinds) == 1:
        counts = {next(iter(kinds)): counts[""]}
    if set(counts) != set(kinds):
        have = f"{', '.join(kinds)}: write {next(iter(kinds))}:8/4,… for each" if len(kinds) > 1 else next(iter(kinds))
        given = ", ".join(filter(None, counts)) or "no kind of attention by name"
        raise RecipeError(f"--allocation is of {given}: what is converted is {have}")
    for kind in (kind for kind in site_kinds(family, config) if kind in kinds):
        sites = [site for site in family.sites(config) if site.kind == kind]
        if len(counts[kind]) != len(sites):
            raise RecipeError(f"--allocation: {len(counts[kind])} counts of {kind}, which has {len(sites)} layers")
        for site, (q_groups, kv_groups) in zip(sites, counts[kind], strict=True):
            check_head_counts(heads, q_groups, kv_groups)
            result[site] = q_groups, kv_groups
    return result
