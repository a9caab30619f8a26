"""The model card of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.companions import MODULES
from .formatting import within_reason
from .sentences import presented
from .speed_table import speed_rows
from .tables import costs, quality_table
from .verdict import last_quality

TEMPLATE = Path(__file__).parent.parent / "templates" / "card.md"

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTextEncoding": "feature-extraction",
}


def model_card(report: dict[str, Any], folder: Path) -> str:
    """README.md of the result in `folder`."""
    from huggingface_hub.repocard_data import ModelCardData  # alone: the rest takes longer than copying a small model
    from jinja2 import Template

    said, source = presented(report), report["source"]
    taken = dict(source.get("card", {}))
    tag = taken.pop("pipeline_tag", None)
    task = tag if isinstance(tag, str) else _PIPELINES.get(said["auto"])
    data = ModelCardData(
        library_name="sentence-transformers" if (folder / MODULES).is_file() else "transformers",
        pipeline_tag=task,
        base_model=source["name"] if source["revision"] else None,  # only models on the hub have one
        base_model_relation="finetune" if source["revision"] else None,
        tags=["sqa", "sparse-query-attention"],
        model_name=said["name"],
        eval_results=_results(report, task or "text2text-generation"),
        **taken,
    )
    filled = data.to_dict() | {
        "card_data": data.to_yaml(),
        "pictures": {path.stem: path.name for path in folder.glob("*.svg")},
        "cost": _markdown(*costs(report)),
        "quality": _markdown(*quality_table(report)) if quality_table(report)[1] else "",
        "speed": _markdown(*speed_rows(report["speed"])) if report.get("speed") else "",
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).render(filled | said)


def _results(report: dict[str, Any], task: str) -> list[Any] | None:
    from huggingface_hub.repocard_data import EvalResult

    last, quality = last_quality(report), report.get("quality", {})
    if last is None:
        return None
    text = {"task_type": task, "dataset_type": "text", "dataset_name": quality["data"]}
    names = {"perplexity": "perplexity", "loss": "loss, nats/token", "kl": "KL to the source, nats/token"}
    names |= {"error": "squared error of the hidden state", "cosine": "cosine of mean vectors to the source's"}
    return [
        EvalResult(**text, metric_type=key, metric_name=name, metric_value=round(last[key], 4))
        for key, name in names.items()
        if last.get(key) is not None and within_reason(key, last[key])
    ]


def _markdown(columns: list[str], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))
