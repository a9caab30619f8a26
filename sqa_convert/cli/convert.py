"""sqa-convert: a pretrained model in, an SQA model out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints.staging import expanded
from ..checkpoints.subfolders import part_of
from ..conversion.convert_site import uses_torch
from ..conversion.request import AUTO, DEFAULT_SHARD, REFINE_STEPS, Calibration, Request
from ..errors import RecipeError
from ..heads import METHODS, Partition
from ..report.content import conversion_report
from ..report.sentences import calibration_lines, left_lines, source_lines
from ..report.tables import costs
from ..text.formats import TEXT_COLUMN
from ..uptraining.recipe import load_recipe
from .console import Out, push, run_app, show_loading, show_quality, show_report
from .options import EXIT_CODES, TEXT, AsJson, Public, PushToHub, Quiet, Verbose, Version, count, listing, make_app

app = make_app()

HEADS, CALIBRATE, SOURCE, OUTPUT, MEASURE = "Heads", "Calibrate", "Source", "Output", "Measure and uptrain"


def _list_methods() -> None:
    print(f"{AUTO:10} try the best of these on calibration text, take what leaves the model nearest to the source")
    for method in METHODS.values():
        print(f"{method.name:10} {method.summary}\n{'':10} {method.source}")


@app.command(epilog=EXIT_CODES)
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A hub id (gpt2, google-t5/t5-small), a folder, sample:gpt2 or sample:t5."
        ),
    ],
    q_groups: Annotated[
        int | None,
        typer.Option(
            "--q-groups",
            metavar="N",
            rich_help_panel=HEADS,
            help="Query heads to keep. (Elsewhere 'query groups' counts key/value heads; here it is query heads.)",
        ),
    ] = None,
    kv_groups: Annotated[
        int | None,
        typer.Option(
            "--kv-groups", metavar="M", rich_help_panel=HEADS, help="Key/value heads to keep; M must divide N."
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(rich_help_panel=HEADS, help="Instead of the two numbers: gqa, mqa, sqa, ssqa, xsqa, xsmqa, lsqa."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=HEADS, help="How heads are merged. Default: auto, the best on text; or see --list-methods."
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=HEADS, help="Which heads go together: searched or contiguous. Default: as suits the method."
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(rich_help_panel=HEADS, help="Attentions to convert, as encoder,decoder,cross. Default: all."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=CALIBRATE,
            help="Text to fit the heads on, as --data. Default: GPT-2 samples its own, T5 reads the built-in corpus.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=count(),
            rich_help_panel=CALIBRATE,
            help="Also as 400k or 5M. Default: 20 for each unknown of a fit, at least 65536.",
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            rich_help_panel=CALIBRATE,
            help="Output projections by least squares. Default: for auto, svd and procrustes.",
        ),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=CALIBRATE,
            help=f"Steps of layer-wise training. Default: {REFINE_STEPS} for auto, svd and procrustes, else 0.",
        ),
    ] = None,
    no_calibration: Annotated[
        bool,
        typer.Option(
            "--no-calibration", rich_help_panel=CALIBRATE, help="From the weights alone; the model is not run."
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(rich_help_panel=SOURCE, help="Branch, tag or commit on the hub.")
    ] = None,
    subfolder: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", rich_help_panel=SOURCE, help="Of a pipeline of several models, here or on the hub."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=SOURCE,
            help="Of a tokenizer elsewhere: beside the model's folder, anywhere, or a hub id.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", rich_help_panel=SOURCE, help="Let code that MODEL brings along run. Default: never."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="Default: ./NAME-sqa-qNkvM.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the output folder if it exists.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(rich_help_panel=OUTPUT, help="auto keeps the source's; float32, bfloat16, float16."),
    ] = "auto",
    max_shard_size: Annotated[
        str,
        typer.Option(
            rich_help_panel=OUTPUT,
            help="Largest weight file, such as 300MB; at least 1MB.",
        ),
    ] = DEFAULT_SHARD,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", rich_help_panel=OUTPUT, help="Do not read the written weights again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Show the plan and stop; reads no weights.")
    ] = False,
    uptrain: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", rich_help_panel=MEASURE, help="Then train: a recipe's name (quick) or a YAML file."
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control", rich_help_panel=MEASURE, help="Also train the source on the same tokens, for comparison."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MEASURE,
            help=TEXT,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MEASURE,
            help="Of --data and --calibration, where they are tables: the column that holds the text. Default: text.",
        ),
    ] = None,
    no_evaluate: Annotated[
        bool,
        typer.Option(
            "--no-evaluate",
            rich_help_panel=MEASURE,
            help="Do not measure loss and KL (for models that do not fit, with --no-calibration).",
        ),
    ] = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    device: Annotated[
        str,
        typer.Option(rich_help_panel=MEASURE, help="To calibrate, measure and train on: auto, cpu, cuda, cuda:1, mps."),
    ] = "auto",
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=MEASURE, help="Of everything random. Default: the recipe's, or 0.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods",
            callback=listing(_list_methods),
            is_eager=True,
            rich_help_panel=HEADS,
            help="Show the methods.",
        ),
    ] = False,
) -> None:
    """Convert a pretrained GPT-2 or T5 model to [bold]Sparse Query Attention[/bold]: fewer query and key/value heads.

    [bold]sqa-convert gpt2 --q-groups 8 --kv-groups 4[/bold]   12 heads need not divide by 8.

    The result is a folder that AutoModel…from_pretrained loads. It is written beside its place and appears whole.
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..pipeline.preflight import check_run, prepared
    from ..pipeline.run import Settings, run

    if text_column is not None and data is None and calibration is None and uptrain is None:
        raise RecipeError("--text-column names a column of --data or --calibration: give one of them")
    # With --calibration alone it is of that text.
    column = None if data is None and calibration is not None else text_column
    changes = {"data": data, "text_column": column, "seed": seed, "control": control or None}
    recipe = None if uptrain is None else load_recipe(uptrain, **changes)
    if control and (recipe is None or no_evaluate):
        raise RecipeError("--control belongs to --uptrain, and is measured: leave out --no-evaluate")
    request = Request(
        q_groups,
        kv_groups,
        variant,
        method or (recipe.method if recipe else "") or AUTO,
        _calibration(Calibration(calibration, calibration_tokens, refit, refine_steps), no_calibration, text_column),
        partition,
        None if sites is None else [kind.strip() for kind in sites.split(",") if kind.strip()],
        dtype,
        max_shard_size,
    )
    settings = Settings.with_recipe(
        recipe,
        overwrite=overwrite,
        verify=not no_verify,
        evaluate=not no_evaluate,
        data=data,
        text_column=column,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
        measure_training=not no_evaluate,
    )

    part = model if subfolder is None else part_of(model, subfolder)

    def place(partitions: Mapping[str, Partition]) -> Path:
        return _default_output(part, partitions) if output is None else expanded(output)

    if push_to_hub is not None:
        from ..publish import check_push

        check_push(push_to_hub)
    source, plan = prepared(
        model,
        request,
        place,
        overwrite=overwrite,
        recipe=recipe,
        revision=revision,
        subfolder=subfolder,
        tokenizer=tokenizer,
        headers_only=dry_run,
    )
    target = place(plan.partitions)
    runs = plan.calibration is not None or not no_evaluate or not no_verify or uses_torch(plan)
    out.quieten_libraries(transformers=recipe is not None or (runs and not dry_run))
    if dry_run:
        check_run(plan, source, target, settings, recipe)
        _show_plan(out, plan, conversion_report(plan, source, target, seed=settings.seed))
        return
    with out.progress() as progress:
        report = run(plan, source, target, settings, recipe, progress)
    _show(out, report, target, uptrained=recipe is not None)
    push(out, target, push_to_hub, public)


def _calibration(asked: Calibration, none: bool, text_column: str | None) -> Calibration | None:
    """What is asked of calibration. Raises RecipeError where that is both something and nothing."""
    if none and asked != Calibration():
        raise RecipeError(
            "--no-calibration leaves no text for --calibration, --calibration-tokens, --refit or --refine-steps: "
            "leave out the one or the other"
        )
    return None if none else replace(asked, text_column=text_column or TEXT_COLUMN)


def _default_output(model: str, partitions: Mapping[str, Partition]) -> Path:
    """./NAME-sqa-qNkvM, with the counts of the first kind of attention that is converted."""
    partition = next((p for p in partitions.values() if not p.is_identity), next(iter(partitions.values())))
    name = Path(model.removeprefix("sample:")).expanduser().resolve().name or "model"
    return Path(f"{name}-sqa-q{len(partition.clusters)}kv{len(partition.kv_groups)}")


def _show_plan(out: Out, plan: Any, report: dict[str, Any]) -> None:
    shards = {
        file: [
            {"name": t.name, "shape": t.shape, "dtype": t.dtype, "from": getattr(t.origin, "prefix", t.origin)}
            for t in tensors
        ]
        for file, tensors in plan.shards.items()
    }
    out.json(report | {"shards": shards})
    out.table(f"{report['source']['name']} → {report['output']} (not written)", *costs(report))
    for line in (*source_lines(report), *left_lines(report)):
        out.result(line)
    for file, tensors in plan.shards.items():
        out.result(f"{file}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e6:,.1f} MB")
        if out.verbose:
            for t in tensors:
                out.result(f"  {t.name} {list(t.shape)} {t.dtype} ← {getattr(t.origin, 'prefix', t.origin)}")


def _show(out: Out, report: dict[str, Any], target: Path, uptrained: bool) -> None:
    out.json(report)
    out.table(f"{report['source']['name']} → {target}", *costs(report))
    for line in (*source_lines(report), *left_lines(report), *calibration_lines(report)):
        out.result(line)
    show_quality(out, report)
    if uptrained:
        show_loading(out, report, target)
    elif report["architecture"].endswith(("ForCausalLM", "ForConditionalGeneration")):
        show_report(out, target)
        out.result(f"next: sqa-uptrain {shlex.quote(str(target))}")
    else:
        show_loading(out, report, target)


def main() -> None:
    """Entry point of `sqa-convert`."""
    run_app(app, "sqa-convert")


if __name__ == "__main__":
    main()
