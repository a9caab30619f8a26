"""sqa-eval: how well a model predicts, and how near it is to another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..errors import QualityError, RecipeError
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import (
    EXIT_CODES,
    TEXT,
    AsJson,
    Device,
    Quiet,
    TextColumn,
    TrustRemoteCode,
    Verbose,
    Version,
    count,
    make_app,
)  # fmt: skip
from .show_results import show_evaluation

app = make_app()
EXAMPLES = (
    "sqa-eval gpt2-sqa-q10kv5 --max-kl 5",
    "sqa-eval gpt2-sqa-q10kv5 --verify",
)
FIRST = ("against", "data", "max_kl", "tasks", "verify", "device")


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="Converted or not: a folder, hub id or sample.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="To compare with. Default: what FOLDER was converted from."),
    ] = None,
    data: Annotated[str | None, typer.Option(help=TEXT + " Its held-out part is used.")] = None,
    text_column: TextColumn = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", parser=count(64), help="Tokens of text, also as 400k or 5M.")
    ] = 16384,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Texts that both models go on with.")] = 2,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Exit with code 4 if KL(against || FOLDER) is larger, nats/token.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of text encoders: exit with code 4 if the last hidden state's squared error is more of its variance.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Tasks of lm-evaluation-harness, or a YAML file (extra: sqa-convert\\[eval])."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", parser=count(1), help="Examples of each task.")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Instead: is FOLDER still what was written, and does it load without this package?"
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of span corruption.")] = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
) -> None:
    """Loss, perplexity, KL and agreement of a model on held-out text, beside the model it was made from.

    [bold]sqa-eval gpt2-sqa-q8kv4 --max-kl 0.05[/bold]
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    out.quieten_libraries()
    from ..checkpoints.find import resolve
    from ..checkpoints.small_files import REPORT
    from ..evaluation.evaluate import compare, untrained
    from ..evaluation.held_out_text import prepare
    from ..evaluation.hidden_states import puts_out_hidden_states
    from ..report.report_json import read_report
    from ..text.formats import TEXT_COLUMN

    if verify:
        _verify(out, model, trust_remote_code)
        return
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise RecipeError(f"--max-kl {max_kl}: give 0 or more, in nats a token")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise RecipeError(f"--max-error {max_error}: give 0 or more, a share of the variance")
    folder, revision = resolve(model), None
    if against is None and (folder / REPORT).is_file():
        source = read_report(folder)["source"]
        against, revision = source["name"], source["revision"]
    for flag, gate in (("--max-kl", max_kl), ("--max-error", max_error)):
        if gate is not None and against is None:
            raise RecipeError(f"{flag} needs a model to compare with: give --against")
    models = ({} if against is None else {"against": resolve(against, revision)}) | {"model": folder}
    names = {"against": against or "", "model": model}
    if puts_out_hidden_states(folder):
        if max_kl is not None or tasks is not None:
            raise RecipeError(f"{model} predicts no tokens: --max-error in place of --max-kl, and no --tasks")
        _hidden_states(out, models, names, data, text_column, tokens, device, max_error, trust_remote_code)
        return
    if max_error is not None:
        raise RecipeError(f"--max-error is for models that put out hidden states; {model} predicts tokens: --max-kl")
    with out.progress() as progress:
        held_out = prepare(
            folder,
            data,
            text_column=text_column or TEXT_COLUMN,
            tokens=tokens,
            device=device,
            seed=seed,
            trust_remote_code=trust_remote_code,
            writer=next(iter(models.values())),
        )
        quality = compare(
            models,
            held_out,
            trust_remote_code=trust_remote_code,
            progress=progress,
            untrained=untrained(folder, against or ""),
        )
        result = {"schema": 1, "models": {key: names[key] for key in models}, "quality": quality, "samples": []}
        if samples:
            from ..evaluation.generation import continuations

            result["samples"] = continuations(models, held_out, samples, trust_remote_code=trust_remote_code)
        if tasks is not None:
            from ..evaluation.harness import run_tasks

            result["tasks"] = {
                key: run_tasks(path, tasks, held_out.device, limit, trust_remote_code) for key, path in models.items()
            }
    show_evaluation(out, result)
    if max_kl is not None and quality["model"]["kl"] > max_kl:
        raise QualityError(f"KL {quality['model']['kl']:.4f} to {against} is more than --max-kl {max_kl:g}")


def _hidden_states(
    out: Out,
    models: dict[str, Path],
    names: dict[str, str],
    data: str | None,
    text_column: str | None,
    tokens: int,
    device: str,
    max_error: float | None,
    trust_remote_code: bool,
) -> None:
    """Of a model that predicts no tokens. Raises QualityError."""
    from ..devices import choose_device
    from ..evaluation.hidden_states import compare_hidden_states, held_out_rows
    from ..evaluation.load import Measured
    from ..text.formats import TEXT_COLUMN

    measured = Measured(models["model"], trust_remote_code=trust_remote_code)
    with out.progress() as progress:
        held_out = held_out_rows(measured, data, text_column or TEXT_COLUMN, tokens, choose_device(device))
        quality = compare_hidden_states(models, held_out, trust_remote_code=trust_remote_code, progress=progress)
    show_evaluation(
        out, {"schema": 1, "models": {key: names[key] for key in models}, "quality": quality, "samples": []}
    )
    if max_error is not None and quality["model"]["error"] > max_error:
        raise QualityError(
            f"the hidden state's error {quality['model']['error']:.4f} to {names['against']} is more than "
            f"--max-error {max_error:g}"
        )


def _verify(out: Out, model: str, trust_remote_code: bool) -> None:
    from ..pipeline.verify import verify

    verified = verify(model, trust_remote_code)
    out.json({"schema": 1, "verified": verified})
    sums = f"{verified['files']} with the checksums of report.json" if verified["files"] else "no checksums recorded"
    out.words(
        f"{model}: {verified['tensors']} tensors as the model calls for them, finite; files: {sums}; "
        f"loads without sqa_convert, largest difference of logits {verified['difference']:g}"
    )


def main() -> None:
    """Entry point of `sqa-eval`."""
    run_app(app, "sqa-eval")


if __name__ == "__main__":
    main()
