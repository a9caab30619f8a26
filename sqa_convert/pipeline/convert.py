"""`sqa_convert.convert`: what is given to it, put in order and handed on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..caller_settings import undisturbed
from ..checkpoints.staging import expanded
from ..conversion.heads_by_layer import DEFAULT_ALLOCATION
from ..conversion.request import CALIBRATED, DEFAULT_SHARD, Calibration, Request
from ..errors import RecipeError
from ..flags_as_arguments import in_arguments
from ..heads import AUTO, Convert, Method, Partition
from ..progress import Progress, in_notebooks
from ..report.provenance import asked_from_python
from ..text.documents import GIVEN
from ..text.formats import TEXT_COLUMN
from ..text.python_data import is_named, repeatable
from ..uptraining.recipe import Recipe, override
from .conversion_object import Conversion
from .go_on_with_calibration import differs
from .preflight import fitted_to, prepared
from .run import run, run_in_memory
from .run_options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@undisturbed
@asked_from_python
def convert(
    source: str | Path | PreTrainedModel,
    q_groups: int | None = None,
    kv_groups: int | None = None,
    method: str | Method | Convert = AUTO,
    output: str | Path | None = None,
    *,
    variant: str | None = None,
    sites: str | Sequence[str] | None = None,
    partition: str | Partition | Mapping[str, Partition] | None = None,
    allocation: str | Mapping[str, Sequence[tuple[int, int]]] = DEFAULT_ALLOCATION,
    calibration: Any = CALIBRATED,
    dtype: str = "auto",
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: Any = None,
    max_shard_size: str = DEFAULT_SHARD,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    evaluate: bool = False,
    data: Any = None,
    text_column: str | None = None,
    uptrain: str | Path | Recipe | None = None,
    control: bool = False,
    device: str = "auto",
    seed: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = in_notebooks,
) -> Conversion:
    """Converts a GPT-2 or T5 model with multi-head attention to Sparse Query Attention.

    Args:
        source: a hub id, a folder, "sample:gpt2", "sample:t5", or a model in memory, compiled or in parallel too.
        q_groups: query heads to keep in each layer, Hq <= H; their mean where `allocation` shares them out.
        kv_groups: key/value heads to keep, likewise; a divisor of `q_groups`.
        method: by default "auto", which tries several on text and takes the best; or a name of `sqa_convert.METHODS`,
            a `Method`, or a function as `register_method` takes it, which is given statistics.
        output: a folder for the result; None keeps it in memory.
        variant: instead of the two numbers, a name of `sqa_convert.VARIANTS`.
        sites: kinds of attention to convert ("encoder", "decoder", "cross"), one or several; by default all.
        partition: which heads go together: "searched" or "contiguous", by default as suits the method; a `Partition`
            for every layer; or one for each of some sites, named by kind and layer as in report.json: "decoder.3", or
            "decoder" for those that are not named singly. Head counts beside them are of the layers that have none.
        allocation: "uniform", as many heads in each layer; "adaptive", as many in total, more where predictions need
            them; "auto", adaptive where heads are fitted to text by a method's name; or counts of every layer:
            "4/2,8/4,10/5,10/5", or a table of (Hq, Hkv) by kind of attention.
        calibration: how heads are fitted to what they do on text: a `Calibration`, the text alone, or None to convert
            from the weights alone.
        dtype: "auto" keeps each tensor's; or "float32", "bfloat16", "float16".
        revision: of a hub id.
        subfolder: of a pipeline of several models, the one meant.
        tokenizer: if not beside the weights: a tokenizer, a folder beside the model's, any folder, or a hub id.
        max_shard_size: of the largest weight file, such as "300MB"; by default "2GB".
        overwrite: replace an existing `output`.
        resume: go on with the calibration of a run to `output` that was stopped, where source, settings, device and
            versions are the same; else a warning says what is not, and calibration begins anew. Of a method of your
            own nothing is kept.
        verify: of an `output`, read every tensor again; with `evaluate` also load it without this package.
        evaluate: measure source and result on held-out text; if that cannot be, the report says why. Needs `output`.
        data: that text, as `sqa_convert.text.documents.documents` takes it, or "self": what the source writes; by
            default the built-in corpus, if the source suits it. Heads are fitted to its training part.
        text_column: of a table given as `data`, or as `calibration`, the column that holds text; by default "text".
        uptrain: then train the result towards the source: a packaged recipe's name, a YAML file or a `Recipe`; `data`,
            `text_column` and `seed` win over what it says, and where `method` is left at "auto" its method is taken.
            The models are measured after it, on its own text. Needs `output`.
        control: also train the source on the same tokens, for comparison. Belongs to `uptrain`.
        device: to calibrate, evaluate and train on: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of everything random; by default the recipe's, or 0.
        trust_remote_code: let code that the source brings along run when it is calibrated or evaluated.
        progress: called as the work goes on, with the stage, how much of it is done, and how much there is; by default
            a bar for each stage in a notebook.

    Returns:
        The model and the report.

    Raises:
        RecipeError: an argument is not possible, or the work does not fit into the device's memory.
        CheckpointError: the source is missing, damaged or changes while it is read; or what was written is not right.
        UnsupportedModelError: the source is of an architecture that cannot be converted.
        DataError: the text is missing, too short, or does not fit the model.
        OutputError: `output` exists already or cannot be written.
        QualityError: a measured loss is not finite.

    Source: Filipek, Sparse Query Attention, arXiv 2510.01817, for the architecture; of a method `METHODS[name].source`.
    """
    data = repeatable(data)
    fitting = _calibration(calibration, text_column)
    column = _column_of_data(text_column, data, calibration, uptrain)
    recipe = _recipe(uptrain, control, source, output, data=data, text_column=column, seed=seed)
    method = (recipe.method or AUTO) if recipe is not None and method == AUTO else method
    heads = (q_groups, kv_groups, variant, method, fitting, partition, allocation, sites)
    request = fitted_to(Request(*heads, dtype, max_shard_size), data, column or TEXT_COLUMN, recipe)
    place = None if output is None else expanded(output)
    opened, plan = prepared(
        source, request, lambda partitions: place, overwrite=overwrite, recipe=recipe, revision=revision,
        subfolder=subfolder, tokenizer=str(tokenizer) if isinstance(tokenizer, Path) else tokenizer,
    )  # fmt: skip
    columns = fitting.columns if fitting is not None and fitting.text is None else None
    options = RunOptions.with_recipe(
        recipe, overwrite=overwrite, resume=resume, verify=verify, evaluate=evaluate, data=data, text_column=column,
        columns=columns, device=device, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if why := differs(plan, opened, place, options):
        told = in_arguments(why, convert, {"output": output, "resume": resume})
        warnings.warn(told, stacklevel=5)  # of the caller: three decorators lie between
    if place is None:
        model, report = run_in_memory(plan, opened, options, progress)
        return Conversion(report, None, model, opened)
    return Conversion(run(plan, opened, place, options, recipe, progress), place, None, opened)


def _column_of_data(text_column: str | None, data: Any, calibration: Any, uptrain: Any) -> str | None:
    """The column of `data`; None where `text_column` is of calibration's text alone. Raises RecipeError."""
    of_calibration = not isinstance(calibration, Calibration | None)
    if text_column is not None and data is None and uptrain is None and not of_calibration:
        raise RecipeError(f"text_column={text_column!r} is of data, or of the text given as calibration: give one")
    return None if data is None and of_calibration else text_column


def _calibration(asked: Any, text_column: str | None) -> Calibration | None:
    """What is asked of calibration, where that may be its text alone. Raises RecipeError."""
    if asked is None:
        return None
    if isinstance(asked, Calibration):
        return replace(asked, text=repeatable(asked.text))
    if isinstance(asked, str | Path | Iterable):
        return Calibration(repeatable(asked), text_column=text_column or TEXT_COLUMN)
    raise RecipeError(f"calibration={asked!r}: give a Calibration, its text, or None for none")


def _recipe(
    asked: str | Path | Recipe | None, control: bool, source: Any, output: str | Path | None, data: Any, **changes: Any
) -> Recipe | None:
    """The recipe to train by, as the other arguments change it; None without training. Raises RecipeError."""
    if asked is None:
        if control:
            raise RecipeError("control=True belongs to uptrain: name a recipe")
        return None
    if output is None:
        raise RecipeError("uptrain needs an output folder")
    recipe = override(asked, control=control or None, data=data if is_named(data) else GIVEN, **changes)
    if not isinstance(source, str | Path):
        raise RecipeError("uptrain needs a source in a folder or on the hub, not a model in memory: save it first")
    return recipe
