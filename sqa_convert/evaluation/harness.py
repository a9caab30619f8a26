"""Tasks of lm-evaluation-harness on models, converted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, one_line


def run_tasks(
    folder: Path, tasks: str, device: torch.device, limit: int | None = None, trust_remote_code: bool = False
) -> dict[str, float]:
    """Scores of a model folder.

    Args:
        tasks: names, comma-separated, or YAML files of tasks.
        limit: examples of each.

    Returns:
        {"task metric": score}

    Raises:
        RecipeError: the harness is not installed, or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError("--tasks needs lm-evaluation-harness: pip install 'sqa-convert[eval]'") from error

    from .load import load_config

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folders = {str(Path(name).resolve().parent) for name in names if name.endswith(".yaml")}
    names = [Path(name).stem if name.endswith(".yaml") else name for name in names]
    manager = TaskManager(include_path=sorted(folders) or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise RecipeError(f"--tasks {tasks}: no such task: {', '.join(unknown) or 'none is given'}")
    # The harness takes a model type it does not know for a decoder.
    backend = "seq2seq" if load_config(folder, trust_remote_code).is_encoder_decoder else "causal"
    arguments: dict[str, Any] = {
        "pretrained": str(folder), "trust_remote_code": trust_remote_code, "backend": backend,
    }  # fmt: skip
    try:
        evaluation = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=names, device=str(device), limit=limit, task_manager=manager
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise RecipeError(f"--tasks {tasks}: its data cannot be had: {one_line(error, 200)}") from error
    assert evaluation is not None
    return {
        f"{task} {metric.partition(',')[0]}": value
        for task, scores in evaluation["results"].items()
        for metric, value in scores.items()
        if isinstance(value, float) and "stderr" not in metric
    }
