"""A converted model in memory as a folder, for as long as it is trained there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..checkpoints.in_memory import unwrapped
from ..checkpoints.small_files import REPORT, write_json
from ..checkpoints.staging import expanded
from ..conversion.save_model import save_model
from ..errors import RecipeError, SQAError
from ..evaluation.hidden_states import load_any
from ..evaluation.load import Converted
from ..report.report_from_config import rebuilt_report
from . import processes


@contextlib.contextmanager
def in_folder(given: Any, source: Any, output: Path | None, resume: bool) -> Iterator[tuple[Path, Any]]:
    """The folders of a converted model and of its source; of the source None where the report names it.

    Args:
        given: the model's folder; or a model in memory, or a `Conversion`, which are the trained model afterwards.
        source: the unconverted model, likewise; None: of a `Conversion` its own.
        output: where the result goes; None: in the place of `given`. A model that is no `Conversion` stays as it is.
        resume: whether a run goes on.

    Raises:
        CheckpointError: the source is not there, or the model is not one that was converted.
        RecipeError: in several processes, which see different memories; or there is no run to go on with.
    """
    if isinstance(given, Converted) and source is None:
        source = given.source
    named = not isinstance(given, Converted | nn.Module)
    in_memory = not isinstance(source, str | Path | None)
    if processes.count() > 1 and (in_memory or not named):
        raise RecipeError("a model in memory cannot be trained in several processes: save it, and give the folder")
    with contextlib.ExitStack() as stack:
        place = Path()
        if in_memory or not named:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="sqa-uptrain-")))
        origin, source = source, place / "source" if in_memory else source
        if in_memory:
            tokenizer = given.tokenizer if isinstance(given, Converted) else None
            save_model(origin.model if isinstance(origin, Converted) else unwrapped(origin), tokenizer, source)
        if named:
            yield expanded(given, "FOLDER"), source
            return
        folder = given.output if isinstance(given, Converted) else None
        if folder is None:
            if resume:
                raise RecipeError("--resume: a model in memory has no run that was stopped")
            folder = place / "model"
            _write(given, origin, folder)
        try:
            yield folder, source
        except SQAError as error:
            if str(place) in str(error):  # which is gone afterwards
                error.args = (f"{str(error).partition(str(folder))[0].rstrip('; ')}; the model is as it was",)
            raise
        model = given.loaded if isinstance(given, Converted) else unwrapped(given)
        if model is not None and (output is None or isinstance(given, Converted)):
            model.load_state_dict(load_any(output or folder).state_dict())


def _write(given: Any, origin: Any, folder: Path) -> None:
    """A converted model in memory with a report, to be trained."""
    if isinstance(given, Converted):
        model, report, tokenizer = given.model, given.report, given.tokenizer
    else:
        model, tokenizer = unwrapped(given), None
        report = rebuilt_report(model.config, origin)
    save_model(model, tokenizer, folder)
    write_json(folder / REPORT, report)
