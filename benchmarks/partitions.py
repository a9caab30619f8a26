"""What groups found by their pairs cost beside the cheapest there are, which 12 heads allow to find.

    python benchmarks/partitions.py

Both samples, statistics from the weights alone, the cost summed over all sites. Writes
benchmarks/results/partitions.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import sqa_convert.heads.search as how
from sqa_convert.checkpoints.find import open_source
from sqa_convert.conversion.convert_site import read_norm, read_site
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.heads import Partition
from sqa_convert.heads.group_cost import CircuitGrams, GroupCost
from sqa_convert.heads.statistics import from_norms

RESULTS = Path(__file__).resolve().parent / "results" / "partitions.json"
HEADS = ((8, 4), (6, 3), (4, 2), (10, 5))


def main() -> None:
    found = {}
    most = how._MOST_COSTS
    for name in ("gpt2", "t5"):
        source = open_source(f"sample:{name}")
        for q, kv in HEADS:
            plan = make_plan(source, Request(q, kv, method="svd", calibration=None))
            total = {"cheapest": 0.0, "by pairs": 0.0, "neighbours": 0.0}
            for site in plan.sites:
                heads = read_site(plan, source, site).tensors()
                norms = [read_norm(plan, source, prefix) for prefix in plan.family.norms(site)]
                known = from_norms(heads, plan.family.attention(site, plan.source_config), *norms)
                generator = torch.Generator().manual_seed(0)
                cost = GroupCost(CircuitGrams(heads, known), q // kv, generator)
                partitions = {"cheapest": how.search(heads, known, q, kv, generator)}
                how._MOST_COSTS = 0  # as with many heads
                partitions["by pairs"] = how.search(heads, known, q, kv, generator)
                how._MOST_COSTS = most
                partitions["neighbours"] = Partition.contiguous(heads.query.shape[0], q, kv)
                for way, partition in partitions.items():
                    total[way] += sum(cost.costs(partition.groups))
            found[f"{name} {q}/{kv}"] = {way: round(value / total["cheapest"], 4) for way, value in total.items()}
            print(name, q, kv, found[f"{name} {q}/{kv}"], flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
