"""What the command makes of checkpoints that mean harm.

    python benchmarks/hostile.py [--short] [--only WORDS] [--inputs N] [--seed N]

Every checkpoint of tests/hostile.py through the real command, as a dry run and as a conversion, those with a hostile
tokenizer also measured. Each runs in a forked process of its own, in which all is imported already: seconds (of the
processor; the wall's are recorded too) and peak memory are what the checkpoint costs. It has to end with its documented
exit code and one line on stderr, within 2 seconds and 500 MB, must run no code, and write nothing but its output, which
may hold nothing that lies outside.

Then a fuzzer with a fixed seed (tests/fuzzing.py): sound files with a few bytes or values changed, through
`open_source` and `make_plan`, and where these accept them converted in memory; nothing but an SQAError may come out.
Writes benchmarks/results/hostile.json.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import platform
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import fuzzing  # noqa: E402
import hostile  # noqa: E402
import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar, set_verbosity_error  # noqa: E402

from sqa_convert import convert  # noqa: E402
from sqa_convert.cli.convert import main as command  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "hostile.json"
MOST_SECONDS, MOST_MB = 2.0, 500.0
ADDRESS_SPACE = 3 * 2**30
"""bytes more than at the start that a process may ask for, so that no bomb harms the machine"""
HEADS = ["--q-groups", "8", "--kv-groups", "4", "--no-calibration"]
MODES = {
    "dry run": ["--dry-run"],
    "conversion": ["--no-evaluate", "-o", "out"],
    "evaluation": ["-o", "out"],
}


def memory(key: str) -> int:
    """Bytes of this process."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    )


def forked(work: Callable[[], Any], patience: float = 60) -> dict[str, Any]:
    """Runs `work` in a child, ended after so many seconds; returns what it returned, what it took, what memory grew."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        limit = memory("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
        found: dict[str, Any] = {}
        try:
            found["returned"] = work()
        except BaseException as error:
            found["raised"] = f"{type(error).__name__}: {error}"[:500]
        found["seconds"] = round(time.process_time() - busy, 3)
        found["wall_seconds"] = round(time.perf_counter() - start, 3)
        found["MB"] = round((memory("VmHWM") - before) / 1e6, 1)
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    text = b""
    deadline = time.monotonic() + patience
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(reading, 2**16)):
            break
        text += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if not text:
        return {"raised": f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "said nothing"}
    return json.loads(text)


def run_command(place: Path, arguments: list[str]) -> int:
    """The exit code; what was said lies in `place`."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.chdir(place / "work")
    sys.argv = ["sqa-convert", str(place / "source"), *HEADS, *arguments]
    try:
        command()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(stop.code or 0)
    raise AssertionError("the command did not exit")


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")} - {"stdout", "stderr"}


def check(case: hostile.Case, mode: str) -> dict[str, Any]:
    """One checkpoint, one command: what it cost, and what was wrong."""
    expected = {"dry run": case.dry, "conversion": case.full, "evaluation": case.evaluated}[mode]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        home = place / "home"
        for folder in (place / "work", home):
            folder.mkdir()
        os.environ |= {"HOME": str(home), "TMPDIR": str(home), "HF_HOME": str(home / "hf")}
        hostile.build(place, case.base)
        case.spoil(place)
        before = files(place)
        found = forked(lambda: run_command(place, MODES[mode]))
        said = (place / "stderr").read_text(errors="replace")
        wrong = []
        if found.get("returned") != expected:
            wrong.append(f"exit code {found.get('returned', found.get('raised'))}, not {expected}")
        if expected and not (said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable()):
            wrong.append("not one line")
        if "Traceback" in said:
            wrong.append("a traceback")
        if len(said) > 2000:
            wrong.append(f"{len(said)} characters")
        if expected != hostile.DONE and found.get("seconds", 0) > MOST_SECONDS:
            wrong.append(f"{found['seconds']} s")
        if expected != hostile.DONE and found.get("MB", 0) > MOST_MB:
            wrong.append(f"{found['MB']} MB")
        if "canary" in files(place):
            wrong.append("code was run")
        new = {name for name in files(place) - before if not name.startswith("work/out/") and name != "work/out"}
        if new:
            wrong.append(f"written: {', '.join(sorted(new))[:200]}")
        if expected != hostile.DONE and (place / "work" / "out").exists():
            wrong.append("an output was left")
        if any(
            hostile.SECRET in path.read_text(errors="replace")
            for path in (place / "work").rglob("*.*")
            if path.is_file()
        ):
            wrong.append("it gave away what lies outside")
        return {"said": said[:300].replace(str(place), "…")} | found | ({"wrong": wrong} if wrong else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="every tenth checkpoint and 300 inputs")
    parser.add_argument("--only", help="checkpoints whose name holds this, and no fuzzing")
    parser.add_argument("--inputs", type=int, default=8000, help="of the fuzzer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:  # what is imported late is imported now
        convert("sample:gpt2", 8, 4, calibration=None, output=Path(scratch, "out"), evaluate=True)
        convert("sample:t5", 8, 4, calibration=None)
    gc.freeze()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "safetensors", "tokenizers", "sqa-convert")}
        | {"python": platform.python_version()},
        "limits": {"seconds": MOST_SECONDS, "MB": MOST_MB},
    }
    print(json.dumps(result), flush=True)
    cases = {name: case for name, case in hostile.CATALOGUE.items() if not options.only or options.only in name}
    if options.short:
        cases = dict(list(cases.items())[::10])
    rows = {}
    for name, case in cases.items():
        for mode in MODES:
            if mode == "evaluation" and case.evaluated is None:
                continue
            row = rows[f"{name}, {mode}"] = check(case, mode)
            verdict = "; ".join(row["wrong"]) if "wrong" in row else "as it should"
            print(
                f"{name}, {mode}: {verdict} · {row.get('seconds')} s, {row.get('MB')} MB · {row['said']!r}", flush=True
            )
    refused = [row for row in rows.values() if row.get("returned") == hostile.REFUSED]
    result["checkpoints"] = {
        "number": len(cases),
        "runs": len(rows),
        "refused": len(refused),
        "wrong": {name: row["wrong"] for name, row in rows.items() if "wrong" in row},
        "slowest refusal": max((row["seconds"] for row in refused), default=0),
        "largest refusal MB": max((row["MB"] for row in refused), default=0),
    }
    if not options.only:
        count = 300 if options.short else options.inputs
        fuzzed = forked(lambda: fuzzing.fuzz(count, options.seed), patience=count)
        result["fuzzed"] = {"seed": options.seed, "inputs": count} | fuzzed.pop("returned", {}) | fuzzed
    result["rows"] = {
        name: f"exit code {row.get('returned')}, {row.get('seconds')} s, {row.get('wall_seconds')} s on the wall, "
        f"{row.get('MB')} MB"
        for name, row in rows.items()
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=2))
    print(collections.Counter("wrong" if "wrong" in row else "as it should" for row in rows.values()))
    if not options.short and not options.only:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["checkpoints"]["wrong"] or result.get("fuzzed", {}).get("escaped")))


if __name__ == "__main__":
    main()
