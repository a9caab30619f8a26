"""What `auto` tries at every attention site, and for each site the best of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..conversion.convert_site import ConvertedSite, order
from ..conversion.plan import Plan
from ..errors import QualityError
from ..families import Site
from ..heads import AUTO, Method
from .fitter import OVERFLOW

CANDIDATES = {"svd": ("svd", True), "svd, contiguous": ("svd", False), "procrustes": ("procrustes", True)}
"""what `auto` chooses from: method, and whether the partition is searched"""


def candidates_of(plan: Plan) -> dict[str, tuple[str | Method, bool]]:
    """What is tried: method, and whether the partition is searched."""
    if plan.method != AUTO:
        return {plan.method: (plan.own_method or plan.method, plan.searched)}
    if plan.all_given:
        return {"svd": ("svd", False), "procrustes": ("procrustes", False)}
    candidates: dict[str, tuple[str | Method, bool]] = {
        name: candidate for name, candidate in CANDIDATES.items()
        if not plan.partition_given or candidate[1] == plan.searched
    }  # fmt: skip
    if plan.partition_given and not plan.searched:
        candidates["procrustes"] = ("procrustes", False)
    return candidates


def best_of_each(tried: Mapping[str, Mapping[Site, ConvertedSite]]) -> dict[Site, ConvertedSite]:
    """For each site the candidate with the least held-out error; of equals the first.

    Raises QualityError where none has an error that is a number.
    """
    sites = next(iter(tried.values()))
    best = {site: min((made[site] for made in tried.values()), key=lambda c: order(c.record.error)) for site in sites}
    for site, candidate in best.items():
        if not math.isfinite(candidate.record.error):
            raise QualityError(f"{site.kind} {site.layer}: no fit of its heads is finite: {OVERFLOW}")
    return best
