"""Help in two lengths: the flags a first user needs, and all; and what flags of other programs are called here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

_ALL = "sqa_convert.help_all"

SAID = ("as_json", "quiet", "verbose")
"""flags that every short help shows, beside --help"""

_USUAL = {
    "--q-groups": ("--q-heads", "--query-heads", "--num-q-heads", "--num-query-heads", "--n-heads", "--num-heads"),
    "--kv-groups": ("--kv-heads", "--num-kv-heads", "--num-key-value-heads", "--n-kv-heads", "--kv", "--num-kv-groups"),
    "--learning-rate": ("--lr", "--max-lr", "--peak-lr"),
    "--tokens": ("--steps", "--max-steps", "--num-steps", "--epochs", "--num-epochs", "--num-train-epochs"),
    "--data": ("--dataset", "--dataset-name", "--text", "--corpus", "--train-file", "--data-path"),
    "--output": ("--out", "--output-dir", "--out-dir", "--save", "--outdir"),
    "--overwrite": ("--force", "--overwrite-output-dir"),
    "--recipe": ("--config", "--config-file"),
    "--calibration-tokens": ("--nsamples", "--num-samples", "--calibration-samples"),
    "--source": ("--teacher", "--teacher-model"),
    "--against": ("--reference", "--baseline", "--compare"),
    "--lengths": ("--seq-len", "--sequence-length", "--length", "--seqlen"),
    "--repeats": ("--runs", "--iterations", "--rounds"),
}
_HERE = {other: name for name, others in _USUAL.items() for other in others}


def brief(*names: str) -> type[TyperCommand]:
    """The class of a command whose --help shows these parameters, and --help-all the others too."""

    first = {*names, *SAID, "help", "help_all", "version"}

    class Brief(TyperCommand):
        short = False

        def get_params(self, ctx: Any) -> list[Any]:
            params = super().get_params(ctx)
            for option in (param for param in params if isinstance(param, TyperOption)):
                if option.is_flag and option.metavar is None:
                    option.metavar = ""  # else it is said to take a <bool>
                option.hidden = self.short and option.name not in first
                panel = option.__dict__.setdefault("own_panel", option.rich_help_panel)
                told = option.name in SAID
                option.rich_help_panel = panel if told or not self.short else None
            return params

        def format_help(self, ctx: Any, formatter: Any) -> None:
            self.short = _ALL not in ctx.meta
            try:
                super().format_help(ctx, formatter)
            finally:
                self.short = False

    return Brief


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help(), nl=False)
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show all flags, the rare ones too."),
]


def examples(*commands: str) -> str:
    """The end of a help: commands that run as they stand."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {command}" for command in commands)])


def called_here(flag: str, known: set[str]) -> str:
    """What a flag of other programs is called, in a sentence; "" where nobody knows."""
    name = _HERE.get(flag.partition("=")[0].lower(), "")
    return f"here it is {name}" if name in known else ""
