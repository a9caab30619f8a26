"""The source of a converted model, which it is trained towards: found again, and told from other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.find import open_source, resolve, source_config
from ..checkpoints.fingerprint import unlike
from ..errors import CheckpointError, one_line
from ..families import family_of
from .recipe import Recipe


def find_source(report: dict[str, Any], source: str | Path | None, recipe: Recipe) -> Path:
    """The folder of a converted model's source.

    Args:
        report: of the converted model.
        source: a folder or a hub id; None for the name in the report.
        recipe: by which the model is to be trained.

    Raises:
        CheckpointError: it is not there, or another model.
        RecipeError: the recipe trains what such a model does not put out.
    """
    try:
        folder = resolve(source) if source else resolve(report["source"]["name"], report["source"]["revision"])
    except CheckpointError as error:
        raise CheckpointError(f"{one_line(error)} (the unconverted model; --source names it)") from error
    config = source_config(str(folder), folder)
    if "sqa" in config:
        raise CheckpointError(f"--source {folder} is a converted model; it takes the unconverted one")
    family = family_of(config)
    architecture = family.source_architecture(config)
    if architecture != report["source"]["architecture"]:
        raise CheckpointError(
            f"--source {folder} is a {architecture}, this model was made from a {report['source']['architecture']}"
        )
    if known := report.get("source_weights"):  # older reports have none
        opened = open_source(str(folder))
        names = {family.canonical(name): name for name in opened.index}
        other = unlike(known, opened, {canonical: name for canonical, name in names.items() if canonical})
        if other is not None:
            raise CheckpointError(
                f"--source {folder} holds other weights than this model was made from ({other} differs): give those it "
                "was made from, in the dtype they had, or convert these"
            )
    recipe.check_trains(architecture, family.has_language_model_head(config))
    return folder
