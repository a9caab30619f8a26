"""sqa-uptrain: a converted model in, the same model closer to its source out."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints.find import SAMPLE_PREFIX
from ..checkpoints.small_files import REPORT
from ..checkpoints.staging import expanded
from ..errors import CheckpointError, RecipeError
from ..report.report_json import read_report
from ..uptraining.recipe import dump_recipe, load_recipe, recipe_names, summary
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import (
    EXIT_CODES,
    TEXT,
    AsJson,
    Device,
    Public,
    PushToHub,
    Quiet,
    TextColumn,
    TrustRemoteCode,
    Verbose,
    Version,
    count,
    listing,
    make_app,
)  # fmt: skip
from .show_results import push, show_quality, show_report, show_verdict

app = make_app()
EXAMPLES = (
    "sqa-uptrain gpt2-sqa-q10kv5 --dry-run",
    "sqa-uptrain gpt2-sqa-q10kv5 --tokens 20k",
    "sqa-uptrain --list-recipes",
)
FIRST = ("recipe", "data", "tokens", "output", "resume", "device", "dry_run", "list_recipes")


def _list_recipes() -> None:
    for name in recipe_names():
        print(f"{name:14} {summary(name)}")


def _check_converted(given: Path) -> None:
    """Raises CheckpointError where what is given is a model that nobody has converted, with what to do first."""
    name = str(given)
    if name.startswith(SAMPLE_PREFIX) or ((given / "config.json").is_file() and not (given / REPORT).is_file()):
        raise CheckpointError(
            f"{name} was not made by sqa-convert: convert it first (sqa-convert {shlex.quote(name)} --q-groups N "
            "--kv-groups M), and give the folder that comes of it"
        )


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def uptrain_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Made by sqa-convert; the best of what is trained takes its place.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="A recipe's name (see --list-recipes) or a YAML file. Default: quick."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The unconverted model. Default: as the report names it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=TEXT + " Instead of the recipe's.")] = None,
    text_column: TextColumn = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=count(), help="Instead of the recipe's; also as 400k or 5M.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Instead of the recipe's.")] = None,
    loss: Annotated[str | None, typer.Option(help="kl, ce or mix, instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the source on the same tokens, for comparison.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped, by its recipe.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw such a run away and begin again.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new folder for the result; FOLDER stays as it is.")
    ] = None,
    keep_anyway: Annotated[
        bool,
        typer.Option("--keep-anyway", help="Take what was trained, even if it is worse; alone: of the last run."),
    ] = False,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Do not measure loss and KL.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the recipe as it would run, and stop.")] = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
    list_recipes: Annotated[
        bool,
        typer.Option("--list-recipes", callback=listing(_list_recipes), is_eager=True, help="Show the recipes."),
    ] = False,
) -> None:
    """Train a converted model for a while, towards the model it was made from.

    [bold]sqa-uptrain gpt2-sqa-q8kv4 --recipe gpt2-small --control[/bold]

    Several GPUs: [bold]torchrun --nproc-per-node 8 -m sqa_convert.cli.uptrain FOLDER …[/bold]
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    changes = {
        "data": data,
        "text_column": text_column,
        "tokens": tokens,
        "learning_rate": learning_rate,
        "loss": loss,
        "seed": seed,
        "control": control or None,
    }
    given = {"recipe": recipe, "restart": restart or None, **changes}
    if resume and (flags := [f"--{k.replace('_', '-')}" for k, v in given.items() if v is not None]):
        raise RecipeError(f"--resume goes on with the recipe of the stopped run: leave out {', '.join(flags)}")
    _check_converted(folder)
    folder = expanded(folder, "FOLDER")
    if keep_anyway:
        from ..uptraining.run_folder import goes_on

        resume = goes_on(folder, resume, keep_anyway, *given.values())
    resolved = None if resume else load_recipe(recipe or "quick", **changes)
    read_report(folder)  # before torch is loaded
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    out.quieten_libraries()
    from ..publish import check_push
    from ..uptraining import processes
    from ..uptraining.run_folder import target_folder
    from ..uptraining.uptrain import check_uptrain, uptrain

    out.quiet |= not processes.is_first()  # of many processes one speaks
    if push_to_hub is not None:
        check_push(push_to_hub)
    asked: dict[str, Any] = {
        "source": source,
        "device": device,
        "evaluate": not no_evaluate,
        "resume": resume,
        "restart": restart,
        "output": output,
        "keep_anyway": keep_anyway,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        resolved = check_uptrain(folder, resolved, **asked)
        out.json({"schema": 1, "recipe": dataclasses.asdict(resolved), "steps": resolved.steps})
        out.result(dump_recipe(resolved) + f"# {resolved.steps:,} steps of {resolved.tokens_per_step:,} tokens")
        return
    target = target_folder(folder, None if output is None else expanded(output), resume)
    with out.progress() as progress:
        report = uptrain(folder, resolved, **asked, progress=progress)
    processes.leave()
    if not processes.is_first():
        if (where := report.get("uptrained_on")) and processes.is_writer() and not quiet:
            print(f"the result goes to {where}; here {folder} is as it was", file=sys.stderr)
        return
    out.json(report)
    show_quality(out, report)
    show_report(out, target)
    show_verdict(out, report, target)
    push(out, target, push_to_hub, public)


def main() -> None:
    """Entry point of `sqa-uptrain`."""
    run_app(app, "sqa-uptrain")


if __name__ == "__main__":
    main()
