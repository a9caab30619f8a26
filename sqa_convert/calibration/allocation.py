"""How many heads each layer keeps, the same in total: more where the model's predictions need them.

What a layer loses at every number of heads comes in closed form from its statistics. A fit of the layer alone, put into
the source, says what such a loss costs the predictions. Dynamic programming finds the counts that cost the least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checkpoints.source import Source
from ..conversion.heads_by_layer import CountsByLayer, as_text
from ..conversion.plan import Plan, make_plan
from ..errors import QualityError
from ..families import Site
from ..heads import Partition
from ..heads.allocate import Counts, allocate, some_head_counts
from .fitter import SiteFitter
from .replaced_sites import Replacement

METHOD = "svd"
"""that layers are weighed with"""

_LEAST = 1e-12  # of a loss that others are held against


def site_costs(fitter: SiteFitter, site: Site, replacement: Replacement, asked: Counts) -> dict[Counts, float]:
    """What a site costs the predictions by its numbers of heads: KL of the source with it alone converted, estimated.

    It is measured at the counts that are asked for, and at others taken to follow the energy that is lost in closed
    form. Raises QualityError where it is not finite.
    """
    heads = len(fitter.heads.query)
    fitted = fitter.convert(METHOD, Partition.contiguous(heads, *asked), True, True)
    kl = replacement.kl({site: fitted.heads})
    if kl is None:
        raise QualityError(
            f"{site.kind} {site.layer}: converted alone it leaves nothing finite to predict; give --allocation uniform"
        )
    price = kl / max(fitter.loss(*asked), _LEAST)
    return {counts: price * fitter.loss(*counts) for counts in {asked: 0} | dict.fromkeys(some_head_counts(heads))}


def cheapest(costs: Mapping[Site, Mapping[Counts, float]], asked: Counts) -> CountsByLayer:
    """Counts of every layer, of each kind of attention as many in total as if each layer kept those asked for."""
    result = {}
    for kind in dict.fromkeys(site.kind for site in costs):
        layers = [of_counts for site, of_counts in costs.items() if site.kind == kind]
        result[kind] = tuple(allocate(layers, (asked[0] * len(layers), asked[1] * len(layers))))
    return result


def asked_evenly(plan: Plan) -> Counts:
    """The numbers of heads that every layer of a plan keeps."""
    return _kept(plan, plan.converted_sites[0])


def shared_out(costs: Mapping[Site, Mapping[Counts, float]], plan: Plan, source: Source) -> tuple[Plan, dict[str, Any]]:
    """A plan with heads shared out among the layers of each kind of attention, and a report of it.

    Args:
        costs: of the plan's converted sites, as `site_costs`.
        plan: whose layers all keep the same numbers of heads.
        source: what is converted.
    """
    evenly = asked_evenly(plan)
    counts = as_text(cheapest(costs, evenly))
    plan = make_plan(source, replace(plan.request, q_groups=None, kv_groups=None, variant=None, allocation=counts))
    alone = [
        {"kind": site.kind, "layer": site.layer, "evenly": kl[evenly], "kl": kl[_kept(plan, site)]}
        for site, kl in costs.items()
    ]
    return plan, {"counts": counts, "mean": list(evenly), "kl_alone": alone}


def _kept(plan: Plan, site: Site) -> Counts:
    partition = plan.partitions[site]
    return len(partition.clusters), len(partition.groups)
