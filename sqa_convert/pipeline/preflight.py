"""All that can stop a conversion and needs no weights, looked at first: by the command, by `--dry-run` and from Python.

Needs torch only where something is asked of a device, or is going to be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..checkpoints.find import open_source, tokenizer_folder
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import HeadersSource, Source
from ..checkpoints.staging import check_output
from ..conversion.plan import Plan, make_plan
from ..conversion.request import Fitting, Request
from ..conversion.save_model import save_tokenizer
from ..errors import CheckpointError, DataError, OutputError, RecipeError, shown
from ..families import Config, Site, family_of
from ..heads import Partition
from ..parse_amounts import check_seed
from ..text.documents import AUTO_TEXT, BUILT_IN, GIVEN, check_data, is_own
from ..text.find_files import beginnings_of
from .run_options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..uptraining.recipe import Recipe


def check_config(config: Config, recipe: Recipe) -> None:
    """Raises RecipeError or DataError unless a model of this config.json can be trained by a recipe."""
    family = family_of(config)
    recipe.check_trains(family.source_architecture(config), family.has_language_model_head(config))
    decoder_only = all(site.kind == "decoder" for site in family.sites(config))
    recipe.check_fits(family.dimensions(config).context if decoder_only else None)


def prepared(
    given: str | Path | PreTrainedModel,
    request: Request,
    place: Callable[[Mapping[Site, Partition]], Path | None],
    *,
    overwrite: bool = False,
    recipe: Recipe | None = None,
    **where: Any,
) -> tuple[Source, Plan]:
    """A source opened, and its conversion planned. No weight is read.

    Args:
        given: a hub id, a folder, a sample, or a model in memory.
        place: where the result of such a partition goes; None: it stays in memory.
        overwrite: whether something may be there.
        recipe: by which the result is trained afterwards.
        where: the source is, as `open_source` takes it.

    Raises:
        RecipeError, UnsupportedModelError, OutputError, CheckpointError: before anything is fetched that can wait.
    """

    def accept(config: dict[str, Any]) -> None:
        output = place(request.partitions(config))
        if output is not None:
            check_output(output, overwrite)
        if recipe is not None:
            check_config(config, recipe)

    saved = _saved(where.get("tokenizer"))
    if saved is not None:
        where["tokenizer"] = saved.name
    if isinstance(given, str | Path):
        source = open_source(str(given), accept=accept, **where)
    else:
        source = ModelSource(given)
        if where.get("tokenizer") is not None:
            source.folder = tokenizer_folder(where["tokenizer"])
    source.kept = saved
    return source, make_plan(source, request)


def _saved(tokenizer: Any) -> TemporaryDirectory[str] | None:
    """A folder with the files of a tokenizer that was given as it is in memory. Raises CheckpointError."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return None
    if not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(f"--tokenizer is a {type(tokenizer).__name__}: give a tokenizer, a folder or a hub id")
    folder = TemporaryDirectory(prefix="sqa-tokenizer-")
    save_tokenizer(tokenizer, folder.name, "--tokenizer: ")
    return folder


def check_run(
    plan: Plan, source: Source, output: Path | None, options: RunOptions, recipe: Recipe | None = None
) -> None:
    """Raises at once what the conversion would raise later, as far as that can be known without a weight.

    Args:
        output: where the result goes; None: it stays in memory.
        options: how it is carried out.
        recipe: by which it is trained afterwards, and measured unless its text is.

    Raises:
        RecipeError: there is no such device or seed, or what is asked for does not go together.
        OutputError: the output cannot be written.
        DataError: there is no text under a name.
    """
    if output is not None:
        _check_output(source, output, options.overwrite)
    if options.evaluate and output is None:
        raise RecipeError("evaluate=True needs an output folder")
    if options.evaluate and source.folder is None:
        raise RecipeError("evaluate=True needs a source with a tokenizer: a folder or a hub id, not a model in memory")
    check_seed(options.seed)
    if options.device not in ("auto", "cpu"):
        from ..devices import choose_device

        choose_device(options.device)
    if options.evaluate and options.data is not None:
        check_data(options.data, column=options.text_column, columns=options.columns)
    if plan.calibration is not None:
        _check_calibration(plan, plan.calibration, source, options)
    if recipe is not None and output is not None:
        _check_training(source, output, options, recipe)


def _check_calibration(plan: Plan, fitting: Fitting, source: Source, options: RunOptions) -> None:
    decoder_only = "encoder" not in plan.kinds
    if fitting.columns is not None and decoder_only:
        raise DataError("--source-column and --target-column are for encoder-decoder models; this one is decoder-only")
    if "polish_steps" in fitting.asked and fitting.polish_steps and not plan.has_language_model_head:
        raise RecipeError("--polish-steps train on what a model predicts; this one has no language model head")
    if fitting.memory is not None and options.device in ("auto", "cpu"):
        from ..calibration.memory_budget import memory_budget
        from ..devices import choose_device

        memory_budget(plan, source, choose_device(options.device))
    if fitting.text_named is not None:
        check_data(fitting.text_named, "--calibration", fitting.text_column, fitting.columns)
    if fitting.prompts is None:
        return
    if fitting.text_named is not None:
        raise RecipeError("--calibration-prompts begin what the model writes itself: leave out --calibration")
    if not (decoder_only and plan.has_language_model_head):
        raise RecipeError("--calibration-prompts are for decoder-only language models, which go on from them")
    if not beginnings_of(fitting.prompts):
        raise DataError(f"--calibration-prompts {shown(fitting.prompts)} holds no text: give one beginning a line")


def fitted_to(request: Request, data: Any, text_column: str, recipe: Recipe | None) -> Request:
    """Calibration on the training part of what a model is measured or trained on, where no other text is asked for.

    Raises RecipeError.
    """
    asked = request.calibration
    if asked is None or asked.text is not None or asked.prompts is not None or request.fitting(1) is None:
        return request
    if recipe is not None:
        data = data if recipe.data == GIVEN else None if recipe.data in (AUTO_TEXT, BUILT_IN) else recipe.data
        text_column = recipe.text_column
        names = ("source_column", "target_column", "prefix")
        asked = replace(asked, **{name: getattr(recipe, name) for name in names})
    if data is None:
        return request
    return replace(request, calibration=replace(asked, text=data, text_column=text_column))


def _check_output(source: Source, output: Path, overwrite: bool) -> None:
    if source.folder is not None:
        inside, outside = output.resolve(), source.folder.resolve()
        if inside == outside or inside in outside.parents:
            raise OutputError(f"--output {output} is where the source lies; give another folder")
    check_output(output, overwrite)


def _check_training(source: Source, output: Path, options: RunOptions, recipe: Recipe) -> None:
    from ..devices import choose_device
    from ..uptraining.data import check_text, training_data
    from ..uptraining.processes import count
    from ..uptraining.run_folder import run_folder
    from ..uptraining.trainer_arguments import check_recipe

    if count() > 1:
        raise RecipeError("--uptrain works in one process: convert without it, then start sqa-uptrain in several")
    if run_folder(output).exists() and not options.overwrite:
        raise OutputError(f"{run_folder(output)} holds a run that was stopped: --overwrite throws it away")
    device = choose_device(options.device)
    check_recipe(recipe, options.measure_training, device)
    if isinstance(source, HeadersSource):  # its tokenizer is not here
        check_text(recipe, options.data)
        return
    trust = options.trust_remote_code
    first = training_data(
        str(source.folder), recipe, data=options.data, tokens=recipe.sequence_length, trust_remote_code=trust
    )
    if options.measure_training and not is_own(recipe.data):  # else weights are needed for it
        first.held_out(device)
