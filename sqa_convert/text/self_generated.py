"""Text that a model writes itself, at temperature 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress, silent
from .plain_generation import generate, own_tokens

SAMPLED_SEQUENCES = 128
"""at a time, at most"""

_DROPPED = 0.25  # of a sampled text's end, at most

_OWN_TEXTS, _OWN_LENGTH = 8, 64  # a few hundred tokens tell how sure a model is of its own text


def sample(
    model: Any,
    count: int,
    length: int,
    device: torch.device,
    generator: torch.Generator,
    at_once: int = SAMPLED_SEQUENCES,
    progress: Progress = silent,
) -> Tensor:
    """A causal model's own text, from its first token at temperature 1, packed as training data are: (count, length).

    Of each text a random part of the end is dropped and the rest put one after the other, so that a sequence starts
    anywhere in a text. (Where all start with the first token, fits rely on what heads read there.)
    """
    rows: list[Tensor] = []
    kept = 0
    while kept < count * length:
        progress("sample text", kept, count * length)
        missing = math.ceil((count * length - kept) / (length * (1 - _DROPPED / 2)))
        begin = first_tokens(model, min(at_once, missing), generator)
        ids = _generate(model, begin, length - 1, device, generator)
        ends = torch.randint(length - int(_DROPPED * length), length + 1, (len(ids),), generator=generator)
        rows += [row[:end] for row, end in zip(ids, ends.tolist(), strict=True)]
        kept += int(ends.sum())
    progress("sample text", count * length, count * length)
    return torch.cat(rows)[: count * length].view(count, length)


def first_tokens(model: Any, count: int, generator: torch.Generator) -> Tensor:
    """What a causal model's texts begin with, (count, 1): any tokens where it names none that it knows."""
    begin = own_tokens(model).begin
    if begin is None:
        return torch.randint(model.config.vocab_size, (count, 1), generator=generator)
    return torch.full((count, 1), begin)


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
            written = _generate(model, inputs, wanted, device, generator)
            given = {"input_ids": inputs.to(device), "decoder_input_ids": written.to(device)}
        else:
            start = first_tokens(model, _OWN_TEXTS, generator)
            written = _generate(model, start, min(_OWN_LENGTH, inputs.shape[1]) - 1, device, generator)
            given = {"input_ids": written.to(device)}
        log_p = model(**given, use_cache=False).logits[:, :-1].float().log_softmax(-1).cpu()
    except Exception:  # one that stock generation does not know how to run; the texts of others can still be judged
        return None
    entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)  # (n, T - 1)
    ends = torch.isin(written[:, 1:], torch.tensor(own_tokens(model).end, dtype=torch.long)).long()
    inside = ends.cumsum(1) == ends
    return float(entropy[inside].mean())


def answers(model: Any, inputs: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """What an encoder-decoder samples for its inputs, a quarter of their length: (N, T / 4)."""
    wanted = max(2, inputs.shape[1] // 4)
    parts = [_generate(model, part, wanted, device, generator) for part in inputs.split(SAMPLED_SEQUENCES)]
    return torch.cat(parts)[:, 1:]  # without the start token


def _generate(model: Any, inputs: Tensor, new_tokens: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Samples at temperature 1, going on at end-of-text tokens; on the CPU."""
    given = {"input_ids": inputs.to(device), "attention_mask": torch.ones_like(inputs).to(device)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return generate(
            model, given, eos_token_id=None,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            cache_implementation="static", disable_compile=True,  # a growing cache is copied at every token
        ).cpu()  # fmt: skip
