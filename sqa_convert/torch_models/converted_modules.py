"""`ConvertedModules`: a converted model and what became of each of its attentions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_STAGES = ("converted", "refit", "refined")


@dataclass(repr=False)
class ConvertedModules:
    """What `convert_modules` returns; printed it is a table."""

    model: nn.Module
    """the converted model"""
    report: dict[str, Any]
    """"modules", one entry for each that was converted, with "module" its name, "heads", "query_heads",
    "key_value_heads", "method", "partition", "errors" of its output on held-out batches after each stage, as a share of
    its variance, and "error" of the stage that was kept; "kept", by name why others stay; "parameters" "before" and
    "after"; "calibration", what there was of it, or None; "output_error" and "output_error_of_mean", squared error of
    the model's output on held-out batches as a share of its variance, of the result and of averaged heads; "warnings"
    """

    def __repr__(self) -> str:
        rows = [("module", "heads", "error", "method")]
        for entry in self.report["modules"]:
            heads = f"{entry['heads']} → {entry['query_heads']}/{entry['key_value_heads']}"
            rows.append((entry["module"] or "(model)", heads, _share(entry["error"]), entry["method"]))
        rows += [(name, "", "", f"stays: {why}") for name, why in self.report["kept"].items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
        before, after = self.report["parameters"].values()
        lines.append(f"parameters: {before:,} → {after:,} ({after / before:.2f}×)")
        if self.report["output_error"] is not None:
            error, mean = _share(self.report["output_error"]), _share(self.report["output_error_of_mean"])
            lines.append(f"error of the output on held-out batches: {error}; of averaged heads: {mean}")
        return "\n".join([f"{type(self.model).__name__} with fewer heads", *lines, *self.report["warnings"]])


def _share(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"
