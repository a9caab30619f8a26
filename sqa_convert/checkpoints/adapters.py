"""Adapters of PEFT, which are trained beside a model and are none: refused, with what to do first."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsupportedModelError, shown
from .companions import CONFIG, read_quietly

ADAPTER = "adapter_config.json"

_WEIGHTS = "adapter_model*"

_IN_THE_INPUT = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
"""types of adapters that change the input, so that they cannot be merged into weights"""


def refuse_adapter(name: str, folder: Path) -> None:
    """Raises UnsupportedModelError where a folder holds an adapter, alone or beside a model.

    transformers loads the two together where PEFT is installed: converting the model alone would be another model.
    """
    config = read_quietly(folder, ADAPTER)
    file = ADAPTER if config is not None else next((path.name for path in folder.glob(_WEIGHTS)), None)
    if file is None:
        return
    config = config if isinstance(config, dict) else {}
    peft_type = str(config.get("peft_type") or "LORA").upper()
    beside = (folder / CONFIG).exists()
    start = f"{name} holds an adapter ({shown(peft_type)}, {file}){' beside the model' if beside else ' and no model'}"
    if peft_type in _IN_THE_INPUT:
        raise UnsupportedModelError(
            f"{start}; it cannot be merged into weights: convert the model it was trained on alone"
        )
    base = name if beside else config.get("base_model_name_or_path") or "BASE"
    auto = "AutoModelForSeq2SeqLM" if config.get("task_type") == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    where = "move adapter_* to a folder ADAPTER, or away if that is done; in Python" if beside else "in Python"
    adapter = "ADAPTER" if beside else name
    raise UnsupportedModelError(
        f"{start}; merge it first ({where}: PeftModel.from_pretrained({auto}.from_pretrained({shown(repr(base))}), "
        f"{adapter!r}).merge_and_unload().save_pretrained('merged'), and the tokenizer likewise), then convert merged"
    )
