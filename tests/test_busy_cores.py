"""Threads wait asleep where other programs need the cores."""

import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from sqa_convert.cli.busy_cores import POLICY, let_threads_sleep_where_cores_are_busy


@pytest.mark.parametrize(
    ("cores", "physical", "busy_percent", "environment", "expected"),
    [
        (2, 2, 50, {}, "PASSIVE"),
        (2, 2, 2, {}, None),
        (8, 4, 30, {}, None),  # 4 threads, and 5.6 cores are free
        (8, 4, 90, {}, "PASSIVE"),
        (8, None, 30, {}, "PASSIVE"),  # 8 threads
        (2, 2, 50, {"OMP_NUM_THREADS": "1"}, None),  # nobody to wait for
        (8, 4, 30, {"OMP_NUM_THREADS": "8,2"}, None),
        (8, 4, 30, {"OMP_NUM_THREADS": "8"}, "PASSIVE"),
        (2, 2, 50, {POLICY: "ACTIVE"}, "ACTIVE"),
        (None, None, 50, {}, None),
    ],
)
def test_threads_sleep_where_cores_are_busy(monkeypatch, cores, physical, busy_percent, environment, expected):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: cores if logical else physical)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy_percent)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores or 1), raising=False)
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    let_threads_sleep_where_cores_are_busy()
    assert os.environ.get(POLICY) == expected


def test_nobody_looks_where_torch_is_imported_already(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: pytest.fail("looked"))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    let_threads_sleep_where_cores_are_busy()
    assert os.environ == {}


def test_a_command_that_computes_looks_and_help_does_not(called, monkeypatch):
    from sqa_convert.cli import console, evaluate

    looked = []
    monkeypatch.setattr(console, "let_threads_sleep_where_cores_are_busy", lambda: looked.append(SimpleNamespace()))
    called(evaluate.main, "--help")
    assert not looked
    called(evaluate.main, "nothing-of-that-name")
    assert len(looked) == 1
