"""sqa-sweep: what a model loses and costs at many numbers of heads, to choose among them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..conversion.request import Calibration
from ..errors import QualityError, RecipeError
from ..text.formats import TEXT_COLUMN
from . import convert_flags as flags
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import EXIT_CODES, AsJson, Device, Quiet, Verbose, Version, make_app
from .targets import needs_times, read_targets, told

RESULT, PICTURE = "sweep.json", "frontier.svg"

app = make_app()
EXAMPLES = ("sqa-sweep sample:gpt2 --settings 10/5,8/4 --calibration-tokens 4k --refine-steps 10 --no-speed",)
FIRST = ("settings", "target", "data", "output", "device", "no_speed")


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def sweep_command(
    model: flags.Model,
    settings: Annotated[
        str | None,
        typer.Option(metavar="A/B,C/D", help="Query/key-value heads to try. Default: some twenty, by MODEL's heads."),
    ] = None,
    target: flags.Target = None,
    sites: flags.Sites = None,
    data: flags.Data = None,
    text_column: flags.TextColumn = None,
    calibration_tokens: flags.CalibrationTokens = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of layer-wise training, for each layer at each setting. Default: up to 30."),
    ] = None,
    memory: flags.Memory = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not time the points of the frontier.")] = False,
    revision: flags.Revision = None,
    subfolder: flags.Subfolder = None,
    tokenizer: flags.Tokenizer = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the table, picture and page. Default: ./NAME-sweep."),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
) -> None:
    """How much quality each number of heads costs, and what it saves: the same in each layer, and shared out.

    [bold]sqa-sweep gpt2 --target "kl<=0.05" --target "cache<=0.5x"[/bold]
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    targets = read_targets(target, timed=not no_speed)
    asked: dict[str, Any] = {
        "settings": None if settings is None else read_settings(settings), "sites": sites, "data": data,
        "text_column": text_column or TEXT_COLUMN, "revision": revision, "subfolder": subfolder, "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code, "device": device, "seed": seed,
        "speed": False if no_speed else needs_times(targets) or None,
        "calibration": Calibration(tokens=calibration_tokens, refine_steps=refine_steps, memory=memory),
    }  # fmt: skip
    from ..checkpoints.small_files import write_json
    from ..checkpoints.staging import check_output, expanded, staged_output, write_text

    name = Path(model.removeprefix("sample:")).expanduser().resolve().name or "model"
    folder = Path(f"{name}-sweep") if output is None else expanded(output)
    check_output(folder, False, way_out="give another")
    if text_column and data is None:
        raise RecipeError("--text-column names a column of --data: give that, too")
    with out.progress() as progress:
        out.quieten_libraries()
        from ..pipeline.sweep import sweep

        points = sweep(model, progress=progress, **asked)
    from ..report.sweep_report import SWEEP_PAGE, frontier_picture, sweep_page

    result = points.to_json()
    picked = None
    if targets:
        picked = told(points, targets)
        result["target"] = {"asked": target, "point": picked[0].name, "holds": picked[1]}
    with staged_output(folder, False, 2**20) as place:
        write_json(place / RESULT, result)
        (place / PICTURE).write_bytes(frontier_picture(result, "svg"))
        write_text(place / SWEEP_PAGE, sweep_page(result))
    _show(out, result, folder)
    if picked is None:
        knee = next((point for point in points if point.knee), None)
        if knee is not None:
            out.result(f"at the knee: {knee.command(model, points.info['asked_flags'])}")
        return
    point, holds, said = picked
    if not holds:
        raise QualityError(f"{said}; to convert to that: {point.command(model, points.info['asked_flags'])}")
    out.words(said)
    out.result(f"next: {point.command(model, points.info['asked_flags'])}")


def _show(out: Out, result: dict[str, Any], folder: Path) -> None:
    from ..report.sweep_report import SWEEP_PAGE, sweep_lines, sweep_rows

    out.json(result)
    out.table(result["source"], *sweep_rows(result["points"]))
    for line in sweep_lines(result):
        out.words(line)
    out.words(f"seconds: {', '.join(f'{stage} {seconds:g}' for stage, seconds in result['seconds'].items())}")
    out.result(f"report: {folder / SWEEP_PAGE}")


def read_settings(text: str) -> list[tuple[int, int]]:
    """ "8/4,6/3" as pairs. Raises RecipeError."""
    pairs = []
    for word in text.split(","):
        query, _, key_value = word.strip().partition("/")
        if not (query.isdecimal() and key_value.isdecimal()):
            raise RecipeError(f"--settings {text}: give query/key-value heads such as 8/4,6/3")
        pairs.append((int(query), int(key_value)))
    return pairs


def main() -> None:
    """Entry point of `sqa-sweep`."""
    run_app(app, "sqa-sweep")


if __name__ == "__main__":
    main()
