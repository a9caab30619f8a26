"""Flags that several commands have, and what they mean everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import RecipeError
from ..parse_amounts import amount

SAY = "What is said"
EXIT_CODES = (
    "\n\nExit codes: 0 done · 1 unexpected · 2 usage, recipe, data or output · 3 source · 4 a quality gate · "
    "130 interrupted · 143 terminated."
)
TEXT = "Text or a table of it: file, folder, glob, or hub data set ID[:CONFIG]. Default: Python's own standard library."


TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Of tables: the column that holds the text. Default: text. Of plain text, line: each line is a document.",
    ),
]


def make_app() -> typer.Typer:
    """A command of this package."""
    return typer.Typer(
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )


def count(least: int = 0) -> Callable[[str], int]:
    """A flag's parser: a whole number, also as 400k or 5M, of at least so many."""

    def parse(text: str) -> int:
        try:
            number = amount(text, "")
        except RecipeError as error:
            raise typer.BadParameter(str(error)) from error
        if number < least:
            raise typer.BadParameter(f"{number:,} is less than {least:,}.")
        return number

    return parse


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sqa-convert {__version__}")
        raise typer.Exit


def listing(show: Callable[[], Any]) -> Callable[[bool], None]:
    """A flag's callback that shows something and stops."""

    def callback(wanted: bool) -> None:
        if wanted:
            show()
            raise typer.Exit

    return callback


AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=SAY, help="One JSON object on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=SAY, help="Only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", rich_help_panel=SAY, help="Also what the libraries log.")]
Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, rich_help_panel=SAY, help="Show the version.")
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Then upload the folder, as NAME or OWNER/NAME; private."),
]
Public = Annotated[bool, typer.Option("--public", help="A repository made by --push-to-hub is public.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code that the source brings along run. Default: never.")
]
