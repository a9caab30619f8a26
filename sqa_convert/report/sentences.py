"""A report in sentences: calibration, uptraining, what was recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..heads import METHODS
from .formatting import nats
from .report_json import NEXT_TO_NOTHING, auto_class
from .speed_table import speed_sentence, speed_title
from .tables import heads_by_layer
from .verdict import sure, verdict


def presented(report: dict[str, Any]) -> dict[str, Any]:
    """What the card and the page both say of a report."""
    speed = report.get("speed")
    name = result_name(report)
    return {
        "report": report,
        "name": name,
        "literal": literal(name),
        "auto": auto_class(report),
        "how": [*source_lines(report), *heads_lines(report), *calibration_lines(report)],
        "doubts": quality_lines(report),
        "verdict": verdict(report),
        "uptraining": uptraining_lines(report),
        "speed_title": speed_title(speed) if speed else "",
        "speed_said": speed_sentence(speed) if speed else "",
    }


def result_name(report: dict[str, Any]) -> str:
    """What the card and the page call the result."""
    return Path(report["output"] or report["source"]["name"]).name


def literal(text: str) -> str:
    """A name as it stands in a program."""
    return f'"{text}"' if text.isprintable() and not set(text) & set('"\\') else repr(text)


def recovered(quality: dict[str, Any], key: str) -> float | None:
    """Share of the damage in "loss" or "kl" that uptraining took back: 1 is all of it. None where conversion cost next
    to nothing, of which there is no share."""
    if "uptrained" not in quality:
        return None
    start = quality["source"][key] or 0.0  # the source has no KL to itself
    damage = quality["converted"][key] - start
    return None if damage < NEXT_TO_NOTHING else (quality["converted"][key] - quality["uptrained"][key]) / damage


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """What calibration did, in sentences; none where there was none."""
    done = report.get("calibration")
    if done is None:
        blind = report["method"] in METHODS and METHODS[report["method"]].needs_statistics
        return ["converted from the weights alone, fitted to no text"] if blind else []
    lines = [f"warning: {doubt['text']}" for doubt in done.get("warnings", [])]
    lines.append(f"fitted on {done['tokens']:,} tokens, chosen on {done['held_out_tokens']:,} more: {done['text']}")
    if "allocation" in done:
        lines.append(_allocation(done["allocation"]))
    if "kl_before_refine" in done:
        kl = sorted(done["kl_before_refine"].items(), key=lambda item: item[1])
        tried = " · ".join(f"{name} {value:.4f}" for name, value in kl)
        lines.append(f"chosen: {done['chosen']}; KL on the tokens to choose by, before refining: {tried}")
    if "kl" in (polish := done.get("polish", {})):
        kept = "kept" if polish["kept"] else "left out, as it did not lower the KL everywhere"
        pairs = zip(polish["kl_before"], polish["kl"], strict=True)
        changes = " · ".join(f"{_kl(before)} → {_kl(after)}" for before, after in pairs)
        lines.append(f"polished in {polish['steps']} steps, {kept}: KL on the tokens to choose by {changes}")
    elif polish.get("steps") == 0 and "why" in polish:
        lines.append(f"not polished: {polish['why']}")
    for site in report["sites"]:
        errors = site.get("output_error", {})
        last = next(reversed(errors), None)
        if last is not None and site["kept"] != last:
            lines.append(
                f"{site['kind']} {site['layer']}: {last} would be worse on held-out text "
                f"({errors[last]:.4f}), kept as {site['kept']} ({errors[site['kept']]:.4f})"
            )
    return lines


def _allocation(done: dict[str, Any]) -> str:
    """Why layers keep different numbers of heads."""
    evenly = "/".join(map(str, done["mean"]))
    sites = sorted(done["kl_alone"], key=lambda site: site["evenly"])
    least, most = sites[0], sites[-1]
    told = (f"{site['kind']} {site['layer']} {site['evenly']:.4f}" for site in (least, most))
    if not done.get("kept", True):
        return f"each layer keeps {evenly} heads: shared out among layers ({done['counts']}) they would not lose less"
    return f"heads shared out by the KL that a layer alone costs, with {evenly} heads in each from {' to '.join(told)}"


def uptraining_lines(report: dict[str, Any]) -> list[str]:
    """What uptraining did, in sentences; none where there was none."""
    done, quality = report.get("uptraining"), report.get("quality", {})
    if done is None:
        return []
    speed = f"{done['tokens']:,} tokens in {report['seconds']['uptrain']:g} s on {done['device']}"
    loss = "squared error to the source's hidden states" if done["loss"] == "hidden" else done["loss"]
    lines = [f"uptrained by {loss} on {speed}, {done['tokens_per_second']:,} tokens/s"]
    if "mfu" in done:
        lines[0] += f", MFU {done['mfu']:.1%}"
    if "kept" in done:
        lines[0] += f"; kept: {done['kept']}"
    if "skipped_rows" in done:
        lines[0] += f"; {done['skipped_rows']:,} rows without text skipped"
    if "uptrained" in quality:
        lines += _taken_back(quality)
    if "control" in quality:
        loss = quality["uptrained"]["loss"]
        above = {name: nats(loss - quality[name]["loss"], "+") for name in ("source", "control")}
        tokens = done.get("kept_steps", done["steps"]) * done["sequence_length"] * done["batch_size"]
        lines.append(
            f"loss against the source's {above['source']}, against the control's {above['control']} "
            f"(control: the source trained on the same {tokens:,} tokens)"
        )
    return lines


def _taken_back(quality: dict[str, Any]) -> list[str]:
    """What uptraining took back, as shares of what conversion had cost where both are more than noise."""
    before, after = quality["converted"], quality["uptrained"]
    if "error" in after:
        less = _share((before["error"] - after["error"]) / max(before["error"], 1e-12))
        return [f"uptraining took back {less} of the error of the hidden state that conversion had cost"]
    gain, back, worse = after.get("gain", {}), [], False
    for name in ("loss", "KL"):
        key, start = name.lower(), quality["source"][name.lower()] or 0.0
        better = gain.get(key, before[key] - after[key])
        told = sure(better, gain.get(f"{key}_error")) and sure(before[key] - start, before.get(f"{key}_error"))
        share = recovered(quality, key) if told else None
        if share is not None:
            back.append(f"{_share(share)} of the {name}")
            worse |= share < 0
    if not back:
        return ["what uptraining changed cannot be told from noise"]
    lines = [f"uptraining took back {' and '.join(back)} that conversion had cost"]
    return [*lines, "less than nothing: more tokens or a smaller learning rate are needed"] if worse else lines


def _kl(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _share(share: float) -> str:
    """What is beyond all of the damage, or below none of it, is no share of it."""
    return "all" if share >= 1 else "none" if share <= 0 else f"{share:.1%}"


def halves_sentence(sites: Sequence[Mapping[str, Any]]) -> str:
    """Which half of attention costs more; nothing where that was not measured."""
    found = [site["half_errors"] for site in sites if len(site.get("half_errors", {})) == 2]
    dearer = sum(errors["patterns"] > errors["values"] for errors in found)
    if not found:
        return ""
    which, many = ("Patterns", dearer) if 2 * dearer >= len(found) else ("Values", len(found) - dearer)
    return f"{which} cost more in {many} of {len(found)} attention layer{'s' if len(found) > 1 else ''}."


def source_lines(report: dict[str, Any]) -> list[str]:
    """What there is to know of how the source was taken, in sentences; mostly nothing."""
    return [str(note) for note in report["source"].get("notes", [])]


def heads_lines(report: dict[str, Any]) -> list[str]:
    """How many heads each layer has, in sentences; none where the layers of each kind of attention are alike."""
    by_layer, cost = heads_by_layer(report), report["cost"]
    if all(cost["before"][key] == cost["after"][key] for key in ("query_heads", "key_value_heads")):
        return ["every head was kept: this is the source again, no smaller and no faster"]
    if not by_layer:
        return []
    shown = "; ".join(
        f"{kind} {', '.join(counts)}" if len(report["cost"]["after"]["query_heads"]) > 1 else ", ".join(counts)
        for kind, counts in by_layer.items()
    )
    return [
        f"query/key-value heads by layer: {shown}",
        "transformers loads it; an engine that reads one number of heads for all layers needs --allocation uniform",
    ]


def quality_lines(report: dict[str, Any]) -> list[str]:
    """Why not to trust what was measured, or why nothing was, in sentences."""
    lines = [f"warning: {doubt['text']}" for doubt in report.get("quality", {}).get("warnings", [])]
    return [*lines, f"not measured: {report['not_measured']}"] if "not_measured" in report else lines


def left_lines(report: dict[str, Any]) -> list[str]:
    """Which files of the source's folder the result does not have, in a sentence; none where it has all."""
    left = report["source"].get("left_behind")
    return [f"left behind of the source's folder: {', '.join(left)}"] if left else []
