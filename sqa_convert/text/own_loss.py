"""How sure a language model is of what it writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .plain_generation import own_tokens
from .self_generated import continued, first_tokens, sampled_answers

_OWN_TEXTS, _OWN_LENGTH = 8, 64  # a few hundred tokens tell it


@torch.no_grad()
def own_loss(model: Any, batch: dict[str, Tensor], device: torch.device, generator: torch.Generator) -> float | None:
    """A language model's expected loss on what it writes itself, nats a token: how sure it can be of text of its kind.

    Args:
        batch: of the text it is measured on; of an encoder-decoder some inputs are answered, those without padding.

    Returns:
        The mean entropy of its predictions up to the end of each text; None where the model cannot write.
    """
    inputs = batch["input_ids"]
    try:
        if model.config.is_encoder_decoder:
            whole = batch.get("attention_mask", torch.ones_like(inputs)).bool().all(1)
            inputs = inputs[whole][:_OWN_TEXTS]
            wanted = min(_OWN_LENGTH, batch["labels"].shape[1])
            written = sampled_answers(model, inputs, torch.ones_like(inputs), wanted, device, generator)
            given = {"input_ids": inputs.to(device), "decoder_input_ids": written.to(device)}
        else:
            start = first_tokens(model, _OWN_TEXTS, generator)
            texts = continued(model, start, min(_OWN_LENGTH, inputs.shape[1]), device, generator)
            filler = next(iter(own_tokens(model).end), 0)
            written = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=filler)
            given = {"input_ids": written.to(device)}
        log_p = model(**given, use_cache=False).logits[:, :-1].float().log_softmax(-1).cpu()
    except Exception:  # one that stock generation does not know how to run; the texts of others can still be judged
        return None
    entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)  # (n, T - 1)
    ends = torch.isin(written[:, 1:], torch.tensor(own_tokens(model).end, dtype=torch.long)).long()
    inside = ends.cumsum(1) == ends
    return float(entropy[inside].mean())
