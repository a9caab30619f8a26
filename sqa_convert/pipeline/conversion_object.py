"""`Conversion`: a converted model, its report and its source, to be measured, trained, timed, saved and published."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..caller_settings import undisturbed
from ..checkpoints.companions import has_tokenizer
from ..checkpoints.find import local_folder, resolve
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.small_files import sha256_of
from ..checkpoints.source import Source
from ..checkpoints.staging import expanded, staged_output
from ..conversion.request import DEFAULT_SHARD
from ..errors import RecipeError
from ..evaluation.load import Converted
from ..flags_as_arguments import names_arguments
from ..progress import Progress, in_notebooks, no_bars_of_others
from ..report.notebook_summary import html_summary, text_summary
from ..report.report_from_config import rebuilt_report, report_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..uptraining.recipe import Recipe


@dataclass(repr=False, eq=False)
class Conversion(Converted):
    """What `convert` and `load` return."""

    report: dict[str, Any]
    """As written to report.json: sites and their partitions, costs, quality, seconds, versions."""
    output: Path | None
    """The folder, where there is one."""
    _model: PreTrainedModel | None = None
    _origin: Source | PreTrainedModel | str | Path | None = None
    """the unconverted model; None: what the report names"""
    _tokenizer: Any = None

    @property
    @undisturbed
    def model(self) -> PreTrainedModel:
        """The converted model in eval mode, in the source's dtype; loaded from `output` when first asked for."""
        if self._model is None:
            assert self.output is not None
            self._model = _loaded(self.output, self.report)
        return self._model

    @property
    def loaded(self) -> PreTrainedModel | None:
        """The model, where it is in memory."""
        return self._model

    @property
    def source(self) -> Path | PreTrainedModel:
        """The unconverted model: its folder, or the model where it was given in memory.

        Raises CheckpointError where it is not there any more.
        """
        origin = self._origin
        if isinstance(origin, ModelSource):
            return origin.model
        if isinstance(origin, Source):
            assert origin.folder is not None
            return origin.folder
        if origin is None:
            named = self.report["source"]
            return resolve(named["name"], named["revision"])
        return resolve(origin) if isinstance(origin, str | Path) else origin

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or the folder it lies in; None where nothing is known of one."""
        if self._tokenizer is not None:
            return self._tokenizer
        places = [self.output, self._origin.folder if isinstance(self._origin, Source) else None]
        found = next((place for place in places if place is not None and has_tokenizer(place)), None)
        if found is None and isinstance(self._origin, ModelSource):
            found = local_folder(self._origin.name)  # where the source was loaded from
        return found if found is not None and has_tokenizer(found) else None

    @names_arguments
    def evaluate(self, data: Any = None, **options: Any) -> dict[str, Any]:
        """How well the model predicts, and how near it is to its source: `sqa_convert.evaluate` against the source.

        Args:
            data: by name or as an object, as for `sqa_convert.evaluate`; so are `options` and what is returned.
        """
        from ..evaluation.evaluate import evaluate

        options.setdefault("tokenizer", self.tokenizer)
        return evaluate(self, self.source, data=data, **options)

    @names_arguments
    def uptrain(self, data: Any = None, recipe: str | Path | Recipe | None = None, **options: Any) -> Conversion:
        """Trains the model towards its source, in place: afterwards this is the trained model and its report.

        Args:
            data: instead of the recipe's, by name or as an object, as for `sqa_convert.uptrain`.
            recipe: a packaged recipe's name, a YAML file or a `Recipe`; by default "quick".
            options: settings of the recipe that are changed, such as `tokens="2M"`, and arguments of
                `sqa_convert.uptrain`, such as `device`. With `output` the folder stays as it is, and the result goes
                to another.

        Raises:
            as `sqa_convert.uptrain`; then all is as it was.
        """
        from ..uptraining.recipe import Recipe, override
        from ..uptraining.uptrain import uptrain

        taken = inspect.signature(uptrain).parameters
        settings = {f.name for f in dataclasses.fields(Recipe)} - taken.keys()
        if unknown := options.keys() - taken.keys() - settings:
            raise RecipeError(f"uptrain has no {', '.join(sorted(unknown))}: see sqa_convert.uptrain and Recipe")
        changes = {name: options.pop(name) for name in settings & options.keys()}
        if changes:
            recipe = override("quick" if recipe is None else recipe, **changes)
        uptrain(self, recipe, data=data, **options)
        return self

    @names_arguments
    def bench(self, settings: Any = None, *, progress: Progress = in_notebooks) -> dict[str, Any]:
        """How fast the model is beside its source: `sqa_convert.bench` of "source" and "converted"."""
        from ..speed.bench import DEFAULTS, bench

        return bench(self, DEFAULTS if settings is None else settings, progress=progress)

    @undisturbed
    def save_pretrained(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool = True,
        max_shard_size: str = DEFAULT_SHARD,
    ) -> Path:
        """Writes the model as it is now to a folder of its own, which appears whole or not at all.

        It holds what `convert` writes: weights, config, modeling files, tokenizer where one is known, report, card.

        Args:
            path: a new folder.
            overwrite: replace one that is there.
            verify: load it as somebody does who has only transformers, and hold it against what was written.
            max_shard_size: of the largest weight file, such as "300MB".

        Returns:
            The folder.

        Raises:
            OutputError: it exists already or cannot be written.
            CheckpointError: what was written is not right.
        """
        from ..conversion.save_model import save_model
        from ..report.write import write_report
        from .verify import verify as verified

        place, model = expanded(path), self.model
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        with staged_output(place, overwrite, size) as folder:
            save_model(model, self.tokenizer, folder, max_shard_size)
            sums = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
            kept = {key: value for key, value in self.report.items() if key not in ("sha256", "reloaded")}
            write_report(folder, kept | {"output": str(place), "sha256": sums})
            if verify:
                verified(folder)
        return place

    @names_arguments
    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Uploads the model as it is now; arguments, result and errors as of `sqa_convert.push_to_hub`."""
        from ..publish import push_to_hub

        with TemporaryDirectory(prefix="sqa-push-") as folder:
            return push_to_hub(self.save_pretrained(Path(folder) / "model"), repo_id, private=private)

    def __repr__(self) -> str:
        return text_summary(self.report, self.output)

    def _repr_html_(self) -> str:
        return html_summary(self.report, self.output)


@undisturbed
def load(
    model: str | Path | PreTrainedModel,
    source: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
) -> Conversion:
    """A converted model as `convert` returns one.

    Args:
        model: a folder or hub id that `convert` made; or a converted model, in memory or as `save_pretrained` of
            transformers writes it, of which the source has to be there.
        source: the unconverted model, by default the one that the report names.
        tokenizer: of the model, where it does not lie beside it.

    Raises:
        CheckpointError: it is not there, is no converted model, or was made from another source.
    """
    if isinstance(model, str | Path):
        folder = local_folder(model) or resolve(model)
        return Conversion(report_of(folder, source), folder, None, source, tokenizer)
    return Conversion(rebuilt_report(model.config, source), None, model, source, tokenizer)


def _loaded(folder: Path, report: dict[str, Any]) -> PreTrainedModel:
    from transformers import GenerationConfig

    from .. import models
    from ..text.plain_generation import refusal

    options = {} if refusal(folder) is None else {"generation_config": GenerationConfig()}
    with no_bars_of_others():
        model_class = getattr(models, report["architecture"])
        model: PreTrainedModel = model_class.from_pretrained(folder, dtype="auto", **options)
    return model.eval()
