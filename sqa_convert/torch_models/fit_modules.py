"""The attentions of a model fitted to what they do on batches, or from their weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calibration.candidates import best_of_each
from ..calibration.fisher import SENSITIVITY_TOKENS
from ..calibration.fitter import SiteFitter
from ..conversion.convert_site import ConvertedSite, SiteRecord
from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import QualityError
from ..families import Site
from ..heads import Partition
from ..heads.search import search
from ..heads.site_inputs import Inputs
from ..layers.multihead_weights import attention_of, heads_of, white
from ..layers.sparse_query_attention import SparseQueryAttention
from ..progress import Progress
from ..random_generators import generator_for
from .asked_conversion import Asked
from .find_attention import Attentions
from .output_error import output_errors
from .output_sensitivity import output_sensitivity
from .run_batches import Runner
from .take_batches import HELD_OUT, Batches
from .watch_calls import Seen, in_groups, watch_calls

BLIND_METHOD = "svd"
"""what "auto" is without batches"""

STAGES = ("measure sensitivity", "fit heads")
"""of a fit to batches"""

_MEASURED = ("calibration", "output_error", "output_error_of_mean")


@dataclass
class FittedModules:
    """What takes the place of attentions, and how it came about."""

    layers: dict[str, SparseQueryAttention] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """attentions that stay, and why"""
    measured: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_MEASURED) | {"warnings": []})

    def add(self, name: str, module: nn.MultiheadAttention, converted: ConvertedSite) -> None:
        record = converted.record
        self.layers[name] = SparseQueryAttention.with_heads(module, converted.heads)
        entry = {"module": name, "heads": module.num_heads, "query_heads": len(record.partition.clusters)}
        entry |= {"key_value_heads": len(record.partition.groups), "method": record.method}
        entry |= {"partition": record.partition.groups, "errors": record.errors}
        self.entries.append(entry | {"error": record.error if record.errors else None})

    @property
    def report(self) -> dict[str, Any]:
        return {"modules": self.entries, **self.measured}


def fit_blindly(asked: Asked, planned: Mapping[str, Partition], attentions: Attentions) -> FittedModules:
    """From the weights alone; inputs are taken as white."""
    fitted = FittedModules()
    for name, module in attentions.items():
        heads, partition = heads_of(module), planned[name]
        candidates = asked.candidates(name)
        method, searched = candidates.get(BLIND_METHOD) or next(iter(candidates.values()))
        if partition.is_identity:
            fitted.add(name, module, ConvertedSite(heads, SiteRecord("none", partition)))
            continue
        statistics = white(heads)
        if searched:
            counts = len(partition.clusters), len(partition.groups)
            partition = search(heads, statistics, *counts, torch.Generator().manual_seed(0))
        merged = method.merged(heads, partition, statistics)
        fitted.add(name, module, ConvertedSite(merged, SiteRecord(method.name, partition)))
    return fitted


def fit_to_batches(
    asked: Asked,
    planned: Mapping[str, Partition],
    attentions: Attentions,
    runner: Runner,
    batches: Batches,
    seed: int,
    progress: Progress,
) -> FittedModules:
    """By what they do on batches, as a checkpoint's attentions are: the best candidate of each, refitted and refined.

    Raises QualityError where no fit is finite.
    """
    fitted = FittedModules()
    called = {name: module for name, module in attentions.items() if batches.sizes[name]}
    fitted.kept = {name: "no batch reaches it" for name in attentions if name not in called}
    progress(STAGES[0], 0, 1)
    metrics = output_sensitivity(runner, called, _some(batches, called), generator_for("sensitivity", seed))
    progress(STAGES[0], 1, 1)
    names, fewest = list(called), torch.inf
    positions = [0, 0]
    for name, module, seen in _watched(runner, called, batches):
        progress(STAGES[1], names.index(name), len(names))
        causal = all(part.causal for part in seen)
        inputs = _parts([part.inputs(causal) for part in seen])
        counts = [sum(one.positions for one in part) for part in inputs]
        if any(part.masks_differ for part in seen) or not all(counts):
            differ = any(part.masks_differ for part in seen)
            fitted.kept[name] = "its masks differ by head" if differ else "nothing that it reads counts"
            continue
        if not all(
            bool(read.isfinite().all()) for part in inputs for one in part for read in (one.x, one.keys, one.read)
        ):
            raise QualityError(f"{name or 'the module'}: what it reads on the batches is not finite")
        positions = [max(pair) for pair in zip(positions, counts, strict=True)]
        fewest = min(fewest, counts[0] / (len(planned[name].clusters) * module.head_dim + 1))
        fitter = SiteFitter(
            attention_of(module, causal), heads_of(module), *inputs, metrics.get(name), runner.device,
            generator_for(name, seed),
        )  # fmt: skip
        site = Site("module", names.index(name), name)
        if planned[name].is_identity:
            fitted.add(name, module, ConvertedSite(heads_of(module), SiteRecord("none", planned[name])))
            continue
        tried = {
            candidate: {site: fitter.convert(method, planned[name], searched, asked.with_refit)}
            for candidate, (method, searched) in asked.candidates(name).items()
        }
        best = best_of_each(tried)[site]
        fitted.add(name, module, fitter.refine(best, asked.steps) if asked.steps else best)
    progress(STAGES[1], len(names), len(names))
    fitted.measured["calibration"] = {
        "batches": len(batches.fitted) + (0 if batches.single else len(batches.held_out)),
        "positions": positions[0], "held_out_positions": positions[1], "refit": asked.with_refit,
        "refine_steps": asked.steps,
    }  # fmt: skip
    if fewest < TOKENS_PER_UNKNOWN:
        fitted.measured["warnings"].append(
            f"{fewest:.1f} calibration positions for each unknown of a fit, {TOKENS_PER_UNKNOWN} are advised: "
            "give more batches"
        )
    fitted.measured |= output_errors(runner, {called[n]: layer for n, layer in fitted.layers.items()}, batches.held_out)
    return fitted


def _watched(
    runner: Runner, attentions: Attentions, batches: Batches
) -> Iterator[tuple[str, nn.MultiheadAttention, list[Seen]]]:
    """Each attention with what it reads on the fitted and on the held-out batches; of a single batch once."""
    for group in in_groups(attentions, batches.sizes):
        parts = [batches.fitted] if batches.single else [batches.fitted, batches.held_out]
        seen = [watch_calls(runner, group, part) for part in parts]
        for name, module in group.items():
            yield name, module, [part.pop(name) for part in seen]


def _parts(given: list[list[Inputs]]) -> tuple[list[Inputs], list[Inputs]]:
    """What is fitted and what is held out. Where all is of one part, the last tenth of its sequences, at least one, is
    held out; a single sequence is both."""
    if len(given) == 2 and all(given):
        return given[0], given[1]
    inputs = [one for part in given for one in part]
    total = sum(map(len, inputs))
    if total == 1:
        return inputs, inputs
    left = total - max(1, total // HELD_OUT)
    fitted, held_out = [], []
    for one in inputs:
        if left > 0:
            fitted.append(one[:left])
        if left < len(one):
            held_out.append(one[max(0, left) :])
        left -= len(one)
    return fitted, held_out


def _some(batches: Batches, attentions: Attentions) -> list[Any]:
    """As many of the batches as gradients are looked at of."""
    widths = sum(module.embed_dim for module in attentions.values()) / len(attentions)
    largest = max(batches.sizes[name] for name in attentions) / 4 / widths  # positions of all, at most
    share = min(1.0, SENSITIVITY_TOKENS / largest)
    return batches.fitted[: max(1, round(share * len(batches.fitted)))]
