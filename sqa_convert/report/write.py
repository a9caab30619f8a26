"""What a person looks at in an output folder, made from its report.json: pictures, the report as a page, the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.companions import CARD
from ..checkpoints.small_files import REPORT, write_json
from ..checkpoints.staging import write_text
from .card import model_card
from .page import PAGE, report_page
from .pictures import heads_picture, recovery_picture, similarity_picture, speed_picture
from .verdict import verdict

PICTURE = "heads.svg"

SIMILARITY = "similarity.svg"

RECOVERY = "recovery"

SPEED = "speed"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json, its verdict in it, and everything that is made from it."""
    said = verdict(report)
    report["verdict"] = {"case": said.case, "text": said.text, "next": said.next, "command": said.command}
    write_json(folder / REPORT, report)
    site = _most_merged(report)
    picture = heads_picture(site["partition"], f"{site['kind']} {site['layer']}").encode() if site else None
    _put(folder / PICTURE, picture)
    known = any("similarity" in site for site in report["sites"])
    similarity = similarity_picture(report["sites"]) if known else None
    _put(folder / SIMILARITY, similarity)
    trained = bool(report.get("uptraining", {}).get("curve"))
    for kind in ("svg", "png"):
        _put(folder / f"{RECOVERY}.{kind}", recovery_picture(report, kind) if trained else None)
    if report.get("speed"):
        write_speed_pictures(folder, report["speed"])
    write_text(folder / PAGE, report_page(report, similarity))
    write_text(folder / CARD, model_card(report, folder))


def write_speed_pictures(folder: Path, speed: dict[str, Any]) -> None:
    for kind in ("svg", "png"):
        (folder / f"{SPEED}.{kind}").write_bytes(speed_picture(speed, kind))


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def _most_merged(report: dict[str, Any]) -> dict[str, Any] | None:
    """The first site whose heads were merged, for a picture; None where no partition is known."""
    sites = [site for site in report["sites"] if "partition" in site]
    merged = (site for site in sites if any(len(c) > 1 for g in site["partition"] for c in g))
    return next(merged, sites[0] if sites else None)
