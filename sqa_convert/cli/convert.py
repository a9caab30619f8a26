"""sqa-convert: a pretrained model in, an SQA model out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.diffusers_folders import part_of
from ..checkpoints.staging import check_output, expanded
from ..conversion.convert_site import uses_torch
from ..conversion.fitting import effort_of
from ..conversion.heads_by_layer import DEFAULT_ALLOCATION
from ..conversion.request import DEFAULT_SHARD, Calibration, Request
from ..errors import RecipeError
from ..families import Site, mean_counts
from ..heads import AUTO, Partition
from ..report.report_json import conversion_report
from ..text.documents import Columns
from ..text.formats import TEXT_COLUMN
from . import convert_flags as flags
from .brief_help import HelpAll, brief, examples
from .console import Out, run_app
from .flags import EXIT_CODES, AsJson, Public, PushToHub, Quiet, Verbose, Version, make_app
from .show_results import plan_line, push, show_conversion, show_plan
from .targets import aimed

if TYPE_CHECKING:
    from ..uptraining.recipe import Recipe

app = make_app()
EXAMPLES = (
    "sqa-convert sample:gpt2 --q-groups 8 --kv-groups 4 --dry-run",
    "sqa-convert sample:gpt2 --q-groups 10 --kv-groups 5 --no-calibration",
    "sqa-convert sample:t5 --variant sqa --method mean -o t5-averaged",
)
FIRST = ("q_groups", "kv_groups", "variant", "output", "data", "uptrain", "device", "dry_run")


@app.command(epilog=examples(*EXAMPLES) + EXIT_CODES, cls=brief(*FIRST))
def convert(
    model: flags.Model,
    q_groups: flags.QGroups = None,
    kv_groups: flags.KvGroups = None,
    variant: flags.Variant = None,
    method: flags.Method = None,
    partition: flags.Partition = None,
    allocation: flags.Allocation = DEFAULT_ALLOCATION,
    target: flags.Target = None,
    sites: flags.Sites = None,
    calibration: flags.Calibration = None,
    calibration_prompts: flags.CalibrationPrompts = None,
    calibration_length: flags.CalibrationLength = None,
    source_column: flags.SourceColumn = "",
    target_column: flags.TargetColumn = "",
    prefix: flags.Prefix = "",
    calibration_tokens: flags.CalibrationTokens = None,
    refit: flags.Refit = None,
    refine_steps: flags.RefineSteps = None,
    polish_steps: flags.PolishSteps = None,
    effort: flags.Effort = "default",
    memory: flags.Memory = None,
    no_calibration: flags.NoCalibration = False,
    revision: flags.Revision = None,
    subfolder: flags.Subfolder = None,
    tokenizer: flags.Tokenizer = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    output: flags.Output = None,
    overwrite: flags.Overwrite = False,
    resume: flags.Resume = False,
    dtype: flags.Dtype = "auto",
    max_shard_size: flags.MaxShardSize = DEFAULT_SHARD,
    no_verify: flags.NoVerify = False,
    dry_run: flags.DryRun = False,
    uptrain: flags.Uptrain = None,
    control: flags.Control = False,
    data: flags.Data = None,
    text_column: flags.TextColumn = None,
    no_evaluate: flags.NoEvaluate = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    device: flags.Device = "auto",
    seed: flags.Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
    help_all: HelpAll = False,
    list_methods: flags.ListMethods = False,
) -> None:
    """Convert a pretrained GPT-2 or T5 model to [bold]Sparse Query Attention[/bold]: fewer query and key/value heads.

    [bold]sqa-convert gpt2 --q-groups 8 --kv-groups 4[/bold]   12 heads need not divide by 8.

    The result is a folder that AutoModel…from_pretrained loads. It is written beside its place and appears whole.
    """
    out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..pipeline.go_on_with_calibration import differs
    from ..pipeline.preflight import check_run, fitted_to, prepared
    from ..pipeline.run import run
    from ..pipeline.run_options import RunOptions

    columns = Columns.named(source_column, target_column, prefix)
    if (text_column or columns) and data is None and calibration is None and uptrain is None:
        flag = "--text-column" if text_column else "--source-column"
        raise RecipeError(f"{flag} names a column of --data or --calibration: give one of them")
    # With --calibration alone they are of that text.
    alone = data is None and calibration is not None
    column, of_data = (None, None) if alone else (text_column, columns)
    changes = {"data": data, "text_column": column, "seed": seed, "control": control or None}
    recipe = _recipe(uptrain, changes, of_data)
    if control and (recipe is None or no_evaluate):
        raise RecipeError("--control belongs to --uptrain, and is measured: leave out --no-evaluate")
    asked = calibration, calibration_tokens, refit, refine_steps, calibration_length, calibration_prompts, polish_steps
    request = Request(
        q_groups=q_groups,
        kv_groups=kv_groups,
        variant=variant,
        method=method or (recipe.method if recipe else "") or AUTO,
        calibration=_calibration(no_calibration, asked, text_column, columns, effort, memory),
        partition=partition,
        allocation=allocation,
        sites=sites,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    request = fitted_to(request, data, text_column or TEXT_COLUMN, recipe)
    options = RunOptions.with_recipe(
        recipe,
        overwrite=overwrite,
        resume=resume,
        verify=not no_verify,
        evaluate=not no_evaluate,
        data=data,
        text_column=column,
        columns=of_data,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
        measure_training=not no_evaluate,
    )

    def place(partitions: Mapping[Site, Partition]) -> Path:
        part = model if subfolder is None else part_of(model, subfolder)
        return _default_output(part, partitions) if output is None else expanded(output)

    if push_to_hub is not None:
        from ..publish import check_push

        check_push(push_to_hub)
    where = {"revision": revision, "subfolder": subfolder, "tokenizer": tokenizer}
    if target:
        if output is not None:
            check_output(expanded(output), overwrite)
        request = aimed(model, request, target, options, out, **where)
    source, plan = prepared(model, request, place, overwrite=overwrite, recipe=recipe, headers_only=dry_run, **where)
    folder = place(plan.partitions)
    runs = plan.calibration is not None or not no_evaluate or not no_verify or uses_torch(plan)
    if dry_run:
        out.quieten_libraries(transformers=recipe is not None)
        check_run(plan, source, folder, options, recipe)
        show_plan(out, plan, conversion_report(plan, source, folder, seed=options.seed))
        return
    with out.progress(plan_line(plan, source.name, folder)) as progress:
        out.quieten_libraries(transformers=recipe is not None or runs)
        if why := differs(plan, source, folder, options):
            out.notice(why)
        report = run(plan, source, folder, options, recipe, progress)
    show_conversion(out, report, folder)
    push(out, folder, push_to_hub, public)


def _recipe(name: str | None, changes: dict[str, Any], columns: Columns | None) -> Recipe | None:
    """The recipe to train by, with what the flags change of it. Raises RecipeError."""
    if name is None:
        return None
    from ..uptraining.recipe import load_recipe  # with pydantic, which `--help` and a plain conversion do without

    if columns is not None:
        changes |= {"source_column": columns.source, "target_column": columns.target, "prefix": columns.prefix}
    return load_recipe(name, **changes)


def _calibration(
    none: bool,
    asked: tuple[Any, ...],
    text_column: str | None,
    columns: Columns | None,
    effort: str,
    memory: str | None,
) -> Calibration | None:
    """What is asked of calibration. Raises RecipeError where that is both something and nothing."""
    effort_of(effort)
    if none and (effort != "default" or any(flag is not None for flag in (*asked, memory))):
        raise RecipeError(
            "--no-calibration leaves no text for --calibration, what belongs to it, --refit, --refine-steps, "
            "--polish-steps, --effort or --memory: leave out the one or the other"
        )
    text, tokens, refit, refine_steps, length, prompts, polish = asked
    of_pairs = ("", "", "") if columns is None else (columns.source, columns.target, columns.prefix)
    column = TEXT_COLUMN if text is None else text_column or TEXT_COLUMN
    how = refit, refine_steps, column, length, prompts, *of_pairs, polish, effort, memory
    return None if none else Calibration(text, tokens, *how)


def _default_output(model: str, partitions: Mapping[Site, Partition]) -> Path:
    """./NAME-sqa-qNkvM, with the counts of the first kind of attention that is converted; where its layers are
    given counts that differ their means, rounded, and "-by-layer" behind them."""
    first = next((site for site, p in partitions.items() if not p.is_identity), next(iter(partitions)))
    kept = [(len(p.clusters), len(p.groups)) for site, p in partitions.items() if site.kind == first.kind]
    q_heads, kv_heads = mean_counts(kept)
    name = Path(model.removeprefix("sample:")).expanduser().resolve().name or "model"
    return Path(f"{name}-sqa-q{q_heads}kv{kv_heads}" + ("-by-layer" if len(set(kept)) > 1 else ""))


def main() -> None:
    """Entry point of `sqa-convert`."""
    run_app(app, "sqa-convert")


if __name__ == "__main__":
    main()
