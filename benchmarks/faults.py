"""Faults on purpose: kills, full and failing disks, sources that change, runs side by side, clocks that jump.

    python benchmarks/faults.py [--short] [--only KIND]

Every trial is a real sqa-convert or sqa-uptrain on a tiny random model, in a process forked from one that has loaded
the libraries, and meets one fault: a signal at a random moment or at one call that writes; an error of the file system
at one such call, or from it on; a folder taken away; a source changed; the clock set. Calls are taken in turn until a
run has none left. They are met by a small library in C that comes before libc (LD_PRELOAD), so this needs Linux and a C
compiler. After each fault the output must be as before or complete, by the SHA-256 of its files, the source untouched
and the message one line that fits; the same command without a fault must then succeed and leave nothing else behind.
One end is counted apart: a file of weights that is cut off while calibration has it mapped ends the process by SIGBUS,
without a message. One core, twenty minutes; --short does a tenth. Exits 1 where anything else went wrong. Writes
benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SHIM = "SQA_FAULTS_SHIM"
WRITES, REMOVALS = 1, 2
DAY = 86_400
SHIM_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int kinds, error_number, signal_number, lasting;
static long wanted, calls, hits;
static double jump_at, jump_by;

void faults_arm(const char *below, int which, long number, int error, int signal, int from_there_on) {
    strncpy(folder, below, sizeof folder - 1);
    wanted = number, error_number = error, signal_number = signal, lasting = from_there_on, calls = hits = 0;
    kinds = which;
}
void faults_jump(double at, double by) { jump_at = at, jump_by = by; }
long faults_calls(void) { return calls; }
long faults_hits(void) { return hits; }

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int met(int kind, int at, const char *path) {
    char text[2 * PATH_MAX], link[64];
    if (!(kinds & kind)) return 0;
    text[0] = 0;
    if (!path || (path[0] != '/' && at != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, text, PATH_MAX - 1);
        if (length < 0) return 0;
        text[length] = 0;
    } else if (path[0] != '/' && !getcwd(text, PATH_MAX)) return 0;
    if (path && path[0] == '/') snprintf(text, sizeof text, "%s", path);
    else if (path) { strncat(text, "/", 2); strncat(text, path, PATH_MAX - 2); }
    size_t length = strlen(folder);
    if (strncmp(text, folder, length) || text[length] != '/') return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (number != wanted && !(lasting && wanted && number > wanted)) return 0;
    __atomic_add_fetch(&hits, 1, __ATOMIC_SEQ_CST);
    if (signal_number) { kill(getpid(), signal_number); return 0; }
    errno = error_number;
    return 1;
}

#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    if (((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) && met(1, AT_FDCWD, path)) return -1; \
    return real(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
    REAL(name); va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    if (((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) && met(1, at, path)) return -1; \
    return real(at, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    REAL(name); if ((mode[0] != 'r' || strchr(mode, '+')) && met(1, AT_FDCWD, path)) return NULL; \
    return real(path, mode); }
FOPEN(fopen) FOPEN(fopen64)
#define CALL(result, name, kind, at, path, parameters, arguments) result name parameters { \
    REAL(name); if (met(kind, at, path)) return -1; return real arguments; }
#define BYTES (int fd, const void *data, size_t size)
CALL(ssize_t, write, 1, fd, NULL, BYTES, (fd, data, size))
CALL(ssize_t, pwrite, 1, fd, NULL, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place))
CALL(ssize_t, pwrite64, 1, fd, NULL, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place))
CALL(ssize_t, writev, 1, fd, NULL, (int fd, const struct iovec *parts, int count), (fd, parts, count))
CALL(ssize_t, sendfile, 1, fd, NULL, (int fd, int from, off_t *place, size_t size), (fd, from, place, size))
CALL(ssize_t, sendfile64, 1, fd, NULL, (int fd, int from, off64_t *place, size_t size), (fd, from, place, size))
CALL(ssize_t, copy_file_range, 1, fd, NULL, (int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags),
     (from, a, fd, b, size, flags))
CALL(int, ftruncate, 1, fd, NULL, (int fd, off_t size), (fd, size))
CALL(int, ftruncate64, 1, fd, NULL, (int fd, off64_t size), (fd, size))
CALL(int, fsync, 1, fd, NULL, (int fd), (fd))
CALL(int, fdatasync, 1, fd, NULL, (int fd), (fd))
CALL(int, mkdir, 1, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
CALL(int, mkdirat, 1, at, path, (int at, const char *path, mode_t mode), (at, path, mode))
CALL(int, rename, 1, AT_FDCWD, to, (const char *from, const char *to), (from, to))
CALL(int, renameat, 1, there, to, (int at, const char *from, int there, const char *to), (at, from, there, to))
CALL(int, renameat2, 1, there, to, (int at, const char *from, int there, const char *to, unsigned flags),
     (at, from, there, to, flags))
CALL(int, chmod, 1, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
CALL(int, fchmodat, 1, at, path, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
CALL(int, unlink, 2, AT_FDCWD, path, (const char *path), (path))
CALL(int, unlinkat, 2, at, path, (int at, const char *path, int flags), (at, path, flags))
CALL(int, rmdir, 2, AT_FDCWD, path, (const char *path), (path))

static double jumped(double now) { return jump_by != 0 && now >= jump_at ? jump_by : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime); int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME) now->tv_sec += jumped(now->tv_sec + now->tv_nsec / 1e9);
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday); int result = real(now, zone);
    if (!result) now->tv_sec += jumped(now->tv_sec + now->tv_usec / 1e6);
    return result;
}
time_t time(time_t *at) {
    struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
#define STAT(name, type, parameters, arguments) int name parameters { \
    REAL(name); int result = real arguments; \
    if (!result) found->st_mtim.tv_sec += jumped(found->st_mtim.tv_sec + found->st_mtim.tv_nsec / 1e9); \
    return result; }
STAT(stat, stat, (const char *path, struct stat *found), (path, found))
STAT(stat64, stat64, (const char *path, struct stat64 *found), (path, found))
STAT(fstat, stat, (int fd, struct stat *found), (fd, found))
STAT(fstat64, stat64, (int fd, struct stat64 *found), (fd, found))
STAT(fstatat, stat, (int at, const char *path, struct stat *found, int flags), (at, path, found, flags))
STAT(fstatat64, stat64, (int at, const char *path, struct stat64 *found, int flags), (at, path, found, flags))
"""


@dataclass(frozen=True)
class Fault:
    """What one run meets of the file system or the clock."""

    number: int = 0
    """of the call below the work folder that is met; 0 only counts them"""
    error: int = 0
    signal: int = 0
    lasting: bool = False
    kinds: int = WRITES
    jump: tuple[float, float] | None = None
    """when the clock is set, and by how many seconds"""
    user: int = 0
    """runs as this user"""
    modules: Path | None = None
    """a file that is given what was imported"""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """negative: by that signal"""
    error: str
    """its stderr"""
    calls: int
    hits: int
    seconds: float


class Run:
    """A command in a process of its own, which has begun when this is made."""

    def __init__(self, main: Callable[[], None], arguments: Iterable[object], work: Path, fault: Fault | None) -> None:
        self.said = work.parent / f"{work.name}.said-{time.monotonic_ns()}"
        self.start = time.perf_counter()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _child(main, [str(argument) for argument in arguments], work, self.said, fault, writer)
        os.close(writer)
        os.read(reader, 1)  # it is about to begin
        os.close(reader)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> Ended:
        _, status, _ = os.wait4(self.pid, 0)
        seconds = time.perf_counter() - self.start
        said = self.said.read_text(errors="replace") if self.said.exists() else ""
        counted = Path(f"{self.said}.calls")
        calls, hits = map(int, (counted.read_text() if counted.exists() else "").split() or (0, 0))
        self.said.unlink(missing_ok=True)
        counted.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), said, calls, hits, seconds)


def _child(
    main: Callable[[], None], arguments: list[str], work: Path, said: Path, fault: Fault | None, begun: int
) -> None:
    code = 70
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        counted = os.open(f"{said}.calls", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(work)
        sys.argv = ["command", *arguments]
        signal.signal(signal.SIGINT, _interrupt)
        shim = ctypes.CDLL(os.environ[SHIM])
        fault = fault or Fault(kinds=0)
        if fault.user:
            os.setgroups([])
            os.setuid(fault.user)
        if fault.jump:
            shim.faults_jump(ctypes.c_double(fault.jump[0]), ctypes.c_double(fault.jump[1]))
        shim.faults_arm(
            os.fsencode(work),
            fault.kinds,
            ctypes.c_long(fault.number),
            fault.error,
            fault.signal,
            int(fault.lasting),
        )
        os.write(begun, b"1")
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        os.write(counted, b"%d %d" % (shim.faults_calls(), shim.faults_hits()))
        if fault.modules is not None:
            fault.modules.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Python does, but for the moments in which the command has not begun or is over: there it is no trial of it."""
    if frame is None or frame.f_code is not _child.__code__:
        signal.default_int_handler(number, frame)


def load_as_it_does(main: Callable[[], None], arguments: Iterable[object], work: Path) -> None:
    """Imports here what a run imports, so that later ones need not."""
    listed = work.parent / "modules"
    ended = Run(main, arguments, work, Fault(kinds=0, modules=listed)).end()
    assert ended.code == 0, ended.error
    for name in listed.read_text().split("\n"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder; {} where there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@dataclass(frozen=True)
class Reference:
    """What a run without a fault leaves: its files, and the SHA-256 of those that are the same every time."""

    files: frozenset[str]
    same: dict[str, str]

    def __contains__(self, folder: Path) -> bool:
        """Whether a folder is complete: all files, the weights as computed and as the report says."""
        found = tree(folder)
        if set(found) != self.files or any(found[name] != digest for name, digest in self.same.items()):
            return False
        report = json.loads((folder / "report.json").read_text())
        return all(found[name] == digest for name, digest in report["sha256"].items())


def reference(folder: Path) -> Reference:
    found = tree(folder)
    same = {name: digest for name, digest in found.items() if name.endswith((".safetensors", "tokenizer.json"))}
    return Reference(frozenset(found), same)


@dataclass
class Row:
    """One kind of fault, counted."""

    kind: str
    trials: int = 0
    met: int = 0
    """trials in which the fault came before the end"""
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    BAD = ("lost", "source_changed", "wrong_messages", "next_run_failed", "strays_after_next")

    def say(self, what: str, note: str) -> None:
        self.counts[what] += 1
        if what in self.BAD and len(self.notes) < 12:
            text = " ".join(note.replace(f"{RESULTS.parent.parent}/", "").split())
            self.notes.append(f"{what}: {text[-400:]}")

    def as_json(self) -> dict[str, Any]:
        keys = ("as_before", "complete", "resumed", "bus_errors", "stopped_with_strays", *self.BAD)
        survived = self.trials - self.counts["failed_trials"]
        found = {"trials": self.trials, "met": self.met, "survived": survived}
        found |= {key: self.counts[key] for key in keys} | {"seconds": round(self.seconds, 1)}
        return found | ({"notes": self.notes} if self.notes else {})


def one_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


@dataclass(frozen=True)
class Training:
    """An uptraining, and what it does without a fault."""

    folder: Path
    """the converted model"""
    command: list[object]
    flags: tuple[str, ...]
    whole: Reference
    seconds: float
    calls: int


class Bench:
    """Sources, references and the trials on them."""

    HEADS = ("--q-groups", "4", "--kv-groups", "2")
    OLD_HEADS = ("--q-groups", "2", "--kv-groups", "1")
    PLAIN = ("--method", "mean", "--no-evaluate")
    FITTED = ("--calibration-tokens", "512", "--refine-steps", "2")

    def __init__(self, scratch: Path, seed: int, share: float) -> None:
        from sqa_convert.cli.convert import main as convert
        from sqa_convert.cli.uptrain import main as uptrain

        self.scratch, self.random, self.share = scratch, random.Random(seed), share
        self.convert, self.uptrain = convert, uptrain
        self.rows: list[Row] = []
        self.folders = 0
        (scratch / "text.txt").write_text(
            "\n\n".join(p.read_text() for p in sorted(Path(__file__).parent.glob("*.py")))
        )
        for family, other in (("gpt2", 0), ("t5", 0), ("gpt2-other", 1)):
            write_source(scratch / family, family.partition("-")[0], 2 + other)
        self.sources = {family: tree(scratch / family) for family in ("gpt2", "t5")}
        self.references: dict[tuple[str, tuple[str, ...]], Reference] = {}
        self.seconds: dict[tuple[str, tuple[str, ...]], float] = {}
        for family in ("gpt2", "t5", "gpt2-other"):
            for way in (self.PLAIN,) if family == "gpt2-other" else (self.PLAIN, self.FITTED):
                for heads in (self.HEADS, self.OLD_HEADS):
                    self._refer(family, (*heads, *self._flags(way)))

    def _flags(self, way: tuple[str, ...]) -> tuple[str, ...]:
        return way if way == self.PLAIN else (*way, "--data", str(self.scratch / "text.txt"))

    def _refer(self, family: str, flags: tuple[str, ...]) -> None:
        work = self.work()
        command = [self.scratch / family, *flags, "-o", "out", "--overwrite"]
        load_as_it_does(self.convert, command, work)
        self.seconds[family, flags] = min(Run(self.convert, command, work, None).end().seconds for _ in range(3))
        self.references[family, flags] = reference(work / "out")
        shutil.copytree(work / "out", self.scratch / f"{family}-{len(self.references)}-out")
        self.outputs = getattr(self, "outputs", {}) | {
            (family, flags): self.scratch / f"{family}-{len(self.references)}-out"
        }
        shutil.rmtree(work)

    def work(self) -> Path:
        self.folders += 1
        work = self.scratch / f"work-{self.folders}"
        work.mkdir()
        work.chmod(0o777)
        return work

    def times(self, number: int) -> int:
        return max(1, round(number * self.share))

    @contextlib.contextmanager
    def row(self, kind: str) -> Iterator[Row]:
        row = Row(kind)
        start = time.perf_counter()
        yield row
        row.seconds = time.perf_counter() - start
        self.rows.append(row)
        print(kind, json.dumps(row.as_json()), flush=True)

    def conversion(
        self,
        row: Row,
        family: str,
        overwrite: bool,
        way: tuple[str, ...],
        fault: Fault | None,
        fits: Callable[[Ended], bool],
        meanwhile: Callable[[Run, Path, float], None] = lambda run, work, seconds: None,
        gone: bool = False,
    ) -> Ended:
        """One trial.

        Args:
            fits: whether the way a run that did not succeed ended is the right one.
            meanwhile: is told the run, its folder and the seconds it takes without a fault.
            gone: whether `meanwhile` removes the output.
        """
        flags = (*self.HEADS, *self._flags(way))
        old = self.outputs[family, (*self.OLD_HEADS, *self._flags(self.PLAIN))]
        work = self.work()
        before = {}
        if overwrite:
            shutil.copytree(old, work / "out")
            before = tree(work / "out")
        command = [self.scratch / family, *flags, "-o", "out", *(["--overwrite"] if overwrite else [])]
        if fault is not None and fault.user:
            work.chmod(0o555)
        run = Run(self.convert, command, work, fault)
        meanwhile(run, work, self.seconds[family, flags])
        ended = run.end()
        work.chmod(0o777)
        if gone and not (work / "out").exists():
            shutil.copytree(old, work / "out")  # so that what is gone is as before
            ended = dataclasses.replace(ended, code=ended.code or 2, error=ended.error or "error: gone\n")
        failed = self.judge(row, work, before, self.references[family, flags], ended, fits)
        if tree(self.scratch / family) != self.sources[family]:
            row.say("source_changed", ended.error)
            failed = True
        after = Run(self.convert, [*command, *(["--overwrite"] if (work / "out").exists() else [])], work, None).end()
        failed |= self.settled(row, work, after, work / "out" in self.references[family, flags], {"out"})
        row.counts["failed_trials"] += failed
        shutil.rmtree(work)
        return ended

    def judge(
        self,
        row: Row,
        work: Path,
        before: dict[str, str],
        whole: Reference,
        ended: Ended,
        fits: Callable[[Ended], bool],
        known: Iterable[str] = ("out",),
    ) -> bool:
        """Counts what a fault left; whether it is not as it should be."""
        row.trials += 1
        row.met += ended.code != 0 or ended.hits > 0
        output = work / "out"
        complete = output.is_dir() and output in whole
        as_before = tree(output) == before and output.exists() == bool(before)
        lost = not complete and (not as_before or ended.code == 0)
        if lost:
            row.say("lost", f"code {ended.code}, {sorted(names(work))}: {ended.error}")
        else:
            row.say("complete" if complete else "as_before", "")
        if ended.code != 0 and names(work) - set(known):
            row.say("stopped_with_strays", "")
        wrong = not ((ended.code == 0 and not ended.error) or fits(ended))
        if wrong:
            row.say("wrong_messages", f"code {ended.code}: {ended.error}")
        return lost or wrong

    def settled(self, row: Row, work: Path, after: Ended, complete: bool, known: set[str]) -> bool:
        """Counts what the next run, without a fault, left; whether it is not as it should be."""
        failed = after.code != 0 or not complete
        if failed:
            row.say("next_run_failed", f"code {after.code}: {after.error}")
        strays = names(work) - known
        if strays:
            row.say("strays_after_next", f"{sorted(strays)}")
        return failed or bool(strays)

    def random_kills(self) -> None:
        for number, name in ((signal.SIGKILL, "SIGKILL"), (signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):

            def strike(run: Run, work: Path, seconds: float, number: int = number) -> None:
                time.sleep(self.random.uniform(0, 1.05 * seconds))
                run.kill(number)

            for overwrite in (False, True):
                with self.row(f"{name} at a random moment{', --overwrite' if overwrite else ''}") as row:
                    for i in range(self.times(50)):
                        way = self.FITTED if i % 25 == 9 else self.PLAIN
                        self.conversion(row, ("gpt2", "t5")[i % 2], overwrite, way, None, _fits_signal(number), strike)

    def calls(self) -> None:
        """A fault at every call in turn; of the kinds that differ less, and for T5, at every fifth."""
        disk = ((errno.ENOSPC, "ENOSPC"), (errno.EIO, "EIO"))
        both = WRITES | REMOVALS
        for overwrite in (False, True):
            for number, name in disk:
                self._each(f"{name} at a write", overwrite, 1, Fault(error=number), _fits_disk(number))
                once = Fault(error=number, lasting=True)
                self._each(f"{name} from a write on", overwrite, 5, once, _fits_disk(number))
            once = Fault(error=errno.EROFS, lasting=True, kinds=both)
            self._each("read-only from a write on", overwrite, 5, once, _fits_disk(errno.EROFS))
            for number, name, every in (
                (signal.SIGKILL, "SIGKILL", 1),
                (signal.SIGINT, "SIGINT", 1),
                (signal.SIGTERM, "SIGTERM", 5),
            ):
                once = Fault(signal=number, kinds=both)
                self._each(f"{name} at a write or removal", overwrite, every, once, _fits_signal(number))

    def _each(self, kind: str, overwrite: bool, every: int, fault: Fault, fits: Callable[[Ended], bool]) -> None:
        with self.row(f"{kind}{', --overwrite' if overwrite else ''}") as row:
            for family in ("gpt2", "t5"):
                step = max(every if family == "gpt2" else 5, round(1 / self.share))
                n = 1 + self.random.randrange(step)
                while True:
                    met = dataclasses.replace(fault, number=n)
                    ended = self.conversion(row, family, overwrite, self.PLAIN, met, fits)
                    if ended.code == 0 and ended.hits == 0:
                        break
                    n += step

    def vanishing(self) -> None:
        def removing(pattern: str) -> Callable[[Run, Path, float], None]:
            def meanwhile(run: Run, work: Path, seconds: float) -> None:
                end = time.perf_counter() + seconds
                while not any(work.glob(".out.*")) and time.perf_counter() < end:
                    time.sleep(0.0005)
                time.sleep(self.random.uniform(0, seconds / 2))
                for path in work.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)

            return meanwhile

        def fits(ended: Ended) -> bool:
            return ended.code == 2 and one_line(ended.error)

        with self.row("temporary folder taken away") as row:
            for i in range(self.times(30)):
                self.conversion(row, ("gpt2", "t5")[i % 2], i % 4 > 1, self.PLAIN, None, fits, removing(".out.*"))
        with self.row("old output taken away, --overwrite") as row:
            for i in range(self.times(30)):
                self.conversion(row, ("gpt2", "t5")[i % 2], True, self.PLAIN, None, fits, removing("out"), gone=True)
        if os.geteuid() == 0:
            with self.row("folder may not be written to") as row:
                self.scratch.chmod(0o755)
                for i in range(self.times(10)):
                    nobody = Fault(kinds=0, user=65_534)
                    self.conversion(row, ("gpt2", "t5")[i % 2], i % 4 > 1, self.PLAIN, nobody, _fits_locked)

    def changing_sources(self) -> None:
        """The result is that of the old source or of the new one, or there is none."""
        other = self.scratch / "gpt2-other"

        def put(name: str) -> Callable[[Path], None]:
            def change(source: Path) -> None:
                shutil.copyfile(other / name, source / ".new")
                (source / ".new").rename(source / name)

            return change

        def cut(name: str) -> Callable[[Path], None]:
            return lambda source: os.truncate(source / name, (source / name).stat().st_size // 3)

        def rewrite(source: Path) -> None:
            with (source / "model.safetensors").open("r+b") as file:
                file.write((other / "model.safetensors").read_bytes())

        changes: dict[str, Callable[[Path], object]] = {
            "weights cut off": cut("model.safetensors"),
            "weights replaced": put("model.safetensors"),
            "weights rewritten in place": rewrite,
            "weights removed": lambda source: (source / "model.safetensors").unlink(),
            "folder removed": shutil.rmtree,
            "config replaced": lambda source: (source / "config.json").write_text("{}"),
            "tokenizer cut off": cut("tokenizer.json"),
        }
        for kind, change in changes.items():
            with self.row(f"source: {kind}") as row:
                for i in range(self.times(20)):
                    self._changing(row, change, self.FITTED if i % 10 == 4 else self.PLAIN)

    def _changing(self, row: Row, change: Callable[[Path], object], way: tuple[str, ...]) -> None:
        work = self.work()
        source = shutil.copytree(self.scratch / "gpt2", work / "source")
        flags = (*self.HEADS, *self._flags(way))
        run = Run(self.convert, [source, *flags, "-o", "out"], work, None)
        time.sleep(self.random.uniform(0, self.seconds["gpt2", flags]))
        change(source)
        ended = run.end()
        row.trials += 1
        row.met += ended.code != 0
        output = work / "out"
        states = [self.references["gpt2", flags]]  # of the source, that a result may be of
        if changed := self.references.get(("gpt2-other", flags)):
            states.append(changed)
        if (source / "tokenizer.json").exists():
            other = {"tokenizer.json": hashlib.sha256((source / "tokenizer.json").read_bytes()).hexdigest()}
            states += [Reference(state.files, state.same | other) for state in states]
        complete = output.exists() and any(output in state for state in states)
        if output.exists() and complete and ended.code == 0:
            row.say("complete", "")
        elif not output.exists() and ended.code != 0:
            row.say("as_before", "")
        else:
            row.say("lost", f"code {ended.code}, {sorted(names(work))}: {ended.error}")
        wrong = ended.code != 0 and not (ended.code == 3 and one_line(ended.error))
        if ended.code == -signal.SIGBUS and way == self.FITTED:
            row.say("bus_errors", "")
        elif wrong:
            row.say("wrong_messages", f"code {ended.code}: {ended.error}")
        if ended.code != 0 and names(work) - {"source", "out"}:
            row.say("stopped_with_strays", "")
        again = [self.scratch / "gpt2", *flags, "-o", "out", "--overwrite"]
        after = Run(self.convert, again, work, None).end()
        failed = self.settled(row, work, after, output in self.references["gpt2", flags], {"out", "source"})
        row.counts["failed_trials"] += failed or wrong or (output.exists() and not complete and ended.code == 0)
        shutil.rmtree(work)

    def two_at_once(self) -> None:
        for overwrite in (False, True):
            with self.row(f"two conversions to one output{', --overwrite' if overwrite else ''}") as row:
                for i in range(self.times(30)):
                    self._two(row, ("gpt2", "t5")[i % 2], overwrite)

    def _two(self, row: Row, family: str, overwrite: bool) -> None:
        work = self.work()
        ways = [(*heads, *self.PLAIN) for heads in (self.HEADS, self.OLD_HEADS)]
        if overwrite:
            shutil.copytree(self.outputs[family, ways[1]], work / "out")
        flag = ["--overwrite"] if overwrite else []
        runs = []
        for way in ways:
            runs.append(Run(self.convert, [self.scratch / family, *way, "-o", "out", *flag], work, None))
            time.sleep(self.random.uniform(0, 1.2 * self.seconds[family, way]) if len(runs) == 1 else 0)
        ended = [run.end() for run in runs]
        row.trials += 1
        row.met += any(one.code for one in ended)
        whole = [work / "out" in self.references[family, way] for way in ways]
        done = [one.code == 0 for one in ended]
        sane = any(done) and any(w and d for w, d in zip(whole, done, strict=True))
        if not sane:
            row.say("lost", " | ".join(f"code {one.code}: {one.error}" for one in ended))
        else:
            row.say("complete", "")
        wrong = [
            one
            for one in ended
            if one.code and not (one.code == 2 and _names(one.error, "another run", "exists already"))
        ]
        if wrong:
            row.say("wrong_messages", wrong[0].error)
        again = [self.scratch / family, *ways[0], "-o", "out", "--overwrite"]
        after = Run(self.convert, again, work, None).end()
        failed = self.settled(row, work, after, work / "out" in self.references[family, ways[0]], {"out"})
        row.counts["failed_trials"] += failed or bool(wrong) or not sane
        shutil.rmtree(work)

    def clocks(self) -> None:
        with self.row("clock set back or forward") as row:
            for i in range(self.times(30)):
                family, way = ("gpt2", "t5")[i % 2], self.FITTED if i % 20 == 9 else self.PLAIN
                seconds = self.seconds[family, (*self.HEADS, *self._flags(way))]
                jump = time.time() + self.random.uniform(0, seconds), self.random.choice((-400, -1, 1, 4000)) * DAY
                self.conversion(row, family, i % 4 > 1, way, Fault(kinds=0, jump=jump), lambda ended: False)

    # Uptrainings

    RECIPE = (
        "tokens: 1_536\nsequence_length: 32\nbatch_size: 4\nlearning_rate: 1.0e-3\nevaluations: 4\n"
        "held_out_tokens: 1_024\n"
    )

    def uptrainings(self) -> None:
        (self.scratch / "recipe.yaml").write_text(self.RECIPE + f"data: {self.scratch / 'text.txt'}\n")
        trainings = []
        for measured in (False, True):
            for family in ("gpt2", "t5"):
                trainings.append(self._training(family, () if measured else ("--no-evaluate",)))
        trainings = [*trainings[:2], *trainings]  # measured is a third of them
        kills = ((signal.SIGKILL, "SIGKILL"), (signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"))
        for number, name in kills:

            def strike(run: Run, seconds: float, number: int = number) -> None:
                time.sleep(self.random.uniform(0, 1.02 * seconds))
                run.kill(number)

            with self.row(f"uptraining: {name} at a random moment") as row:
                for i in range(self.times(18)):
                    self._uptraining(row, trainings[i % 6], None, _fits_signal(number, True), strike)
        for number, name in ((errno.ENOSPC, "ENOSPC"), (errno.EIO, "EIO")):
            with self.row(f"uptraining: {name} at each write in turn") as row:
                for call in range(1, trainings[0].calls + 1, round(1 / self.share)):
                    met = row.met
                    self._uptraining(row, trainings[0], Fault(call, number), _fits_disk(number, True))
                    if row.met == met:  # there are no more
                        break
            for lasting in (False, True):
                with self.row(f"uptraining: {name} {'from a write on' if lasting else 'at a write'}") as row:
                    for i in range(self.times(18)):
                        fault = Fault(self._call(trainings[i % 6], i), number, lasting=lasting)
                        self._uptraining(row, trainings[i % 6], fault, _fits_disk(number, True))
        for number, name in kills:
            with self.row(f"uptraining: {name} at a write or removal") as row:
                for i in range(self.times(24)):
                    fault = Fault(self._call(trainings[i % 6], i), signal=number, kinds=WRITES | REMOVALS)
                    self._uptraining(row, trainings[i % 6], fault, _fits_signal(number, True))
        with self.row("uptraining: clock set back or forward") as row:
            for i in range(self.times(12)):
                jump = time.time() + self.random.uniform(0, trainings[i % 6].seconds)
                fault = Fault(kinds=0, jump=(jump, self.random.choice((-400, -1, 1, 4000)) * DAY))
                self._uptraining(row, trainings[i % 6], fault, lambda ended: False)

    def _call(self, training: Training, i: int) -> int:
        """A call at random; every third time of the last, which put the result in its place."""
        calls = training.calls
        return self.random.randrange(max(1, calls - 70) if i % 3 == 2 else 1, calls)

    def _training(self, family: str, flags: tuple[str, ...]) -> Training:
        folder = self.outputs[family, (*self.HEADS, *self.PLAIN)]
        command = ["out", "--recipe", self.scratch / "recipe.yaml", "--device", "cpu", "--quiet", *flags]
        work = self.work()
        shutil.copytree(folder, work / "out")
        load_as_it_does(self.uptrain, command, work)
        shutil.rmtree(work / "out")
        shutil.copytree(folder, work / "out")
        ended = Run(self.uptrain, command, work, Fault(kinds=WRITES | REMOVALS)).end()
        assert ended.code == 0 and names(work) == {"out"}, (ended.error, names(work))
        whole = reference(work / "out")
        shutil.rmtree(work)
        return Training(folder, command, flags, whole, ended.seconds, ended.calls)

    def _uptraining(
        self,
        row: Row,
        training: Training,
        fault: Fault | None,
        fits: Callable[[Ended], bool],
        meanwhile: Callable[[Run, float], None] = lambda run, seconds: None,
    ) -> None:
        work = self.work()
        shutil.copytree(training.folder, work / "out")
        before = tree(work / "out")
        run = Run(self.uptrain, training.command, work, fault)
        meanwhile(run, training.seconds)
        ended = run.end()
        failed = self.judge(row, work, before, training.whole, ended, fits, {"out", "out.uptraining"})
        as_before = tree(work / "out") == before
        if not as_before and "still the converted model" in ended.error:
            row.say("wrong_messages", ended.error)
            failed = True
        command = training.command
        if as_before and any(work.glob("out.uptraining/*/checkpoint-*/complete")):
            row.say("resumed", "")
            command = ["out", "--resume", "--device", "cpu", "--quiet", *training.flags]
        after = Run(self.uptrain, command, work, None).end()  # where the first was done, a second uptraining
        failed |= self.settled(row, work, after, not as_before or work / "out" in training.whole, {"out"})
        row.counts["failed_trials"] += failed
        shutil.rmtree(work)


def _names(error: str, *texts: str) -> bool:
    return one_line(error) and any(text in error for text in texts)


def _fits_signal(number: int, training: bool = False) -> Callable[[Ended], bool]:
    def fits(ended: Ended) -> bool:
        if number == signal.SIGKILL:
            return ended.code == -number
        if number == signal.SIGTERM:
            # Before the command could prepare for it the system ends it: 143 to a shell, too.
            return ended.code in (143, -number) and not ended.error
        said = (
            "interrupted; nothing half-written was kept",
            *(("is still the converted model", "is uptrained") if training else ()),
        )
        return ended.code == 130 and _names(ended.error, *said)

    return fits


def _fits_disk(number: int, training: bool = False) -> Callable[[Ended], bool]:
    text = "disk is full" if number == errno.ENOSPC else os.strerror(number)

    def fits(ended: Ended) -> bool:
        said = (text, os.strerror(number), *(("the disk is full or failing",) if training else ()))
        return ended.code == 2 and _names(ended.error, *said)

    return fits


def _fits_locked(ended: Ended) -> bool:
    return ended.code == 2 and _names(ended.error, "cannot be written", "Permission denied")


def write_source(folder: Path, family: str, seed: int) -> None:
    """A tiny random model with its sample's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from sqa_convert.checkpoints.find import SAMPLES

    torch.manual_seed(seed)
    sample = SAMPLES / family
    if family == "gpt2":
        config = AutoConfig.from_pretrained(sample, n_embd=48, n_head=6, n_layer=2, n_inner=None)
        model = AutoModelForCausalLM.from_config(config)
    else:
        config = AutoConfig.from_pretrained(
            sample, d_model=24, d_kv=8, num_heads=6, d_ff=48, num_layers=1, num_decoder_layers=1
        )
        model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(folder)
    for path in sample.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


KINDS = ("random_kills", "calls", "vanishing", "changing_sources", "two_at_once", "clocks", "uptrainings")


def bench(options: argparse.Namespace) -> int:
    import transformers

    import sqa_convert.calibration.calibrate
    import sqa_convert.evaluation.evaluate
    import sqa_convert.models
    import sqa_convert.pipeline.run
    import sqa_convert.uptraining.uptrain  # noqa: F401 - loaded here once, not in every trial

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "safetensors", "sqa-convert")}
        | {"python": platform.python_version(), "kernel": platform.release()},
        "date": date.today().isoformat(),
        "seed": options.seed,
        "short": options.short,
    }
    print(json.dumps(result), flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        trials = Bench(Path(scratch).resolve(), options.seed, 0.1 if options.short else 1.0)
        for kind in options.only or KINDS:
            getattr(trials, kind)()
    result["rows"] = {row.kind: row.as_json() for row in trials.rows}
    if options.only and not options.short and (RESULTS / "faults.json").exists():
        known = json.loads((RESULTS / "faults.json").read_text())
        result["rows"] = known["rows"] | result["rows"]
    sums = {
        key: sum(row[key] for row in result["rows"].values())
        for key in ("trials", "met", "survived", "bus_errors", *Row.BAD)
    }
    result["sum"] = sums | {"seconds": round(sum(row["seconds"] for row in result["rows"].values()))}
    print(json.dumps(result["sum"]))
    if not options.short:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "faults.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any(sums[key] for key in Row.BAD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the trials; writes no results")
    parser.add_argument("--only", action="append", choices=KINDS, help="these anew; the other results stay")
    parser.add_argument("--seed", type=int, default=0)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    parser.add_argument("--scratch", metavar="FOLDER", default=memory, help="to work in; default: in memory")
    options = parser.parse_args()
    if SHIM in os.environ:
        sys.exit(bench(options))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        sys.exit("faults are injected on Linux, by a library that is compiled here: install a C compiler")
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder, "faults.so")
        command = [compiler, "-shared", "-fPIC", "-O1", "-D_LARGEFILE64_SOURCE", "-x", "c", "-o", shim, "-", "-ldl"]
        subprocess.run(command, input=SHIM_SOURCE, text=True, check=True)
        environment = os.environ | {
            SHIM: str(shim), "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200",
        }  # fmt: skip
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
