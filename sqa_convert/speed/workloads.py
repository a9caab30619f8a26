"""What is timed of a model, original or converted, and of one attention layer of it: prefill, decoding, training.

B batch, T length. A T5 model reads T tokens in its encoder and writes T // 4 (what span corruption leaves to write is
about that much); prefill is its encoder, decoding one step of its decoder, and its attention layer is the encoder's
first, in decoding the cross-attention of the decoder's first block, whose keys and values are T long.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from ..errors import RecipeError
from .flops import counted, on_meta

MODES = ("prefill", "decode", "train")
"""
prefill: the forward pass over T tokens, with the cache written and the last position's logits, no gradients.
decode: the last of T tokens, the others being in the cache.
train: forward and backward pass over T tokens, dropout off, no optimizer.
"""


@dataclass(frozen=True)
class Workload:
    """Something to time."""

    run: Callable[[], Any]
    tokens: int
    """gone through in a run, of all rows"""
    cache: DynamicCache | EncoderDecoderCache | None = None
    """of decoding"""

    @property
    def cache_bytes(self) -> int | None:
        """Of keys and values, all layers and rows."""
        if self.cache is None:
            return None
        parts = [self.cache]
        if isinstance(self.cache, EncoderDecoderCache):
            parts = [self.cache.self_attention_cache, self.cache.cross_attention_cache]
        layers = [layer for part in parts for layer in part.layers]
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if t is not None)


def model_workload(model: Any, mode: str, length: int, batch: int) -> Workload:
    """A whole model's part in `mode`, one of MODES, on random tokens."""
    device = model.device
    ids = torch.zeros if device.type == "meta" else _random_ids(model.config.vocab_size)
    tokens = ids((batch, length), dtype=torch.long, device=device)
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model, mode, tokens, ids((batch, max(1, length // 4)), dtype=torch.long, device=device))
    # Without a mask or a cache a model looks into its positions for the ends of documents: meta tensors hold none.
    mask = {"attention_mask": torch.ones_like(tokens)} if device.type == "meta" else {}
    if mode == "train":
        return Workload(
            _training(model, lambda: model(tokens, labels=tokens, use_cache=False, **mask).loss), batch * length
        )
    if mode == "prefill":
        return Workload(_inference(lambda: model(tokens, use_cache=True, logits_to_keep=1)), batch * length)
    cache = DynamicCache()
    seen, one = tokens.split([length - 1, 1], dim=1)
    _inference(lambda: model(seen, past_key_values=cache, use_cache=True, logits_to_keep=1))()

    def step() -> None:
        model(one, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return Workload(_inference(step), batch, cache)


def _encoder_decoder(model: Any, mode: str, tokens: Tensor, written: Tensor) -> Workload:
    batch, length = tokens.shape
    if mode == "train":
        run = _training(model, lambda: model(tokens, labels=written, use_cache=False).loss)
        return Workload(run, batch * (length + written.shape[1]))
    encoder = model.get_encoder()
    if mode == "prefill":
        return Workload(_inference(lambda: encoder(tokens)), batch * length)
    read = BaseModelOutput(last_hidden_state=_inference(lambda: encoder(tokens))().last_hidden_state)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(ids: Tensor = written[:, :1]) -> None:
        model(encoder_outputs=read, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    _inference(step)(written)
    return Workload(_inference(step), batch, cache)


def layer_workload(attention: nn.Module, mode: str, length: int, batch: int) -> Workload:
    """One attention module's part in `mode`, on random hidden states."""
    weight = next(attention.parameters())
    width = getattr(attention.config, "hidden_size", None)
    hidden = torch.randn(batch, length, width, dtype=weight.dtype, device=weight.device)  # (B, T, D)
    more: dict[str, Any] = {}
    takes = inspect.signature(attention.forward).parameters
    if mode != "decode" and "position_bias" in takes:  # UMT5's makes its own
        # As in all layers but the first, which passes on what it has found of positions.
        more = {"position_bias": _inference(lambda: attention(hidden))()[1]}
    if mode == "train":
        hidden.requires_grad_(True)
        return Workload(_training(attention, lambda: attention(hidden, **more)[0].sum()), batch * length)
    if mode == "prefill":
        return Workload(_inference(lambda: attention(hidden, **more)), batch * length)
    seen, one = (part.contiguous() for part in hidden.split([length - 1, 1], dim=1))
    if getattr(attention, "is_decoder", False):  # T5's cross-attention, which keeps the keys it has made
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        read = {"key_value_states" if "key_value_states" in takes else "encoder_hidden_states": hidden}  # UMT5
        run = _inference(lambda: attention(one, **read, past_key_values=both))
        run()
        return Workload(run, batch, both)
    cache = DynamicCache()
    _inference(lambda: attention(seen, past_key_values=cache))()

    def step() -> None:
        attention(one, past_key_values=cache)
        cache.layers[-1].crop(-1)  # those of the layers before are empty, which transformers 5.17 cannot crop

    return Workload(_inference(step), batch, cache)


def attention_layer(model: Any, mode: str, layer: int = 0) -> nn.Module:
    """A layer's attention: the one that T tokens go through in `mode`."""
    if not model.config.is_encoder_decoder:
        return model.transformer.h[layer].attn
    if mode == "decode":
        return model.decoder.block[layer].layer[1].EncDecAttention
    return model.encoder.block[layer].layer[0].SelfAttention


def distinct_layers(model: Any, mode: str) -> dict[tuple[int, int], int]:
    """The first layer of each number of query and key/value heads that `attention_layer` may give."""
    config = model.config
    if not hasattr(config, "heads"):
        return {(config.num_attention_heads, config.num_attention_heads): 0}
    kind, layers = "decoder", config.num_hidden_layers
    if config.is_encoder_decoder:
        kind, layers = ("cross", config.num_decoder_layers) if mode == "decode" else ("encoder", layers)
    return {config.heads(kind, layer): layer for layer in reversed(range(layers))}


def flops(of: nn.Module, make: Callable[..., Workload], mode: str, length: int, batch: int) -> int:
    """Of one run: products of matrices as torch counts them, the whole T x T square of attention also where causal."""
    return counted(make(on_meta(of), mode, length, batch).run)


def bytes_read(of: nn.Module, work: Workload) -> int:
    """That a decoding step cannot do without: the weights it multiplies by, once, and the cache."""
    read: dict[int, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        read[id(module)] = module.weight.nbytes

    hooks = [m.register_forward_hook(note) for m in of.modules() if isinstance(m, (nn.Linear, Conv1D))]
    work.run()
    for hook in hooks:
        hook.remove()
    return sum(read.values()) + (work.cache_bytes or 0)


def extend_positions(model: Any, length: int) -> bool:
    """Lets a model with learned positions read `length` tokens, repeating the rows it has; True if it had to.

    For timing alone: what it says there means nothing.
    """
    table = getattr(model.base_model, "wpe", None)
    if table is None or table.num_embeddings >= length:
        return False
    weight = table.weight.data
    copies = -(-length // len(weight))
    model.base_model.wpe = nn.Embedding.from_pretrained(weight.repeat(copies, 1)[:length], freeze=False)
    model.config = copy.deepcopy(model.config)
    model.config.n_positions = length
    return True


def _random_ids(vocabulary: int) -> Callable[..., Tensor]:
    def draw(shape: tuple[int, ...], **where: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, shape, generator=generator).to(where["device"])

    return draw


def _inference(run: Callable[..., Any]) -> Callable[..., Any]:
    # Not inference_mode: its tensors may not go into a cache that is used outside of it.
    return torch.no_grad()(run)


def _training(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        loss().backward()
        module.zero_grad(set_to_none=True)

    return run


def check_kinds(loaded: Mapping[str, Any]) -> None:
    """Raises RecipeError where models do not do the same work, so that neither is the faster one."""
    kinds = {name: model.config.is_encoder_decoder for name, model in loaded.items()}
    if len(set(kinds.values())) > 1:
        words = {True: "an encoder-decoder", False: "decoder-only"}
        told = ", ".join(f"{name} is {words[kind]}" for name, kind in kinds.items())
        raise RecipeError(f"{told}: their times cannot be compared; give models of one kind")
