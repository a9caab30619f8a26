"""sqa-report: two conversions side by side, as one page, from their reports"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OutputError, RecipeError
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import EXIT_CODES, AsJson, Quiet, Verbose, Version, make_app

app = make_app()
FIRST = ("output",)
EXAMPLES = (
    "sqa-convert sample:gpt2 --variant gqa --no-calibration -o gpt2-gqa",
    "sqa-report gpt2-sqa-q10kv5 gpt2-gqa",
)


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def report_command(
    first: Annotated[Path, typer.Argument(metavar="FOLDER", help="What sqa-convert wrote.")],
    second: Annotated[Path, typer.Argument(metavar="FOLDER", help="Likewise, to hold against it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page. Default: ./A-beside-B.html.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
) -> None:
    """Two conversions side by side, from their report.json: what each lost and needs, where, and how it was made.

    [bold]sqa-report gpt2-sqa-q8kv4 gpt2-sqa-q10kv5[/bold]
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..checkpoints.staging import expanded, write_text
    from ..report.two_reports import (
        beside_page,
        compared,
        cost_rows,
        differences,
        names_of,
        needed,
        quality_rows,
        read_two,
    )

    folders = [expanded(first, "FOLDER"), expanded(second, "FOLDER")]
    one, other = read_two(folders)
    if folders[0].resolve() == folders[1].resolve():
        raise RecipeError(f"{first} and {second} are the same folder: give two")
    reports, names = (one, other), names_of(folders)
    stems = [folder.resolve().name for folder in folders]
    path = Path(f"{stems[0]}-beside-{stems[1]}.html") if output is None else expanded(output)
    if path.is_dir():
        raise OutputError(f"--output {path} is a folder: give a file")
    if path.exists() and not overwrite:
        raise OutputError(f"--output {path} exists already: give another, or --overwrite")
    page, new = beside_page(reports, names), path.with_name(f".{path.name}.new")
    try:
        write_text(new, page)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OutputError(f"--output {path} cannot be written: {error.strerror}") from error
    case, said = compared(reports, names)
    notes, quality = differences(reports), quality_rows(reports, names)
    out.json(
        {"schema": 1, "folders": list(map(str, folders)), "case": case, "text": said, "differences": notes}
        | {"page": str(path)}
    )
    if quality:
        out.table("what each lost", *quality)
    out.table("what each needs", *cost_rows(reports, names))
    for note in notes:
        out.words(f"note: {note}")
    out.words(said)
    out.words(needed(reports, names))
    out.result(f"report: {path}")


def main() -> None:
    """Entry point of `sqa-report`."""
    run_app(app, "sqa-report")


if __name__ == "__main__":
    main()
