"""Random checkpoints of every kind, inputs for them, and what tests of processes share."""

import signal
from importlib.metadata import version

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from sqa_convert import convert
from sqa_convert.models import SQAGPT2Config, SQAGPT2ForCausalLM, SQAT5Config, SQAT5ForConditionalGeneration

VOCABULARY = 61


def randomize(model, scale=0.3):
    """Weights large enough for attention to matter, biases and norms not at their neutral values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "wte" not in name and "shared" not in name:
                parameter.normal_(0, scale)
    return model.eval()


def gpt2(heads=12, head_dim=4, layers=2, **options):
    settings = {
        "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": heads * head_dim, "n_layer": layers, "n_head": heads,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return randomize(GPT2LMHeadModel(GPT2Config(**settings | options)))


def t5(heads=12, layers=3, family="t5", **options):
    settings = {
        "vocab_size": VOCABULARY, "d_model": 20, "d_kv": 4, "num_heads": heads, "d_ff": 24, "num_layers": layers,
        "num_decoder_layers": layers - 1,  # more than encoder layers breaks the stock model's cache
        "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }  # fmt: skip
    if family == "mt5":
        return randomize(MT5ForConditionalGeneration(MT5Config(**settings | options)))
    if family == "umt5":
        if version("transformers").startswith("5.17."):
            pytest.skip("its UMT5 decoder sees the tokens to come")
        return randomize(UMT5ForConditionalGeneration(UMT5Config(**settings | options)))
    return randomize(T5ForConditionalGeneration(T5Config(**settings | options)))


SOURCES = {
    "gpt2": gpt2,
    "gpt2-inverse-layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled": lambda: gpt2(scale_attn_weights=False),
    "gpt2-upcast": lambda: gpt2(reorder_and_upcast_attn=True),
    "gpt2-inner": lambda: gpt2(n_inner=20),
    "t5": t5,
    "t5-v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: t5(family="mt5"),
    "umt5": lambda: t5(family="umt5"),
}


def sqa_gpt2(q_heads=6, kv_heads=3, attention="sdpa", **options):
    settings = {
        "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": q_heads,
        "num_key_value_heads": kv_heads, "head_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return randomize(
        SQAGPT2ForCausalLM._from_config(SQAGPT2Config(**settings | options), attn_implementation=attention)
    )


def sqa_t5(q_heads=6, kv_heads=3, attention="sdpa", **options):
    settings = {
        "vocab_size": VOCABULARY, "d_model": 20, "d_kv": 4, "num_heads": q_heads, "num_key_value_heads": kv_heads,
        "d_ff": 24, "num_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }  # fmt: skip
    config = SQAT5Config(**settings | options)
    return randomize(SQAT5ForConditionalGeneration._from_config(config, attn_implementation=attention))


UNEVEN = {
    "gpt2": {
        "q_heads": 8, "kv_heads": 6, "layer_heads": {"decoder": [[8, 4], [6, 6]]},
        "per_layer_config": {"0": {"num_key_value_heads": 4}, "1": {"n_head": 6}},
    },
    "t5": {
        "q_heads": 8, "kv_heads": 3,
        "layer_heads": {"encoder": [[8, 4], [6, 6]], "decoder": [[6, 3], [8, 2]], "cross": [[5, 5], [4, 1]]},
    },
}  # fmt: skip
"""what `sqa_gpt2` and `sqa_t5` take for layers of different numbers of heads"""


def use_attention(model, name):
    """`set_attn_implementation`, also for the stacks inside, which transformers 5.17 leaves out."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(name)


def tokens(batch=3, length=17):
    return torch.randint(2, VOCABULARY, (batch, length))


def padded(batch=3, length=17):
    """Tokens and a mask that pads the second row on the left and the third on the right."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, 11:] = 0
    return ids, mask


def inputs_for(model, ids, mask=None):
    """What the model takes for these tokens."""
    inputs = {"input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :9]
    elif mask is not None:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


@torch.no_grad()
def logits(model, ids, mask=None):
    """Logits at the positions that are not padding: (n, V)."""
    result = model(**inputs_for(model, ids, mask), use_cache=False).logits
    return result[mask.bool()] if mask is not None and not model.config.is_encoder_decoder else result.flatten(0, 1)


def plain_convert(*args, method="mean", **kwargs):
    """The plainest conversion, for tests of everything around the method."""
    return convert(*args, method=method, **kwargs)


def convert_model(model, *args, **kwargs):
    return plain_convert(model, *args, **kwargs).model


def as_from_a_terminal():
    """For `preexec_fn`: a process that stops when it is told to, whatever pytest was started by. Python leaves SIGINT
    ignored where its parent ignores it, as under nohup and in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
