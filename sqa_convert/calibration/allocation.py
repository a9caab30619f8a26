"""How many heads each layer keeps, the same in total: more where the model's predictions need them.

What a layer loses at every number of heads comes in closed form from its statistics. A fit of the layer alone, put into
the source, says what such a loss costs the predictions. Dynamic programming finds the counts that cost the least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.source import Source
from ..conversion.convert_site import ConvertedSite
from ..conversion.heads_by_layer import CountsByLayer, as_text
from ..conversion.plan import Plan, make_plan
from ..families import Site
from ..heads import AUTO
from ..heads.allocate import Counts, allocate, some_head_counts
from ..progress import step_done
from .fitter import SiteFitter
from .replaced_sites import Replacement

METHOD = "svd"
"""that layers are weighed with where several are tried"""

_LEAST = 1e-12  # of a loss that others are held against


def site_costs(fitter: SiteFitter, kl: float, asked: Counts) -> dict[Counts, float]:
    """What a site costs the predictions by its numbers of heads: KL of the source with it alone converted, estimated.

    Args:
        fitter: of the site.
        kl: of the source with the site alone converted to the counts that are asked for, by rounding perhaps below 0;
            at others it is taken to follow the energy that is lost in closed form.
        asked: Hq, Hkv.
    """
    counts = list({asked: 0} | dict.fromkeys(some_head_counts(len(fitter.heads.query))))
    losses = {}
    for done, some in enumerate(counts):
        step_done(0.5 + 0.5 * done / len(counts))
        losses[some] = fitter.loss(*some)
    price = max(kl, 0.0) / max(losses[asked], _LEAST)
    return {some: price * loss for some, loss in losses.items()}


def cheapest(costs: Mapping[Site, Mapping[Counts, float]], asked: Counts) -> CountsByLayer:
    """Counts of every layer, of each kind of attention as many in total as if each layer kept those asked for."""
    result = {}
    for kind in dict.fromkeys(site.kind for site in costs):
        layers = [of_counts for site, of_counts in costs.items() if site.kind == kind]
        result[kind] = tuple(allocate(layers, (asked[0] * len(layers), asked[1] * len(layers))))
    return result


@dataclass(frozen=True)
class SharedOut:
    """Heads that were shared out among layers, and what they are held against."""

    plan: Plan
    evenly: Plan
    """in which each layer of a kind keeps as many"""
    kl_evenly: float | None
    """of the source with all sites converted evenly, on the text that layers were weighed on"""
    replacement: Replacement
    told: dict[str, Any]
    """for the report"""

    def kept(self, fits: Mapping[Site, ConvertedSite]) -> bool:
        """Whether fits of the plan are nearer to the source than the even ones of one method that layers were weighed
        with; told."""
        kl = self.replacement.kl({site: fit.heads for site, fit in fits.items()})
        kept = kl is not None and (self.kl_evenly is None or kl < self.kl_evenly)
        self.told.update(kl=kl, kl_evenly=self.kl_evenly, kept=kept)
        return kept


def weigh(
    fitter: SiteFitter, site: Site, replacement: Replacement, plan: Plan, refit: bool
) -> tuple[ConvertedSite, dict[Counts, float] | None]:
    """A site converted evenly, and what it costs by its numbers of heads; None where not all of that is finite.

    Args:
        fitter: of the site.
        replacement: the source, to put the converted site into.
        plan: whose layers all keep the same numbers of heads.
        refit: whether to weigh with the output projection fitted.
    """
    step_done()
    method = plan.own_method or (METHOD if plan.method == AUTO else plan.method)
    made = fitter.convert(method, plan.partitions[site], plan.searched, refit)
    kl = replacement.kl({site: made.heads})
    costs = {} if kl is None else site_costs(fitter, kl, _kept(plan, site))
    return made, costs if costs and all(map(math.isfinite, costs.values())) else None


def shared_out(
    weighed: Mapping[Site, tuple[ConvertedSite, Mapping[Counts, float] | None]],
    replacement: Replacement,
    plan: Plan,
    source: Source,
) -> SharedOut | None:
    """Heads shared out among the layers of each kind of attention; None where they would lie as they do, or where not
    all that a layer costs is finite.

    Args:
        weighed: of the plan's converted sites, as `weigh`.
        replacement: the source, to put converted sites into.
        plan: whose layers all keep the same numbers of heads.
        source: what is converted.
    """
    evenly = _kept(plan, plan.converted_sites[0])
    costs = {site: of_site for site, (_, of_site) in weighed.items() if of_site is not None}
    if len(costs) < len(weighed):
        return None
    counts = cheapest(costs, evenly)
    if all(kept == evenly for layers in counts.values() for kept in layers):
        return None
    asked = replace(plan.request, q_groups=None, kv_groups=None, variant=None, allocation=as_text(counts))
    shared = make_plan(source, asked)
    alone = [
        {"kind": site.kind, "layer": site.layer, "evenly": kl[evenly], "kl": kl[_kept(shared, site)]}
        for site, kl in costs.items()
    ]
    told = {"counts": as_text(counts), "mean": list(evenly), "kl_alone": alone}
    kl = replacement.kl({site: made.heads for site, (made, _) in weighed.items()})
    return SharedOut(shared, plan, kl, replacement, told)


def _kept(plan: Plan, site: Site) -> Counts:
    partition = plan.partitions[site]
    return len(partition.clusters), len(partition.groups)
