"""What to do with a result, as commands: train it by a packaged recipe that fits, convert again with other heads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from .report_json import auto_class

PASSES = 5.0
"""times as long as measuring takes to train on a token: forwards, backwards, and the source's forwards, about"""

SHORT, LONG = 256, 1024
"""tokens of a sequence of the recipe for small models, and of those for the others"""

RECIPES = {
    "decoder": (("quick", 3e7, 300_000), ("gpt2-small", 2e8, 100_000_000), ("gpt2-medium", 1e9, 100_000_000)),
    "encoder": (("quick", 3e7, 300_000), ("t5-small", 1.5e8, 100_000_000), ("t5-base", 1e9, 100_000_000)),
}
"""packaged recipes of a kind of model: name, most parameters, tokens"""


def recipe_for(report: Mapping[str, Any]) -> tuple[str, float, int] | None:
    """A packaged recipe; None where the model's context is shorter than those of all."""
    kind = "encoder" if "Seq2Seq" in auto_class(dict(report)) else "decoder"
    parameters, fitting = report["cost"]["before"]["parameters"], RECIPES[kind]
    if kind == "decoder" and report["context_tokens"] < LONG:
        return fitting[0] if report["context_tokens"] >= SHORT else None
    return next((recipe for recipe in fitting if parameters <= recipe[1]), fitting[-1])


def how_long(report: Mapping[str, Any], recipe: tuple[str, float, int] | None) -> str:
    if recipe is None:
        return ""
    took = next((s["seconds"] for s in report.get("stages", []) if s["name"] == "evaluate source"), None)
    tokens = f"{recipe[2]:,} tokens"
    if not took:
        return tokens
    minutes = PASSES * recipe[2] * took / max(report["quality"]["tokens"], 1) / 60
    if minutes < 90:
        return f"{tokens}, about {max(1, round(minutes))} min on this machine"
    return f"{tokens}, about {minutes / 60:,.0f} h on this machine; a GPU is advised"


def training_command(report: Mapping[str, Any], recipe: tuple[str, float, int] | None, tokens: int = 0) -> str:
    """The command; none where no packaged recipe will do."""
    if recipe is None and not tokens:
        return ""
    named = f" --recipe {recipe[0]}" if recipe else ""
    more = f" --tokens {tokens}" if tokens else ""
    return f"sqa-uptrain {folder_of(report)}{named}{more}{_data(report)}"


def _data(report: Mapping[str, Any]) -> str:
    """The flag of the text that was measured on, where one was named."""
    try:
        words = shlex.split(report.get("command") or "")
    except ValueError:
        return ""
    for word, value in pairwise(words):
        if word == "--data":
            return f" --data {shlex.quote(value)}"
    return ""


def shared_out(report: Mapping[str, Any]) -> str:
    """Advice to share heads out among layers, where each layer of a kind was given as many."""
    kinds, done = [site["kind"] for site in report.get("sites", [])], report.get("calibration")
    if done is None or "allocation" in done or len(set(kinds)) == len(kinds) or not more_heads(report):
        return ""
    return "convert again with the same heads shared out among layers (--allocation adaptive), or "


def folder_of(report: Mapping[str, Any]) -> str:
    return shlex.quote(str(report.get("output") or "FOLDER"))


def more_heads(report: Mapping[str, Any]) -> str:
    """ "(--q-groups 10 --kv-groups 5)": half of what was given up; "" where kinds differ, or one is not converted."""
    cost = report["cost"]
    counts = [cost[side][key] for side in ("before", "after") for key in ("query_heads", "key_value_heads")]
    kinds = [set(map(str, count.values())) for count in counts]
    shared = (report.get("calibration") or {}).get("allocation", {})
    if any(len(kind) != 1 for kind in kinds[:2]):
        return ""
    q_before, kv_before, q_after, kv_after = counts
    everywhere = all((q_after[kind], kv_after[kind]) != (q_before[kind], kv_before[kind]) for kind in q_before)
    if shared.get("kept") and everywhere:
        kinds[2:] = ({str(mean)} for mean in shared["mean"])
    if any(len(kind) != 1 or "[" in next(iter(kind)) for kind in kinds):
        return ""
    heads, _, q, kv = (int(next(iter(kind))) for kind in kinds)
    more_kv = min(heads, kv + max(1, (heads - kv) // 4)) if kv < heads else kv
    more_q = -(-(q + heads) // 2 // more_kv) * more_kv
    more_q = min(more_q, heads // more_kv * more_kv)
    return f" (--q-groups {more_q} --kv-groups {more_kv})" if more_q >= q and (more_q, more_kv) != (q, kv) else ""
