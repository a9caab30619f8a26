"""GPT-2 with Sparse Query Attention: fewer query heads and fewer key/value heads (Filipek, arXiv 2510.01817).

B batch, T query positions, S key positions, Hq query heads, Hkv key/value heads, d head_dim, D hidden_size.
Query head i reads key/value head i // (Hq / Hkv). Everything outside attention is the stock GPT-2.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Block,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import OutputRecorder

from .configuration_sqa_gpt2 import SQAGPT2Config


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key = repeat_kv(key, module.num_key_value_groups)  # (B, Hq, S, d)
    value = repeat_kv(value, module.num_key_value_groups)
    if module.config.reorder_and_upcast_attn:
        with maybe_autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scaling
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B, Hq, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class SQAGPT2Attention(nn.Module):
    """Causal self-attention: (B, T, D) -> (B, T, D), Linear projections `q_proj`, `k_proj`, `v_proj` and `o_proj`."""

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        query_heads, key_value_heads = config.heads("decoder", layer_idx)
        self.num_key_value_groups = query_heads // key_value_heads
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.attention_dropout = config.attn_pdrop
        self.q_proj = nn.Linear(config.hidden_size, query_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(query_heads * self.head_dim, config.hidden_size)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        input_shape = hidden_states.shape[:-1]  # (B, T)
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, Hq, T, d)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, Hkv, T, d)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, Hkv, T, d)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, Hkv, S, d)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, Hq, d)
        output = self.o_proj(output.reshape(*input_shape, -1).contiguous())  # (B, T, D)
        return self.resid_dropout(output), weights


class SQAGPT2Block(GPT2Block):
    def __init__(self, config, layer_idx):
        nn.Module.__init__(self)  # GPT2Block's own would build an attention of the wrong head size
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = SQAGPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config.n_inner or 4 * config.hidden_size, config)


class SQAGPT2PreTrainedModel(GPT2PreTrainedModel):
    config: SQAGPT2Config
    config_class = SQAGPT2Config
    _no_split_modules = ["SQAGPT2Block"]
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": SQAGPT2Block, "attentions": OutputRecorder(SQAGPT2Attention, index=1)}
    _keys_to_ignore_on_load_unexpected = (
        None  # serving engines would read "attn.bias" as a pattern and drop real biases
    )

    def save_pretrained(self, *args, **kwargs):
        own = type(self)
        if own.__name__.startswith("FSDP"):  # FSDP 2 made it in a module of torch, which would be saved as code
            self.__class__ = next(c for c in own.__mro__ if issubclass(c, GPT2PreTrainedModel) and c is not own)
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = own


class SQAGPT2Model(SQAGPT2PreTrainedModel, GPT2Model):
    """GPT-2 without a head: hidden states (B, T, D)."""

    def __init__(self, config):
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([SQAGPT2Block(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()


class SQAGPT2ForCausalLM(SQAGPT2PreTrainedModel, GPT2LMHeadModel):
    """GPT-2 with the language model head: logits (B, T, vocabulary)."""

    def __init__(self, config):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = SQAGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SQAGPT2ForSequenceClassification(SQAGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """GPT-2 with a classification head on the last token: logits (B, labels)."""

    def __init__(self, config):
        GPT2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = SQAGPT2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = ["SQAGPT2ForCausalLM", "SQAGPT2ForSequenceClassification", "SQAGPT2Model", "SQAGPT2PreTrainedModel"]
