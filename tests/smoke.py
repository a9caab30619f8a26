"""Runs every command and every snippet of README.md and docs/, in order, as a new user would: `make smoke`.

    python tests/smoke.py [FILE.md ...]

A page's commands and snippets run in an empty folder of its own, without a network. A block after a line
`<!-- not run: REASON -->` is left out, and listed at the end. Then the reports that came about are opened in a headless
Chromium, wide and narrow, light and dark: nothing may be said on its console, and every picture must be there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEFT_OUT = re.compile(r"<!-- not run: (.*?) -->")
COMMAND = re.compile(r"(sqa-|make |torchrun |python |pip )")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOWS = {"wide": "1400,1000", "phone": "390,844"}
LIMIT = 600  # seconds a command may take


class Block(NamedTuple):
    """What stands in a page to be run."""

    kind: str
    """"command" or "snippet" """
    text: str
    left_out: str
    """why, or nothing"""


def blocks(text: str) -> Iterator[Block]:
    """In order: fenced blocks of sh and python, and indented blocks that begin with a command."""
    reason, lines = "", iter(text.splitlines())
    for line in lines:
        if found := LEFT_OUT.match(line):
            reason = found[1]
        elif line.startswith("```"):
            kind = line[3:].strip()
            content = "\n".join(iter(lambda: next(lines), "```"))
            if kind == "python":
                yield Block("snippet", content, reason)
            elif kind == "sh":
                yield from (Block("command", command, reason) for command in content.splitlines() if command)
            reason = ""
        elif line.startswith("    ") and COMMAND.match(line.strip()):
            yield Block("command", line.strip(), reason)
        elif line.strip() and not line.startswith("    "):
            reason = ""


def run_page(page: Path, folder: Path) -> list[str]:
    """Runs one page; returns what was left out. Raises SystemExit at the first thing that fails."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path}
    os.chdir(folder)
    left_out = []
    for block in blocks(page.read_text(encoding="utf-8")):
        title = block.text if block.kind == "command" else f"snippet: {block.text.splitlines()[0]} …"
        if block.left_out:
            left_out.append(f"{page.name}: {title} ({block.left_out})")
            continue
        print(f"\n{page.name}$ {title}", flush=True)
        start = time.perf_counter()
        if block.kind == "command":
            done = subprocess.run(block.text, shell=True, env=environment, cwd=folder, timeout=LIMIT)
            if done.returncode:
                sys.exit(f"{page.name}: `{block.text}` ended with {done.returncode}")
        else:
            exec(compile(block.text, str(page), "exec"), namespace)
        print(f"[{time.perf_counter() - start:.1f} s]", flush=True)
    return left_out


def look(report: Path, browser: str, pictures: Path) -> None:
    """Opens a report in a browser. Raises SystemExit where something is missing or complained about."""
    pictures.mkdir(parents=True, exist_ok=True)
    text = report.read_text(encoding="utf-8")
    wanted = text.count("<svg")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]  # fmt: skip
    for window, size in WINDOWS.items():
        for scheme, number in (("dark", 0), ("light", 1)):
            shot = pictures / f"{report.parent.name}-{window}-{scheme}.png"
            with tempfile.TemporaryDirectory() as profile:
                done = subprocess.run(
                    [browser, *flags, f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={shot}",
                     f"--blink-settings=preferredColorScheme={number}", report.as_uri()],
                    capture_output=True, text=True, timeout=120,
                )  # fmt: skip
            complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
            if done.returncode or complaints or not shot.is_file():
                sys.exit(f"{report} in a {window}, {scheme} window: {complaints or done.stderr[-500:]}")
            print(f"looked at: {shot}")
    with tempfile.TemporaryDirectory() as profile:
        dom = subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", report.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    if dom.stdout.count("<svg") != wanted or wanted < 1:
        sys.exit(f"{report}: {dom.stdout.count('<svg')} pictures in the browser, {wanted} in the file")


def main() -> None:
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    left_out: list[str] = []
    pictures = ROOT / "build" / "screenshots"
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as work:
        for page in pages:
            folder = Path(work) / page.stem
            folder.mkdir()
            left_out += run_page(page, folder)
        reports = sorted(Path(work).glob("*/*/report.html"))
        for report in reports if browser else []:
            look(report, browser, pictures)
        os.chdir(ROOT)
    print("\nleft out:", *(left_out or ["nothing"]), sep="\n  ")
    print(
        f"reports: {len(reports)} opened in {browser}" if browser else "reports: not opened, there is no Chromium here"
    )
    print("smoke: all passed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # before anything is imported that looks at it
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache}
        main()
