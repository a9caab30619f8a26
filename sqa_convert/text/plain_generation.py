"""Generation that depends on nothing a checkpoint asks for but its special tokens.

A generation_config.json can ask for anything: searches that are not installed, several sequences, stop strings, what
transformers refuses to save after a training. The file is the user's, and stays as it is; here models write plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from ..errors import one_line
from ..families.special_tokens import SpecialTokens

_CALLS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""what a config.json may say of calls; with `output_attentions` a trained model could not be saved"""


def settle(model: Any, said: Mapping[str, Any] | None = None) -> Any:
    """Gives a model that is to be measured or trained special tokens that it knows, plain generation, and calls that
    return what calls usually do; returns it.

    Args:
        said: what the model's generation_config.json says, where the model was loaded without it.
    """
    for module in model.modules():  # the stacks of a T5 have configs of their own
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            for name, value in _CALLS.items():
                setattr(config, name, value)
    tokens = own_tokens(model, said)
    if model.config.is_encoder_decoder:
        model.config.decoder_start_token_id, model.config.pad_token_id = tokens.decoder_start, tokens.padding
    if model.can_generate():
        model.generation_config = _plain(tokens)
    return model


def refusal(folder: Path) -> str | None:
    """Why transformers does not load a folder with the generation_config.json it has; None where it does."""
    try:
        GenerationConfig.from_pretrained(folder)
    except OSError:  # without one, or one that is no JSON, it goes on
        return None
    except Exception as error:
        return one_line(error)
    return None


def own_tokens(model: Any, said: Mapping[str, Any] | None = None) -> SpecialTokens:
    """The special tokens of a model."""
    own = model.generation_config.to_dict() if model.can_generate() else {}
    return SpecialTokens.of(model.config, said or own)


@torch.no_grad()
def generate(model: Any, inputs: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """Token ids (B, T): of an encoder-decoder its answers, of others `inputs` and how they go on.

    Args:
        inputs: "input_ids" and "attention_mask".
        settings: of generation; where they say nothing it is greedy, and ends where the model's texts end.
    """
    # transformers makes a cache for as many layers as the encoder has.
    if (getattr(model.config, "num_decoder_layers", None) or 0) > model.config.num_hidden_layers:
        settings |= {"use_cache": False, "cache_implementation": None}
    plain = _plain(own_tokens(model), **settings)
    own, model.generation_config = model.generation_config, GenerationConfig()  # its defaults would be mixed in
    try:
        return model.generate(**inputs, generation_config=plain)
    finally:
        model.generation_config = own


def _plain(tokens: SpecialTokens, **settings: Any) -> GenerationConfig:
    ids = {
        "bos_token_id": tokens.begin,
        "eos_token_id": list(tokens.end) or None,
        "pad_token_id": tokens.padding,
        "decoder_start_token_id": tokens.decoder_start,
    }
    return GenerationConfig(**ids | settings)
