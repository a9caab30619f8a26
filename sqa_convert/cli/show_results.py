"""What the commands show of a report: tables, sentences, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..conversion.plan import Plan
from ..errors import OutputError
from ..report.page import PAGE
from ..report.report_json import auto_class
from ..report.sentences import (
    calibration_lines,
    heads_lines,
    left_lines,
    literal,
    quality_lines,
    source_lines,
    uptraining_lines,
)
from ..report.tables import costs, quality_rows, quality_table
from ..report.verdict import verdict
from .console import Out


def plan_line(plan: Plan, source: str, target: Path) -> str:
    """What a conversion is going to do."""
    pairs = {(len(plan.partitions[site].clusters), len(plan.partitions[site].groups)) for site in plan.converted_sites}
    shown = " or ".join(f"{q} query and {kv} key/value heads" for q, kv in sorted(pairs)[:2])
    kept = "every head stays" if not pairs else f"{plan.dimensions.heads} heads become {shown}"
    more = ", by layer" if len(pairs) > 1 else " on average" if plan.shares_out else ""
    return f"{source} → {target}, {kept}{more}, method {plan.method}"


def show_plan(out: Out, plan: Plan, report: dict[str, Any]) -> None:
    """What a conversion would write."""
    shards = {
        file: [
            {"name": t.name, "shape": t.shape, "dtype": t.dtype, "from": getattr(t.origin, "prefix", t.origin)}
            for t in tensors
        ]
        for file, tensors in plan.shards.items()
    }
    out.json(report | {"shards": shards})
    out.table(f"{report['source']['name']} → {report['output']} (not written)", *costs(report))
    for line in (*source_lines(report), *left_lines(report), *heads_lines(report)):
        out.words(line)
    if plan.shares_out:
        out.words("heads of each layer on average; how many each keeps is found on text")
    for file, tensors in plan.shards.items():
        out.result(f"{file}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e6:,.1f} MB")
        if out.verbose:
            for t in tensors:
                out.result(f"  {t.name} {list(t.shape)} {t.dtype} ← {getattr(t.origin, 'prefix', t.origin)}")


def show_conversion(out: Out, report: dict[str, Any], target: Path) -> None:
    """What a conversion did, what its result is worth, and what to do with it."""
    out.json(report)
    out.table(f"{report['source']['name']} → {target}", *costs(report))
    for line in (*source_lines(report), *left_lines(report), *heads_lines(report), *calibration_lines(report)):
        out.words(line)
    show_quality(out, report)
    show_report(out, target)
    show_verdict(out, report, target)


def show_quality(out: Out, report: dict[str, Any]) -> None:
    """What was measured, and what uptraining did."""
    for line in quality_lines(report):
        out.words(line)
    quality = report.get("quality")
    if quality and quality_table(report)[1]:
        out.table(f"on {quality['tokens']:,} tokens of {quality['data']}", *quality_table(report))
    for line in uptraining_lines(report):
        out.words(line)
    out.words(f"seconds: {', '.join(f'{stage} {seconds:g}' for stage, seconds in report['seconds'].items())}")
    if out.verbose:
        for done in (report, report.get("uptraining", {})):
            for stage in done.get("stages", []):
                out.result(f"  {stage['name']} {stage['seconds']:g}")


def show_evaluation(out: Out, result: dict[str, Any]) -> None:
    """What was measured of one model or two, what they write, and their scores on tasks."""
    models: dict[str, str] = result["models"]  # names by the keys of the rest
    quality = result["quality"]
    out.json(result)
    for line in quality_lines(result):
        out.words(line)
    title = f"on {quality['tokens']:,} tokens of {quality['data']}"
    out.table(title, *quality_rows({name: quality[key] for key, name in models.items()}))
    for text in result["samples"]:
        out.words(f"\n[given] {text['given']}")
        for key, name in models.items():
            out.words(f"[{name}] {text[key]}")
    if scores := result.get("tasks"):
        tasks = sorted({task for of_model in scores.values() for task in of_model})
        rows = [(task, *(f"{scores[key][task]:.4f}" for key in models)) for task in tasks]
        out.table("tasks", ["", *models.values()], rows)


def show_report(out: Out, folder: Path) -> None:
    """Where the report lies as a page."""
    out.result(f"report: {folder / PAGE}")


def show_verdict(out: Out, report: dict[str, Any], folder: Path) -> None:
    """What it means, and what to do next."""
    said = verdict(report)
    out.words(said.text)
    load = f"{auto_class(report)}.from_pretrained({literal(str(folder))}, trust_remote_code=True)"
    out.words(f"next: {said.next}")
    if said.case in ("noise", "good") or not said.command:
        out.result(f"  {load}")
    if said.command:
        out.result(f"  {said.command}")


def push(out: Out, folder: Path, repo_id: str | None, public: bool) -> None:
    """Uploads a complete output folder if `repo_id` is given."""
    if repo_id is not None:
        from ..publish import push_to_hub

        try:
            address = push_to_hub(folder, repo_id, private=not public)
        except OutputError as error:
            again = f"hf upload {'' if public else '--private '}{shlex.quote(repo_id)} {shlex.quote(str(folder))}"
            raise OutputError(f"{error} with: {again}") from error
        out.result(f"pushed: {address}")
