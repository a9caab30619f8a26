"""What the caller has set, in torch and in Python: the work is done as if nothing was, and all of it stays.

Everything here is of the whole process or thread: grad mode, autocast, default dtype and device, random states, warning
filters, log levels, the environment. So public functions run one at a time; a second thread waits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from .flags_as_arguments import names_arguments

P = ParamSpec("P")

R = TypeVar("R")

_ONE_AT_A_TIME = threading.RLock()

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_KERNELS = ("flash", "mem_efficient", "math", "cudnn")  # of scaled dot product attention


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that neither depends on what its caller has set, nor changes it; its errors name arguments."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
            for state in (_environment, _random, _warnings, _logging, _signals):
                stack.enter_context(state())
            # Who has not imported them has set nothing; some conversions need neither.
            if "numpy" in sys.modules:
                stack.enter_context(_numpy())
            if "torch" in sys.modules:
                stack.enter_context(_torch())
            return function(*args, **kwargs)

    return names_arguments(wrapper)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextlib.contextmanager
def _random() -> Iterator[None]:
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """A library's warning is no error, whatever the caller makes of warnings."""
    with warnings.catch_warnings():
        filters = [("default" if f[0] == "error" else f[0], *f[1:]) for f in warnings.filters]
        warnings.filters[:] = filters  # type: ignore[index]
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Libraries set levels and handlers when they are imported, some later too."""
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    loggers = [logging.root, *named]
    before = [(o.level, o.handlers[:], o.propagate, o.disabled) for o in loggers]
    disabled = logging.root.manager.disable
    try:
        yield
    finally:
        logging.disable(disabled)
        for logger, (level, handlers, propagate, off) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, off


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                with contextlib.suppress(ValueError):  # not in the main thread, which alone can change them
                    signal.signal(number, handler)


@contextlib.contextmanager
def _numpy() -> Iterator[None]:
    import numpy as np

    before = np.random.get_state()
    try:
        with np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
            yield
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def _torch() -> Iterator[None]:
    import torch  # waits for a thread that is importing it

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        _torch_settings(),
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        # Within this block torch.as_tensor moves what it is given, so it is entered only where a caller has another.
        contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        contextlib.ExitStack() as stack,
    ):
        for device in ("cpu", "cuda", "mps", "xpu"):
            with contextlib.suppress(RuntimeError):  # a kind of device that this build has not
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _torch_settings() -> Iterator[None]:
    """Those that torch has no context manager for, as they are from the start."""
    import torch

    kernels = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _KERNELS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    dtype, threads, precision = torch.get_default_dtype(), torch.get_num_threads(), "highest"
    with contextlib.suppress(RuntimeError):  # it is set by torch's newer names, which forbid the older ones
        precision = torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    _put(dict.fromkeys(kernels, True), "highest", precision)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _put(kernels, precision, "highest")
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _put(kernels: dict[str, bool], precision: str, before: str) -> None:
    import torch

    for name, enabled in kernels.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)
    if precision != before:
        torch.set_float32_matmul_precision(precision)
