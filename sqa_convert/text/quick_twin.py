"""A twin of a large model whose linear layers multiply in bfloat16, for CPUs that do so several times faster.

It writes text and is looked at: what heads are fitted to is computed in float32 from what the twin shows. Its norms,
attention and residual stream stay in float32: torch's kernels read a cache in bfloat16 more slowly. Its logits are the
model's less their mean over the vocabulary, which is the same prediction: in bfloat16 logits of a size of 100, as
GPT-2's are, would be rounded to halves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LARGE = 30_000_000
"""parameters of a model that is worth a twin"""


def twin_of(model: Any, device: torch.device) -> Any:
    """A twin that shares all but the weights of linear layers; the model where that is not faster, or it is one."""
    if not is_faster(model, device) or is_twin(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    head = twin.get_output_embeddings()
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D) and child is not head:
                setattr(parent, name, RoundedLinear(_as_linear(child), child.bias))
    if head is not None:
        twin.set_output_embeddings(RoundedLinear(_as_linear(head), head.bias, centred=True))
    return twin


def is_twin(model: nn.Module) -> bool:
    """Whether a model is one already."""
    return any(isinstance(module, RoundedLinear) for module in model.modules())


def _as_linear(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight (out, in)."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def is_faster(model: Any, device: torch.device) -> bool:
    """Whether a model in float32 is large and the CPU it runs on multiplies bfloat16 in hardware."""
    if device.type != "cpu" or model.dtype != torch.float32:
        return False
    if sum(parameter.numel() for parameter in model.parameters()) < LARGE:
        return False
    return multiplies_bfloat16()


def multiplies_bfloat16() -> bool:
    """Whether this CPU does so in hardware."""
    able = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(asked is not None and asked() for asked in able)


class RoundedLinear(nn.Module):
    """A linear layer that multiplies in bfloat16, from and to float32; a head's logits without their mean.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        centred: whether it is a head.
        quick: whether that is done in hardware; else only the weight is kept in bfloat16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, centred: bool = False, quick: bool = True) -> None:
        super().__init__()
        weight = weight - weight.mean(0) if centred else weight
        self.weight = nn.Parameter(weight.to(torch.bfloat16).contiguous(), requires_grad=False)
        self.bias, self.quick = bias, quick

    def forward(self, x: Tensor) -> Tensor:
        if not self.quick:
            return nn.functional.linear(x.float(), self.weight.float(), self.bias)
        made = nn.functional.linear(x.to(torch.bfloat16), self.weight).float()
        return made if self.bias is None else made + self.bias
