"""The trainings of one run, and what they are held against: the model, and a control beside it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from ..evaluation.held_out_batches import HeldOut
from ..evaluation.hidden_states import last_hidden_states, load_any
from ..evaluation.measure import measure, predict
from ..progress import Progress
from ..text.suitability import misfits
from .put_in_place import not_better
from .recipe import Recipe
from .run_folder import Run
from .train_one_model import Job, train
from .trainer_arguments import uses_bfloat16


def _expected(teacher: Any, held_out: HeldOut, recipe: Recipe) -> Any:
    """What the source makes of held-out text: its predictions, or its hidden states."""
    # The same arithmetic as the training's: else a model that is the source would be a little away from it.
    device = held_out.device
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(recipe, device)):
        if recipe.loss == "hidden":
            return last_hidden_states(teacher.to(device), held_out)
        return predict(teacher, held_out)


def train_all(run: Run, job: Job, progress: Progress) -> tuple[dict[str, dict[str, Any]], float | None]:
    """The trainings of a run: of the model, and of the control for as many tokens as the model's best measurement took.

    Returns:
        What came of each, as "uptrain" and "control"; and the source's loss on what it writes itself, where measured.

    Raises:
        NotBetterError: no measurement of the model was as good as the start.
    """
    recipe, held_out = run.recipe, job.held_out
    teacher, own_loss = None, None
    progress("uptrain", 0, recipe.steps)
    if held_out is not None or recipe.ce < 1:
        teacher = load_any(run.source, dtype="float32", trust_remote_code=job.trust_remote_code)
    if held_out is not None:
        expected = _expected(teacher, held_out, recipe)
        job = dataclasses.replace(job, expected=expected)
        fit = held_out.fit(teacher, None if recipe.loss == "hidden" else measure(expected).loss)
        for doubt in misfits(fit, "--data"):
            progress("uptrain", 0, recipe.steps, f"warning: {doubt['text']}")
        own_loss = fit.own_loss
    if recipe.ce == 1:
        teacher = None
    model = train(run.folder, teacher, recipe, job, run.checkpoints / "uptrain", partial(progress, "uptrain"))
    if held_out is None:
        model["kept"] = "the end: nothing was measured to choose by"
    if not (model.get("better", True) or job.keep_anyway):
        points = {point["tokens"]: point for point in model["curve"]}
        raise not_better(run, points[0], points[model["kept_steps"] * recipe.tokens_per_step])
    if not recipe.control:
        return {"uptrain": model}, own_loss
    del teacher
    plain = dataclasses.replace(recipe, loss="ce", patience=0)
    job = dataclasses.replace(job, until=model.get("kept_steps", recipe.steps))
    control = train(run.source, None, plain, job, run.checkpoints / "control", partial(progress, "control"))
    return {"uptrain": model, "control": control}, own_loss
