"""A converted model in memory as a folder, for as long as it is trained there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoints.in_memory import unwrapped
from ..checkpoints.small_files import REPORT, write_json
from ..checkpoints.staging import expanded
from ..conversion.save_model import save_model
from ..errors import RecipeError
from ..evaluation.load import Converted, load_model
from ..report.report_from_config import rebuilt_report
from . import processes
from .run_folder import NotBetterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def in_folder(given: Any, source: Any, in_place: bool) -> Iterator[tuple[Path, Any]]:
    """The folders of a converted model and of its source; of the source None where the report names it.

    Args:
        given: the model's folder; or a model in memory, or a `Conversion`.
        source: the unconverted model, likewise; None: of a `Conversion` its own.
        in_place: whether what is in memory shall be the trained model afterwards.

    Raises:
        CheckpointError: the source is not there, or the model is not one that was converted.
        RecipeError: in several processes, which see different memories.
    """
    with TemporaryDirectory(prefix="sqa-uptrain-") as place:
        if isinstance(given, Converted) and source is None:
            source = given.source
        in_memory = isinstance(source, Converted) or not isinstance(source, str | Path | None)
        named = not isinstance(given, Converted | nn.Module)
        if processes.count() > 1 and (in_memory or not named):
            raise RecipeError("a model in memory cannot be trained in several processes: save it, and give the folder")
        tokenizer = given.tokenizer if isinstance(given, Converted) else None
        origin, source = source, Path(place) / "source" if in_memory else source
        if in_memory:
            save_model(origin.model if isinstance(origin, Converted) else unwrapped(origin), tokenizer, source)
        if named:
            yield expanded(given, "FOLDER"), source
            return
        model = given.loaded if isinstance(given, Converted) else unwrapped(given)
        if model is None:
            assert given.output is not None
            yield given.output, source
            return
        report = given.report if isinstance(given, Converted) else rebuilt_report(model.config, origin)
        folder = Path(place) / "model"
        save_model(model, tokenizer, folder)
        write_json(folder / REPORT, report)
        try:
            yield folder, source
        except NotBetterError as error:  # what was trained goes with the folder
            why = str(error).partition(f"; {folder}")[0]
            way_out = "try a lower learning_rate or more tokens; keep_anyway=True takes it"
            raise NotBetterError(f"{why}; the model is as it was: {way_out}") from error
        if in_place:
            _take(model, folder)


def _take(model: PreTrainedModel, folder: Path) -> None:
    """The weights that training left in a folder."""
    model.load_state_dict(load_model(folder).state_dict())
