"""What the numbers of a report mean, and what to do next: two sentences by rules that stand here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .formatting import nats, perplexity
from .next_steps import folder_of, how_long, more_heads, recipe_for, shared_out, training_command
from .report_json import NEXT_TO_NOTHING, auto_class

LITTLE = 0.02
"""share of the source's own loss that loss or KL may come to in a model that is nearly as good"""

MUCH = 0.1
"""share of the source's loss above which uptraining alone is a long way"""

SURE = 2.0
"""standard errors that a difference must have to be one"""

FEW_DOCUMENTS = 8
"""of fewer nobody knows how far they are from each other"""

BAD_TEXT = ("unknown", "guessing", "counting", "own_text", "source_beaten")
"""rules of `sqa_convert.text.suitability` that leave nothing of a measurement"""

NAIVE = ("mean", "first", "select")
"""methods that fit nothing"""

_MEASURED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding")
"""classes whose models sqa-eval measures"""


@dataclass(frozen=True)
class Verdict:
    """A report in two sentences."""

    case: str
    """no_text, bad_text, other_text, worse, noise, good, fair or bad"""
    lost: str
    """how much was lost, and whether that is inside the noise"""
    gained: str
    """what it gains on this machine, or by count"""
    next: str
    """what to do"""
    command: str = ""
    """that does it, for a shell"""

    @property
    def text(self) -> str:
        return f"{self.lost} {self.gained}"


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report."""
    case = _case(report)
    say = {"no_text": _no_text, "bad_text": _bad_text, "other_text": _other_text}.get(case, _measured)
    lost, then, command = say(report, case)
    return Verdict(case, lost, _gained(report), then, command)


def last_quality(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of the weights as they are now; None where nothing was."""
    quality = report.get("quality", {})
    row: dict[str, Any] | None = quality.get("uptrained" if "uptraining" in report else "converted")
    return row


def sure(difference: float | None, error: float | None) -> bool:
    """Whether a difference is one: more than two standard errors, and not next to nothing where there are none."""
    if difference is None:
        return False
    return abs(difference) > (NEXT_TO_NOTHING if error is None else SURE * error)


def _case(report: Mapping[str, Any]) -> str:
    row, quality = last_quality(report), report.get("quality", {})
    if row is None or row.get("loss") is None or row.get("kl") is None or "source" not in quality:
        return "no_text"
    rules = {doubt["rule"] for doubt in quality.get("warnings", [])}
    if rules.intersection(BAD_TEXT):
        return "bad_text"
    change = row.get("gain", {})
    if change.get("kl", 0) < 0 and sure(change["kl"], change.get("kl_error")) and change.get("loss", 0) < 0:
        return "worse"
    cost = max(above(report), row["kl"])
    share = cost / max(quality["source"]["loss"], 1e-9)
    if cost > NEXT_TO_NOTHING and share > LITTLE:
        elsewhere = "fitted_elsewhere" in rules and "uptraining" not in report
        return "other_text" if elsewhere else "fair" if share <= MUCH else "bad"
    return "good" if sure(above(report), row.get("loss_error")) else "noise"


def above(report: Mapping[str, Any]) -> float:
    """Loss above the source's, nats a token."""
    row = last_quality(report)
    assert row is not None
    return float(row["loss"] - report["quality"]["source"]["loss"])


def _no_text(report: Mapping[str, Any], case: str) -> tuple[str, str, str]:
    row = last_quality(report)
    if row is not None and row.get("error") is not None:
        mean = report["quality"].get("mean", {}).get("error")
        beside = "" if mean is None else f"; with heads averaged {mean:.2%}"
        lost = f"The hidden state differs by {row['error']:.2%} of its variance{beside}, mean vectors have a cosine of"
        then = "use it where its source was, and compare"
        if "uptraining" not in report:
            then += f"; sqa-uptrain {folder_of(report)} --recipe encoder --data TEXT brings it nearer"
        return f"{lost} {row['cosine']:.4f}.", then, ""
    if row is not None:
        return "What was measured is not the loss on text.", "use it on your task, and compare", ""
    why = f": {report['not_measured']}" if report.get("not_measured") else ""
    if auto_class(dict(report)) not in _MEASURED:
        return f"Nothing was measured{why or ', for it predicts no text'}.", "measure it on your task", ""
    lost = f"Nothing was measured{why}: how much was lost is not known."
    return lost, "give text: measure it", f"sqa-eval {folder_of(report)} --data TEXT"


def _bad_text(report: Mapping[str, Any], case: str) -> tuple[str, str, str]:
    doubt = next(d for d in report["quality"]["warnings"] if d["rule"] in BAD_TEXT)
    lost = f"This text says nothing of the model: {doubt['text'].partition(';')[0]}."
    return lost, "give text of the model's own kind: measure again", f"sqa-eval {folder_of(report)} --data TEXT"


def _other_text(report: Mapping[str, Any], case: str) -> tuple[str, str, str]:
    lost = f"{_numbers(report, 'Its heads were fitted to other text than this, and here it lost')}."
    return lost, "convert again, with this text to fit to (--calibration, or --data)", ""


_HEADINGS = {
    "noise": "What it lost cannot be told from noise",
    "good": "It predicts nearly as well as its source",
    "fair": "It lost a little",
    "bad": "It lost much",
    "worse": "Uptraining made it worse",
}


def _measured(report: Mapping[str, Any], case: str) -> tuple[str, str, str]:
    lost = f"{_numbers(report, _HEADINGS[case])}."
    recipe = recipe_for(report)
    more = f"convert again with more heads{more_heads(report)}"
    uptrain = f"uptrain: {how_long(report, recipe)}"
    if recipe is None:
        uptrain = f"uptrain, by a recipe file of sequence_length {report['context_tokens']}"
    if case in ("noise", "good"):
        return lost, "use it", ""
    if case == "worse":
        return lost, "convert again, and train with a smaller learning rate", ""
    if case == "bad" and report["method"] in NAIVE:
        return lost, f"convert again without --method {report['method']}: heads that are fitted lose less", ""
    if "uptraining" in report:
        longer = 4 * int(report["uptraining"]["tokens"])  # by the default recipe where it fits
        if case == "fair":
            return lost, "use it, or train longer", training_command(report, None, longer)
        return lost, f"{more}, or train longer", training_command(report, None, longer)
    if case == "bad" and report["method"] != "auto" and "calibration" not in report:
        return lost, "convert again with calibration: heads that are fitted to text lose less", ""
    if case == "bad":
        return lost, f"{more}, {shared_out(report) or 'or '}{uptrain}", training_command(report, recipe)
    return lost, f"{shared_out(report)}{uptrain}", training_command(report, recipe)


def _numbers(report: Mapping[str, Any], heading: str) -> str:
    quality, row = report["quality"], last_quality(report)
    assert row is not None
    loss = plus_minus(above(report), row.get("loss_error"), "+")
    ppl = f"perplexity {perplexity(quality['source']['perplexity'])} → {perplexity(row['perplexity'])}"
    text = f"{heading}: loss {loss} nats a token ({ppl}), KL {plus_minus(row['kl'], row.get('kl_error'))}"
    documents = quality.get("documents")
    if documents is None:
        return text
    few = ", too few to be sure" if documents < FEW_DOCUMENTS else ""
    return f"{text}, on {documents:,} document{'s' if documents != 1 else ''}{few}"


def longest_prefill(report: Mapping[str, Any]) -> str:
    """ "1.19×" of the longest prefill of the whole model that was measured; nothing where none was."""
    rows = [row for row in _speed_rows(report) if row["mode"] == "prefill"]
    return f"{max(rows, key=lambda row: row['length'])['speedup']['median']:.2f}×" if rows else ""


def _speed_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of whole models beside the first."""
    speed = report.get("speed") or {"rows": [], "heads": {}}
    first = next(iter(speed["heads"]), None)
    return [r for r in speed["rows"] if r.get("speedup") and r["part"] == "model" and r["model"] != first]


def plus_minus(value: float, error: float | None, sign: str = "") -> str:
    """A figure and its standard error, where that is known."""
    shown = nats(value, sign)
    return shown if error is None or shown.startswith(("over", "under")) else f"{shown} ± {error:.4f}"


def _gained(report: Mapping[str, Any]) -> str:
    cost = report["cost"]
    before, after = cost["before"], cost["after"]
    names = {
        "kv_cache_bytes_per_token": "the cache",
        "score_flops": "the T² arithmetic",
        "parameters": "the parameters",
    }
    counted = [f"{after[key] / before[key]:.2f}× {name}" for key, name in names.items() if before.get(key)]
    by_count = f"By count it needs {', '.join(counted)}"
    ran = _measured_speed(report)
    return f"{by_count}; {ran}." if ran else f"{by_count}; how fast it runs here was not measured (sqa-bench)."


def _measured_speed(report: Mapping[str, Any]) -> str:
    """Of the longest prefill, or else the longest of what was measured of whole models."""
    rows = _speed_rows(report)
    if not rows:
        return ""
    row = max(rows, key=lambda row: (row["mode"] == "prefill", row["length"]))
    speed, spread = row["speedup"], ""
    if speed["low"] <= 1 <= speed["high"]:
        spread = ", which is no difference"
    return f"measured here, {row['mode']} at {row['length']:,} tokens runs {speed['median']:.2f}× as fast{spread}"
