"""Mutation testing: does the suite notice when the mathematics, the families or the plan are wrong?

    pip install cosmic-ray pytest-reportlog
    python benchmarks/mutants.py --count 200 --workers 2

Cosmic Ray knows every place where an operator, a number, a condition or a decorator could be another. Of a seeded
sample of these places each is changed, one at a time, in a copy of the repository, and the tests that reach the changed
line are run, the quickest first, until one fails; a mutant of a line that no test reaches survives. A change of nothing
but an annotation is left out: no program can tell. Writes benchmarks/results/mutants.json, with what each survivor
changes. With --survivors those of the last run are tried again, with more tests and new ones: what is noticed only then
is counted apart.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray import plugins
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
TARGETS = ("sqa_convert/heads/*.py", "sqa_convert/families/*.py", "sqa_convert/conversion/*.py")
TESTS = (
    "partition",
    "methods",
    "statistics",
    "circuits",
    "hostile",
    "random_architectures",
    "plan",
    "models",
    "checkpoints",
    "calibrate",
)
"""what is chosen from: what a mutant survives here the rest of the suite might still notice"""
PATIENCE = 45  # seconds of tests for one mutant
LIMIT = 600  # seconds the tests of one mutant may take; more counts as noticed

PYTEST = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider"]


class Mutant(NamedTuple):
    path: str
    line: int
    operator: str
    arguments: dict[str, Any]
    occurrence: int


class Tested(NamedTuple):
    mutant: Mutant
    outcome: str
    """what noticed it, "a test" or "the time limit", or SURVIVED"""
    tests: int
    """that reach it, within the patience"""
    difference: str


SURVIVED = "survived"


class _Bare(ast.NodeTransformer):
    """Takes annotations away."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def bare(code: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(code)))


def drawn(count: int, seed: int) -> list[Mutant]:
    """Mutants at `count` different places; there are more ways to spoil a product than a number, so not just any."""
    paths = sorted(path.relative_to(ROOT) for pattern in TARGETS for path in ROOT.glob(pattern))
    with tempfile.TemporaryDirectory() as folder, use_db(str(Path(folder) / "session"), WorkDB.Mode.create) as session:
        init(paths, session, {})
        specs = [item.mutations[0] for item in session.work_items]
    places: dict[tuple[str, tuple[int, int]], list[Mutant]] = {}
    for s in specs:
        mutant = Mutant(str(s.module_path), s.start_pos[0], s.operator_name, dict(s.operator_args or {}), s.occurrence)
        places.setdefault((mutant.path, s.start_pos), []).append(mutant)
    generator = random.Random(seed)
    chosen = (generator.choice(sorted(places[p])) for p in generator.sample(sorted(places), len(places)))
    return list(islice(filter(changes_something, chosen), count))


def changes_something(mutant: Mutant) -> bool:
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    operator = plugins.get_operator(mutant.operator)(**mutant.arguments)
    mutated = mutate_code(text, operator, mutant.occurrence)
    try:
        return mutated is not None and bare(mutated) != bare(text)
    except SyntaxError:  # Cosmic Ray takes the star between parameters for an operator
        return False


def code() -> str:
    """SHA-256 of what is changed."""
    paths = sorted(path for pattern in TARGETS for path in ROOT.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def copy_to(folder: Path) -> None:
    """The repository's files as they are now."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def work_in_a_copy(pristine: Path) -> None:
    """Gives this process a repository of its own to spoil."""
    own = pristine.with_name(str(os.getpid()))
    shutil.copytree(pristine, own)
    os.chdir(own)
    os.environ |= {"PYTHONPATH": str(own), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def statement(text: str, line: int) -> range:
    """The lines, up to `line`, of the smallest statement that `line` belongs to."""
    starts = [1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            if start <= line <= (node.end_lineno or start):
                starts.append(start)
    return range(max(starts), line + 1)


class Reach(NamedTuple):
    """Which tests reach which lines, and how long each takes."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    """by file and line; none for a line that runs only when it is imported"""

    @classmethod
    def measured(cls) -> Reach:
        """Runs the tests in this process's copy, then again, quickest first. Raises CalledProcessError if one fails."""
        files = [f"tests/test_{name}.py" for name in TESTS]
        subprocess.run(
            [*PYTEST, "--cov=sqa_convert", "--cov-context=test", "--cov-report=", "-vv", "--durations=0",
             "--report-log=log.json", *files],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds: dict[str, float] = {}
        for line in Path("log.json").read_text().splitlines():
            entry = json.loads(line)
            if entry.get("$report_type") == "TestReport" and entry["outcome"] != "skipped":
                seconds[entry["nodeid"]] = seconds.get(entry["nodeid"], 0) + entry["duration"]
        data = CoverageData()
        data.read()
        lines = {
            str(Path(name).relative_to(Path.cwd())): {
                line: sorted({context.partition("|")[0] for context in contexts if context})
                for line, contexts in data.contexts_by_lineno(name).items()
            }
            for name in data.measured_files()
        }
        reach = cls(seconds, lines)
        reach.write(sorted(seconds, key=seconds.__getitem__))
        subprocess.run([*PYTEST, "-x", "@tests.txt"], check=True, stdout=subprocess.DEVNULL)
        return reach

    @staticmethod
    def write(tests: list[str]) -> None:
        Path("tests.txt").write_text("\n".join(tests))

    def tests(self, path: str, line: int, patience: float = PATIENCE) -> list[str]:
        """Quickest first, as many as patience allows; of a line that runs when it is imported any."""
        known = self.lines.get(path, {})
        ran = [n for n in statement((ROOT / path).read_text(encoding="utf-8"), line) if n in known]
        if not ran:
            return []
        reaching = {test for n in ran for test in known[n]} or self.seconds.keys()
        total, chosen = 0.0, []
        for test in sorted(reaching, key=lambda test: (self.seconds.get(test, 0), test)):
            total += self.seconds.get(test, 0)
            if total < patience or not chosen:
                chosen.append(test)
        return chosen


def tested(mutant: Mutant, tests: list[str]) -> Tested:
    if not tests:
        text = Path(mutant.path).read_text(encoding="utf-8")
        mutated = mutate_code(text, plugins.get_operator(mutant.operator)(**mutant.arguments), mutant.occurrence)
        changed = difflib.unified_diff(text.splitlines(), (mutated or "").splitlines(), lineterm="")
        return Tested(mutant, SURVIVED, 0, "\n".join(changed))
    spec = MutationSpec(
        module_path=Path(mutant.path), operator_name=mutant.operator, occurrence=mutant.occurrence, start_pos=(1, 0),
        end_pos=(1, 1), operator_args=mutant.arguments, definition_name=None,
    )  # fmt: skip
    Reach.write(tests)
    result = mutate_and_test([spec], shlex.join([*PYTEST, "-x", "@tests.txt"]), LIMIT)
    if result.worker_outcome.value != "normal" or result.test_outcome is None:
        raise RuntimeError(f"{mutant}: {result.output}")
    if result.test_outcome.value == "survived":
        outcome = SURVIVED
    else:
        outcome = "the time limit" if result.output == "timeout" else "a test"
    return Tested(mutant, outcome, len(tests), result.diff or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="those of the last run meet more tests, or new ones")
    options = parser.parse_args()
    os.chdir(ROOT)
    versions = {name: version(name) for name in ("cosmic-ray", "pytest", "torch", "transformers")}
    known: dict[str, Any] = {"tried": 0, "killed": 0, "noticed later": 0, "minutes": 0, "noticed by": {}}
    if options.survivors:
        known = json.loads(RESULT.read_text())
        if known["code"] != code() or known["versions"] != versions:
            parser.error("the code, or a library's version, is another than that of the last run")
        sample = [Mutant(*survivor["mutant"]) for survivor in known["survivors"]]
    else:
        sample = drawn(options.count, options.seed)
    print(f"{len(sample)} mutants", flush=True)
    start, results = time.perf_counter(), []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.workers, spawn, work_in_a_copy, (Path(folder, "pristine"),)) as pool,
    ):
        copy_to(Path(folder, "pristine"))
        reach = pool.submit(Reach.measured).result()
        print(f"{len(reach.seconds)} tests, {sum(reach.seconds.values()):.0f} s", flush=True)
        patience = LIMIT / 2 if options.survivors else PATIENCE
        for result in pool.map(tested, sample, [reach.tests(m.path, m.line, patience) for m in sample]):
            results.append(result)
            print(len(results), result.mutant, result.tests, result.outcome, flush=True)
            if result.outcome == SURVIVED:
                print(result.difference, flush=True)
    survivors = [result for result in results if result.outcome == SURVIVED]
    outcomes = known["noticed by"] or Counter(r.outcome for r in results if r.outcome != SURVIVED)
    tried = known["tried"] or len(results)
    killed = known["killed"] if options.survivors else tried - len(survivors)
    later = known["noticed later"] + len(results) - len(survivors) if options.survivors else 0
    RESULT.write_text(
        json.dumps(
            {
                "versions": versions,
                "code": code(),
                "seed": known.get("seed", options.seed),
                "tried": tried,
                "killed": killed,
                "ratio": round(killed / tried, 4),
                "noticed by": outcomes,
                "noticed later": later,
                "tests": TESTS,
                "minutes": round(known["minutes"] + (time.perf_counter() - start) / 60, 1),
                "survivors": [{"mutant": result.mutant, "difference": result.difference} for result in survivors],
            },
            indent=1,
        )
        + "\n"
    )
    print(f"{killed} of {tried} killed; {RESULT}")


if __name__ == "__main__":
    main()
