"""Which heads go together in each attention site, and how many are kept: what is asked, checked against the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, shown
from ..families import Config, Family, Site
from ..heads import Partition, variant_heads

WAYS = ("searched", "contiguous")


@dataclass(frozen=True)
class HeadCounts:
    """How many heads are asked for."""

    q_groups: int | None
    kv_groups: int | None
    variant: str | None

    @property
    def complete(self) -> bool:
        """Whether they say both numbers."""
        return self.variant is not None or None not in (self.q_groups, self.kv_groups)

    def of(self, heads: int, kind: str, given: Partition | None) -> tuple[int, int]:
        """Hq and Hkv of a kind of attention, by what is asked or by the partition given for it. Raises RecipeError."""
        asked: tuple[int | None, int | None] = self.q_groups, self.kv_groups
        if self.variant is not None:
            if asked != (None, None):
                raise RecipeError("--variant sets both head counts: leave out --q-groups and --kv-groups")
            asked = variant_heads(self.variant, heads)
        if given is not None:
            counts = len(given.clusters), len(given.groups)
            flags = ("--q-groups", "query"), ("--kv-groups", "key/value")
            for (flag, what), number, kept in zip(flags, asked, counts, strict=True):
                if number not in (None, kept):
                    named = f"{flag} {number}" if self.variant is None else f"--variant {self.variant} ({number})"
                    raise RecipeError(f"{named}: the --partition of {kind} keeps {kept} {what} heads")
            return counts
        if asked == (None, None) and self.variant is None:
            raise RecipeError("give --q-groups and --kv-groups too, or --variant alone")
        for flag, number in (("--q-groups", asked[0]), ("--kv-groups", asked[1])):
            if number is None:
                raise RecipeError(f"give {flag} too, or --variant alone")
        return asked  # type: ignore[return-value]


def given_partitions(asked: Any, family: Family, config: Config, kinds: Collection[str]) -> dict[Site, Partition]:
    """The partitions given for single sites; empty where none is.

    Args:
        asked: None, one of `WAYS`, a partition for all sites of these kinds, or a table of partitions by "KIND" or
            "KIND.LAYER", of which the second wins.
        kinds: of attention, to be converted.

    Raises:
        RecipeError: it is none of these, names another site, or is of another number of heads.
    """
    if asked is None or (isinstance(asked, str) and asked in WAYS):
        return {}
    if not isinstance(asked, Partition | Mapping):
        raise RecipeError(f"--partition {shown(asked)}: choose {' or '.join(WAYS)}, or in Python give a Partition")
    table: dict[Any, Any] = dict.fromkeys(kinds, asked) if isinstance(asked, Partition) else dict(asked)
    sites = [site for site in family.sites(config) if site.kind in kinds]
    heads = family.dimensions(config).heads
    given: dict[Site, Partition] = {}
    for name, partition in sorted(table.items(), key=lambda item: "." in str(item[0])):
        named = [site for site in sites if name in (site.kind, site_name(site))]
        if not named:
            known = ", ".join(f"{kind}.0 … {max(s.layer for s in sites if s.kind == kind)}" for kind in kinds)
            raise RecipeError(f"--partition of {shown(name)}: what is converted is {', '.join(kinds)}: {known}")
        if not isinstance(partition, Partition):
            raise RecipeError(f"--partition of {name}: {shown(partition)} is no Partition")
        if partition.heads != heads:
            raise RecipeError(f"--partition of {name}: it is of {partition.heads} heads, the source has {heads}")
        given |= dict.fromkeys(named, Partition.identity(heads) if partition.is_identity else partition)
    return given


def planned_partitions(
    family: Family, config: Config, kinds: Collection[str], counts: HeadCounts, given: Mapping[Site, Partition]
) -> dict[Site, Partition]:
    """For each attention site of the model what is given, else neighbouring heads together; the identity where it is
    not of `kinds`.

    Raises:
        RecipeError: the counts are not possible, or not known for all sites.
    """
    heads = family.dimensions(config).heads
    used = counts.complete and any(site not in given for site in family.sites(config) if site.kind in kinds)
    result: dict[Site, Partition] = {}
    for kind in site_kinds(family, config):
        sites = [site for site in family.sites(config) if site.kind == kind]
        if kind not in kinds:
            result |= dict.fromkeys(sites, Partition.identity(heads))
            continue
        here = {site: given[site] for site in sites if site in given}
        if not (used and len(here) == len(sites)):
            others = _of_the_others(heads, kind, here, len(sites), counts, bool(given))
            here = dict.fromkeys(sites, others) | here
        result |= {site: here[site] for site in sites}
    return result


def _of_the_others(
    heads: int, kind: str, given: Mapping[Site, Partition], sites: int, counts: HeadCounts, elsewhere: bool
) -> Partition:
    """For the sites of a kind that none is given for; where each is given, that agrees with the counts asked for."""
    if elsewhere and not given and counts == HeadCounts(None, None, None):
        raise RecipeError(
            f"--partition is given for none of {kind}: give --q-groups and --kv-groups too, or leave {kind} out "
            "with --sites"
        )
    if not given or (len(given) < sites and counts.complete):
        return Partition.contiguous(heads, *counts.of(heads, kind, None))
    first, *more = given
    for site in more:
        if len(given) < sites and _kept(given[site]) != _kept(given[first]):
            raise RecipeError(
                f"--partition keeps {_kept(given[first])} heads in {site_name(first)} and {_kept(given[site])} in "
                f"{site_name(site)}: give --q-groups and --kv-groups too, for the layers it is not given for"
            )
    kept = [counts.of(heads, kind, partition) for partition in given.values()]
    return Partition.contiguous(heads, *kept[0])


def site_kinds(family: Family, config: Config) -> tuple[str, ...]:
    """The kinds of attention that a model has."""
    return tuple(dict.fromkeys(site.kind for site in family.sites(config)))


def site_name(site: Site) -> str:
    """How users name a site, by what report.json says of it: "decoder.3"."""
    return f"{site.kind}.{site.layer}"


def _kept(partition: Partition) -> str:
    return f"{len(partition.clusters)}/{len(partition.groups)}"
