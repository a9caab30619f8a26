"""How torch's threads wait for each other: asleep where other programs need the cores, awake where there is room.

A thread that waits awake holds a core, on which the one it waits for could run: on two cores, one of them busy, a
conversion took four times as long. Where there is room, sleeping costs a third of the time.
"""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
_LOOKED = 0.3  # seconds: over 0.1 the system counts in steps that are too large to tell


def let_threads_sleep_where_cores_are_busy() -> None:
    """Before torch is imported, which reads it once; later nothing is done. What the environment says stays."""
    if POLICY not in os.environ and "torch" not in sys.modules and _busy():
        os.environ[POLICY] = "PASSIVE"


def _busy() -> bool:
    """Whether other programs leave fewer cores than torch has threads."""
    import psutil

    cores = psutil.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else min(ours, psutil.cpu_count(logical=False) or ours)
    taken = cores * psutil.cpu_percent(interval=_LOOKED) / 100
    return threads > 1 and threads > cores - taken + 0.5
