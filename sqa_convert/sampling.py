"""Text that a model writes itself, at temperature 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .progress import Progress, silent

SAMPLED_SEQUENCES = 128
"""at a time, at most"""
_DROPPED = 0.25  # of a sampled text's end, at most


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
    known = (getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((token for token in known if token is not None), 0)
    rows: list[Tensor] = []
    kept = 0
    while kept < count * length:
        progress("sample text", kept, count * length)
        missing = math.ceil((count * length - kept) / (length * (1 - _DROPPED / 2)))
        begin = torch.full((min(at_once, missing), 1), start)
        ids = _generate(model, begin, length - 1, device, generator)
        ends = torch.randint(length - int(_DROPPED * length), length + 1, (len(ids),), generator=generator)
        rows += [row[:end] for row, end in zip(ids, ends.tolist(), strict=True)]
        kept += int(ends.sum())
    progress("sample text", count * length, count * length)
    return torch.cat(rows)[: count * length].view(count, length)


def answers(model: Any, inputs: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """What an encoder-decoder samples for its inputs, a quarter of their length: (N, T / 4)."""
    wanted = max(2, inputs.shape[1] // 4)
    parts = [_generate(model, part, wanted, device, generator) for part in inputs.split(SAMPLED_SEQUENCES)]
    return torch.cat(parts)[:, 1:]  # without the start token


@torch.no_grad()
def _generate(model: Any, inputs: Tensor, new_tokens: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Samples at temperature 1, going on at end-of-text tokens; on the CPU."""
    from transformers import GenerationConfig

    bos, pad, start = (getattr(model.config, f"{n}_token_id", None) for n in ("bos", "pad", "decoder_start"))
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        cache_implementation="static", disable_compile=True,  # a growing cache is copied at every token
        bos_token_id=bos, pad_token_id=pad or 0, eos_token_id=None,
        decoder_start_token_id=pad if start is None else start,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        inputs = inputs.to(device)
        kept, model.generation_config = model.generation_config, GenerationConfig()  # its defaults would be mixed in
        try:
            return model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings).cpu()
        finally:
            model.generation_config = kept
