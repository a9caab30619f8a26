"""sqa-bench: how fast a converted model is beside its source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CheckpointError, OutputError, RecipeError, one_line
from ..parse_amounts import amount
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import EXIT_CODES, SAY, AsJson, Device, Quiet, TrustRemoteCode, Verbose, Version, make_app
from .show_results import show_report

GRID = "One attention layer of random weights"
RESULT = "speed.json"
app = make_app()
EXAMPLES = (
    "sqa-bench gpt2-sqa-q10kv5 --lengths 64 --repeats 2",
    "sqa-bench --head-grid --lengths 64 --modes prefill --repeats 2",
)
FIRST = ("lengths", "modes", "parts", "details", "output", "head_grid", "device")


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders, hub ids, samples; the first is what the others are compared with. "
            "A converted folder alone is compared with what it was made from.",
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens, such as 1k,4k,131072 (1k = 1,024). Default: by device.")
    ] = None,
    modes: Annotated[str, typer.Option(metavar="A,B", help="Of prefill, decode, train.")] = "prefill,decode,train",
    parts: Annotated[
        str, typer.Option(metavar="A,B", help="Of model (the whole), attention (one layer).")
    ] = "model,attention",
    batch: Annotated[int, typer.Option(metavar="N", help="Rows.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    device: Device = "auto",
    attn: Annotated[
        str, typer.Option(help="sdpa, eager, flash_attention_2, flash_attention_3, flex_attention.")
    ] = "sdpa",
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile, dynamic shapes.")] = False,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds; each times every model once.")] = 5,
    head_grid: Annotated[
        bool, typer.Option("--head-grid", rich_help_panel=GRID, help="Measure that instead of models.")
    ] = False,
    heads: Annotated[int, typer.Option(metavar="N", rich_help_panel=GRID, help="Heads of mha.")] = 16,
    head_dim: Annotated[int, typer.Option(metavar="N", rich_help_panel=GRID, help="Size of a head.")] = 16,
    variants: Annotated[
        str | None,
        typer.Option(metavar="A,B", rich_help_panel=GRID, help="Of the names of --variant, mha, or Hq/Hkv."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for speed.json and plots. A converted FOLDER gets them anyway."),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also times, tokens a second, memory and cache of every model.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", rich_help_panel=SAY, help="The rows as CSV on stdout.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
) -> None:
    """Time, memory and cache of models side by side, and what counting operations and bytes would promise.

    [bold]sqa-bench gpt2-sqa-q8kv4 --lengths 256,1k[/bold]
    """
    if as_json and as_csv:
        raise RecipeError("--json or --csv: give one")
    out = Out(as_json=as_json, quiet=quiet or as_csv, verbose=verbose)
    names = list(models or [])
    if head_grid == bool(names):
        raise RecipeError("give MODEL, or --head-grid without one")
    from ..checkpoints.find import local_folder
    from ..checkpoints.small_files import write_json
    from ..checkpoints.staging import expanded
    from ..report.report_json import REPORT, read_report
    from ..report.speed_table import speed_csv, speed_details, speed_rows, speed_sentence, speed_title
    from ..report.write import write_report, write_speed_pictures
    from ..speed.bench import bench, bench_layers
    from ..speed.settings import GRID as PAPER
    from ..speed.settings import Settings

    out.quieten_libraries()
    settings = Settings(
        lengths=parse_lengths(lengths), modes=_words(modes), parts=_words(parts), batch=batch, dtype=dtype,
        device=device, attention=attn, compiled=compiled, repeats=repeats,
    )  # fmt: skip
    settings.check()
    if output is not None:
        output = expanded(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            if not os.access(output, os.W_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise OutputError(f"--output {str(output)[:200]} cannot be written to: {one_line(error)}") from error
    folders: dict[str, Path] = {}
    with out.progress() as progress:
        if head_grid:
            result = bench_layers(heads, head_dim, _words(variants) if variants else PAPER, settings, progress)
        else:
            folders = _resolve(names)
            result = bench(folders, settings, trust_remote_code=trust_remote_code, progress=progress)
    out.json(result)
    if as_csv:
        print(speed_csv(result), end="")
    alone = len(result["heads"]) == 1
    out.words(speed_title(result))
    if not alone:
        out.table("", *speed_rows(result))
    for what, table in speed_details(result) if details or alone else ():
        out.table(what, *table)
    if not alone:
        out.words(speed_sentence(result))
    try:
        if output is not None:
            write_json(output / RESULT, result)
            write_speed_pictures(output, result)
            out.result(f"written: {output / RESULT}, speed.svg, speed.png")
        for name in names[1:] if len(names) > 1 else names:
            folder = local_folder(name)
            if folder is not None and (folder / REPORT).is_file() and "cost" in read_report(folder):
                write_report(folder, read_report(folder) | {"speed": result})
                show_report(out, folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise OutputError(f"the measurements cannot be written: {one_line(error)}") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """ "1k,4096" as (1024, 4096). Raises RecipeError."""
    return tuple(dict.fromkeys(amount(word, "--lengths", thousand=1024) for word in _words(text or "")))


def _resolve(names: list[str]) -> dict[str, Path]:
    """Folders by the names to show. To a converted model alone its source is added, first."""
    from ..checkpoints.find import resolve
    from ..report.report_json import REPORT, read_report

    folders: list[tuple[str, Path]] = [(name, resolve(name)) for name in names]
    if len(folders) == 1 and (folders[0][1] / REPORT).is_file():
        source = read_report(folders[0][1])["source"]
        folders.insert(0, (source["name"], resolve(source["name"], source["revision"])))
    short = {name: Path(name).name or name for name, _ in folders}
    unique = len(set(short.values())) == len(folders)
    if len(short) < len(folders):
        raise RecipeError(f"{', '.join(names)}: the same model twice")
    return {short[name] if unique else name: folder for name, folder in folders}


def main() -> None:
    """Entry point of `sqa-bench`."""
    run_app(app, "sqa-bench")


if __name__ == "__main__":
    main()
