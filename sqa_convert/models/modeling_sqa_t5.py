"""T5 with Sparse Query Attention: fewer query heads and fewer key/value heads (Filipek, arXiv 2510.01817).

B batch, T query positions, S key positions, Hq query heads, Hkv key/value heads, d head size (`d_kv`), D `d_model`.
Query head i reads key/value head i // (Hq / Hkv). Every self-attention layer has a relative position bias table of its
own, since each may have grouped the source's heads in its own way; the bucket of each distance is found once a stack.
"""

import copy

import torch
from torch import nn
from transformers import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Model,
    T5PreTrainedModel,
    T5Stack,
    eager_attention_forward,
)

from .configuration_sqa_t5 import SQAT5Config


class SQAT5Attention(T5Attention):
    """Self-attention of the encoder or decoder, with a position bias table of its own, or cross-attention."""

    def __init__(self, config, site, layer_idx):
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.is_decoder = config.is_decoder
        self.is_causal = site == "decoder"
        self.has_relative_attention_bias = site != "cross"
        self.relative_attention_num_buckets = config.relative_attention_num_buckets
        self.relative_attention_max_distance = config.relative_attention_max_distance
        self.d_model = config.d_model
        self.key_value_proj_dim = config.d_kv
        self.n_heads, self.n_kv_heads = config.heads(site, layer_idx)
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        # Not named `num_key_value_groups`: with it sdpa asks for grouped attention under a float mask, which on CUDA
        # only the slowest kernel takes.
        self.kv_repeats = self.n_heads // self.n_kv_heads
        self.dropout = config.dropout_rate
        self.scaling = 1.0
        self.gradient_checkpointing = False
        self.q = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.k = nn.Linear(self.d_model, self.n_kv_heads * self.key_value_proj_dim, bias=False)
        self.v = nn.Linear(self.d_model, self.n_kv_heads * self.key_value_proj_dim, bias=False)
        self.o = nn.Linear(self.inner_dim, self.d_model, bias=False)
        if self.has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.relative_attention_num_buckets, self.n_heads)

    def distances(self, query_length, key_length, past_seen_tokens, device):
        """The same for all layers: the bucket of every distance key - query, smallest first, (T + S - 1,) int64, and
        where among them each pair of a query and a key stands, (T * S,) int64."""
        distance = torch.arange(1 - query_length, key_length, device=device) - past_seen_tokens
        buckets = self._relative_position_bucket(
            distance,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        keys, queries = torch.arange(key_length, device=device), torch.arange(query_length, device=device)
        return buckets, (keys + (query_length - 1 - queries)[:, None]).flatten()

    def position_bias(self, buckets, places, query_length, key_length):
        """This layer's bias, (1, Hq, T, S)."""
        by_distance = self.relative_attention_bias(buckets).t().contiguous()  # (Hq, T + S - 1)
        return by_distance.index_select(1, places).view(1, self.n_heads, query_length, key_length)

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        distances = position_bias  # between the layers of a stack that argument carries what `distances` gives
        input_shape = hidden_states.shape[:-1]  # (B, T)
        query = self.q(hidden_states).view(*input_shape, -1, self.key_value_proj_dim).transpose(1, 2)  # (B, Hq, T, d)
        seen = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a StaticCache hands out a live reference

        is_cross = key_value_states is not None
        cache, reuse = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if is_cross else past_key_values.self_attention_cache
            reuse = is_cross and past_key_values.is_updated.get(self.layer_idx)
        if reuse:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = key_value_states if is_cross else hidden_states
            kv_shape = (*source.shape[:-1], -1, self.key_value_proj_dim)
            key = self.k(source).view(kv_shape).transpose(1, 2)  # (B, Hkv, S, d)
            value = self.v(source).view(kv_shape).transpose(1, 2)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True

        bias = None
        if self.has_relative_attention_bias:
            if distances is None:
                distances = self.distances(input_shape[1], key.shape[-2], seen, query.device)
            bias = self.position_bias(*distances, input_shape[1], key.shape[-2])
        packed = input_shape[1] == 1 and self.kv_repeats > 1
        if packed:  # the query heads of a key/value head take the place of positions, and no key is copied
            grouped = (-1, self.n_kv_heads, self.kv_repeats)
            query = query.reshape(*grouped, self.key_value_proj_dim)  # (B, Hkv, Hq / Hkv, d)
            bias = None if bias is None else bias.reshape(*grouped, key.shape[-2])
            mask = mask if mask is None or mask.shape[1] == 1 else mask.reshape(*grouped, mask.shape[-1])
            kwargs["is_causal"] = False  # they are one position
        else:
            key, value = repeat_kv(key, self.kv_repeats), repeat_kv(value, self.kv_repeats)  # (B, Hq, S, d)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=bias,
            **kwargs,
        )  # (B, T, Hq, d)
        if packed:
            output = output.transpose(1, 2)  # (B, Hkv, Hq / Hkv, d)
            weights = None if weights is None else weights.reshape(-1, self.n_heads, 1, key.shape[-2])
        return self.o(output.reshape(*input_shape, -1).contiguous()), distances, weights


class SQAT5LayerSelfAttention(T5LayerSelfAttention):
    def __init__(self, config, layer_idx):
        nn.Module.__init__(self)
        self.SelfAttention = SQAT5Attention(config, "decoder" if config.is_decoder else "encoder", layer_idx)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


class SQAT5LayerCrossAttention(T5LayerCrossAttention):
    def __init__(self, config, layer_idx):
        nn.Module.__init__(self)
        self.EncDecAttention = SQAT5Attention(config, "cross", layer_idx)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


class SQAT5Block(T5Block):
    def __init__(self, config, layer_idx):
        GradientCheckpointingLayer.__init__(self)
        self.is_decoder = config.is_decoder
        self.layer = nn.ModuleList([SQAT5LayerSelfAttention(config, layer_idx)])
        if self.is_decoder:
            self.layer.append(SQAT5LayerCrossAttention(config, layer_idx))
        self.layer.append(T5LayerFF(config))


class SQAT5PreTrainedModel(T5PreTrainedModel):
    config: SQAT5Config
    config_class = SQAT5Config
    accepts_loss_kwargs = False  # T5 averages its loss over the micro-batch, so the Trainer must divide by the steps
    _no_split_modules = ["SQAT5Block"]
    _supports_flex_attn = False  # flex cannot compile the bias of grouped heads on CPU; eager and sdpa are tested
    _keys_to_ignore_on_load_unexpected = None

    def save_pretrained(self, *args, **kwargs):
        own = type(self)
        if own.__name__.startswith("FSDP"):  # FSDP 2 made it in a module of torch, which would be saved as code
            self.__class__ = next(c for c in own.__mro__ if issubclass(c, T5PreTrainedModel) and c is not own)
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = own


class SQAT5Stack(SQAT5PreTrainedModel, T5Stack):
    def __init__(self, config):
        T5PreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.is_decoder = config.is_decoder
        self.block = nn.ModuleList([SQAT5Block(config, layer_idx=i) for i in range(config.num_layers)])
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.post_init()
        self.gradient_checkpointing = False


def _stack(config, is_decoder):
    config = copy.deepcopy(config)
    config.is_decoder = is_decoder
    if is_decoder:
        config.num_layers = config.num_decoder_layers
    else:
        config.use_cache = False
    return SQAT5Stack(config)


class SQAT5Model(SQAT5PreTrainedModel, T5Model):
    """T5 without a head: hidden states of the decoder (B, T, D)."""

    def __init__(self, config):
        T5PreTrainedModel.__init__(self, config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _stack(config, is_decoder=False)
        self.decoder = _stack(config, is_decoder=True)
        self.post_init()


class SQAT5EncoderModel(SQAT5PreTrainedModel, T5EncoderModel):
    """The encoder alone: hidden states (B, S, D). Loads the encoder of a whole converted T5, too."""

    _keys_to_ignore_on_load_unexpected = [r"decoder", r"lm_head"]  # type: ignore[assignment]

    def __init__(self, config):
        T5PreTrainedModel.__init__(self, config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        config.use_cache = False
        config.is_encoder_decoder = False
        if getattr(config, "auto_map", None):  # saved from here, it is no T5 with a decoder any more
            this = config.auto_map.get("AutoModelForTextEncoding", "modeling_sqa_t5.SQAT5EncoderModel")
            autos = {"AutoModel": this, "AutoModelForTextEncoding": this}
            config.auto_map = {auto: place for auto, place in config.auto_map.items() if auto == "AutoConfig"} | autos
        self.encoder = SQAT5Stack(config)
        self.post_init()


class SQAT5ForConditionalGeneration(SQAT5PreTrainedModel, T5ForConditionalGeneration):
    """T5 with the language model head: logits (B, T, vocabulary)."""

    def __init__(self, config):
        T5PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _stack(config, is_decoder=False)
        self.decoder = _stack(config, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SQAT5EncoderModel", "SQAT5ForConditionalGeneration", "SQAT5Model", "SQAT5PreTrainedModel"]
