"""The only place that prints or exits: results on stdout, all else on stderr, errors as one line with their code."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import typer
from rich.console import Console

from ..checkpoints.staging import NOWHERE, here
from ..errors import RecipeError, SQAError
from ..flags_as_arguments import flags_named
from ..progress import hear_others
from ..report.provenance import asked_by
from .brief_help import called_here
from .busy_cores import let_threads_sleep_where_cores_are_busy
from .stage_display import showing
from .streams import forgiving_streams
from .tables_that_fit import fitted_table

INTERRUPTED = 130
_WIDE = 200
TERMINATED = 143


class Out:
    """What a command says, and how loudly."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        # Names hold brackets and colons: none of them is markup.
        self.stdout = Console(markup=False, emoji=False, highlight=False)
        self.stderr = Console(markup=False, emoji=False, highlight=False, stderr=True)

    def quieten_libraries(self, transformers: bool = True) -> None:
        """Only what this program says reaches the terminal, unless --verbose.

        Args:
            transformers: whether it is going to be used; importing it takes longer than many a conversion.
        """
        if transformers:
            let_threads_sleep_where_cores_are_busy()
        if self.verbose:
            hear_others()
            return
        import logging
        import os
        import warnings

        warnings.simplefilter("ignore")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logging.disable(logging.WARNING)
        from huggingface_hub.utils import disable_progress_bars

        if transformers:
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
        if self.quiet or self.as_json or not self.stderr.is_terminal:
            disable_progress_bars()

    def progress(self, title: str = "") -> AbstractContextManager[Callable[..., None]]:
        """A callback (stage, done, total, news) that shows how far the work is; `title` says what is being done."""
        return showing(self.stderr, visible(title), self.quiet or self.as_json)

    def table(self, title: str, columns: list[str], rows: list[tuple[str, ...]]) -> None:
        if self.as_json or self.quiet:
            return
        # A log or a pipe has no width.
        known = self.stdout.is_terminal or "COLUMNS" in os.environ
        width = self.stdout.width if known else _WIDE
        table = fitted_table([visible(column) for column in columns], [tuple(map(visible, row)) for row in rows], width)
        if title:
            self.stdout.print(visible(title), style="bold", soft_wrap=not known)
        self.stdout.print(table, width=width)

    def result(self, text: str) -> None:
        if not self.as_json and not self.quiet:
            self.stdout.print(visible(text), soft_wrap=True)

    def notice(self, text: str) -> None:
        """A line on stderr that is no error."""
        if not self.as_json and not self.quiet:
            self.stderr.print(visible(text), soft_wrap=True)

    def words(self, text: str) -> None:
        """Sentences, broken between words in a terminal."""
        if not self.as_json and not self.quiet:
            self.stdout.print(visible(text), soft_wrap=not self.stdout.is_terminal)

    def json(self, content: dict[str, Any]) -> None:
        if self.as_json:
            print(json.dumps(_finite(content), allow_nan=False))


def visible(text: str) -> str:
    """Text without characters that steer a terminal: a model may write any, and a folder's name may hold them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _finite(content: Any) -> Any:
    """Content with null for numbers that are not finite, which JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def run_app(app: Any, name: str) -> NoReturn:
    """Runs a typer app as the command `name`. Errors become one line on stderr and their documented exit code."""
    import signal

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # what started us may want us to go on
        # A terminated run clears its temporary folder as an interrupted one does.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.unraisablehook = _stop_after_all
    with asked_by(shlex.join([name, *sys.argv[1:]])), forgiving_streams(), flags_named():
        _run(app, name)


def _usual(app: Any, error: Any) -> str:
    """What a flag that there is not is called here, for who knows it from other programs; mostly nothing."""
    known = {flag for param in typer.main.get_command(app).params for flag in param.opts}
    given = getattr(error, "option_name", None) or ""
    here = called_here(given, known)
    return f"No such option: {given}, {here}." if here else ""


def _run(app: Any, name: str) -> NoReturn:
    if not here():
        _fail(NOWHERE, RecipeError.exit_code)
    try:
        if len(sys.argv) == 1:  # who gives nothing wants to know what to give
            with contextlib.redirect_stdout(sys.stderr):
                app(args=["--help"], prog_name=name, standalone_mode=False)
            sys.exit(RecipeError.exit_code)
        code = app(prog_name=name, standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer makes a code of the interruption
            raise KeyboardInterrupt
        sys.exit(code)
    except SQAError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing half-written was kept", INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors about flags have it
            if sys.flags.optimize > 1:
                _fail("transformers needs docstrings: leave out -OO, or unset PYTHONOPTIMIZE", RecipeError.exit_code)
            raise
        _fail(f"{_usual(app, error) or error.format_message()} See {name} --help.", RecipeError.exit_code)


def _stop_after_all(ignored: Any) -> None:
    """Sends a signal again, later, whose exception Python ignored because an object was being cleared away.

    `ignored` is what `sys.unraisablehook` is given; of all else Python's own hook tells.
    """
    import signal
    import threading

    if isinstance(ignored.exc_value, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(ignored.exc_value, SystemExit) and ignored.exc_value.code == TERMINATED:
        number = signal.SIGTERM
    else:
        sys.__unraisablehook__(ignored)
        return
    if sys.is_finalizing():
        return
    # On Windows os.kill ends a process; elsewhere it also wakes a main thread that waits.
    send = signal.raise_signal if os.name == "nt" else partial(os.kill, os.getpid())
    again = threading.Timer(0.05, send, (number,))
    again.daemon = True
    again.start()


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of many processes on a machine one speaks
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
