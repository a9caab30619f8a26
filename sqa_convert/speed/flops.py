"""Floating point operations that a run needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def on_meta(module: Any) -> Any:
    """A copy without values, with the plain attention, so that no kernel hides any product. A model or an attention."""
    config = copy.deepcopy(module.config)
    if hasattr(module, "_from_config"):
        with torch.device("meta"):
            return type(module)._from_config(config, attn_implementation="eager").eval()
    config._attn_implementation = "eager"
    shell = copy.deepcopy(module, {id(p): nn.Parameter(p.to("meta")) for p in module.parameters()})
    shell.config = config
    return shell


def counted(run: Callable[[], Any]) -> int:
    """Operations of a run, as torch counts them: products of matrices, a multiply and an add each."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def training_flops(model: Any, batch: dict[str, Tensor]) -> int:
    """Of a forward and a backward pass, which costs twice as much."""
    clone = on_meta(model)
    tokens = batch["input_ids"].to("meta")
    # Without a mask a decoder-only model looks into its position ids for the ends of documents: meta has no values.
    more: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    if type(clone).__name__.endswith("EncoderModel"):
        more = {}  # an encoder looks into its mask
    elif clone.config.is_encoder_decoder:
        more = {"labels": batch["labels"].to("meta"), "use_cache": False}
    with torch.no_grad():
        return 3 * counted(lambda: clone(tokens, **more))
