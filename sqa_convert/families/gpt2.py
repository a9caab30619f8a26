"""GPT-2: fused `c_attn` and `c_proj`, both Conv1D, that is stored (in, out); the result has four Linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..heads.weights import AttentionHeads
from .base import (
    MOST_HEADS,
    MOST_LAYERS,
    Config,
    Dimensions,
    Family,
    Shape,
    Site,
    Written,
    integers,
    join_heads,
    labels,
    mean_counts,
    split_heads,
    uneven_kinds,
)

if TYPE_CHECKING:
    from ..checkpoints.dtypes import Array
    from ..heads.attend import Attention

_STALE = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # buffers of old releases
_LAYER = re.compile(r"h\.\d+\.")
_NORM = re.compile(r"(h\.\d+\.)?ln_[12f]\.")
_BASE = re.compile(r"(wte|wpe|ln_f|h\.\d+)\.")  # names without the prefix, as the original hub files have them


class GPT2(Family):
    model_types = ("gpt2",)
    site_kinds = ("decoder",)
    model_files = ("configuration_sqa_gpt2.py", "modeling_sqa_gpt2.py")
    tokenizer_class = "GPT2Tokenizer"
    auto_map = {
        "AutoConfig": "configuration_sqa_gpt2.SQAGPT2Config",
        "AutoModel": "modeling_sqa_gpt2.SQAGPT2Model",
        "AutoModelForCausalLM": "modeling_sqa_gpt2.SQAGPT2ForCausalLM",
        "AutoModelForPreTraining": "modeling_sqa_gpt2.SQAGPT2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_sqa_gpt2.SQAGPT2ForSequenceClassification",
    }
    architectures = {
        "GPT2LMHeadModel": "SQAGPT2ForCausalLM",
        "GPT2Model": "SQAGPT2Model",
        "GPT2ForSequenceClassification": "SQAGPT2ForSequenceClassification",
        "GPT2DoubleHeadsModel": "SQAGPT2ForCausalLM",
    }
    attributes = {
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
        "vocab_size": "",
    }

    def check(self, config: Config) -> None:
        super().check(config)
        (heads,) = integers(config, ("n_head",), "gpt2", most=MOST_HEADS)
        integers(config, ("n_layer",), "gpt2", most=MOST_LAYERS)
        width, *_ = integers(config, ("n_embd", "n_positions", "vocab_size"), "gpt2")
        integers(config, ("n_inner",), "gpt2", optional=True)
        if config.get("add_cross_attention"):
            raise UnsupportedModelError(
                "gpt2 with add_cross_attention is not supported; gpt2 without it, t5 and mt5 are"
            )
        if width % heads:
            raise UnsupportedModelError(f"gpt2 config.json: n_embd {width} is no multiple of n_head {heads}")

    def dimensions(self, config: Config) -> Dimensions:
        heads, width = config["n_head"], config["n_embd"]
        return Dimensions(heads, width // heads, width, config["n_positions"])

    def sites(self, config: Config) -> list[Site]:
        return [Site("decoder", i, f"transformer.h.{i}.attn") for i in range(config["n_layer"])]

    def canonical(self, name: str) -> str | None:
        name = f"transformer.{name}" if _BASE.match(name) else name
        return None if _STALE.fullmatch(name) else name

    def required(self, config: Config) -> dict[str, Shape]:
        width = config["n_embd"]
        inner = config.get("n_inner") or 4 * width
        layer = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, width),
            "mlp.c_proj.bias": (width,),
        }
        shapes: dict[str, Shape] = {
            "transformer.wte.weight": (config["vocab_size"], width),
            "transformer.wpe.weight": (config["n_positions"], width),
        }
        for i in range(config["n_layer"]):
            shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
        shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
        if self.source_architecture(config) == "GPT2ForSequenceClassification":
            shapes["score.weight"] = (labels(config), width)
        elif self.has_language_model_head(config) and not self.tied(config):
            shapes["lm_head.weight"] = (config["vocab_size"], width)
        return shapes

    def bias_group(self, name: str) -> str | None:
        return _LAYER.sub("h.N.", _NORM.sub("ln_*.", name)) if name.endswith(".bias") else None

    def hint(self, name: str, stored: Shape, config: Config) -> str:
        old = config.get("n_ctx")
        if name != "transformer.wpe.weight" or stored[0] != old:
            return ""
        return f'; it has n_ctx, which transformers does not read: add "n_positions": {old}'

    def tied(self, config: Config) -> Mapping[str, str]:
        tied = self.has_language_model_head(config) and config.get("tie_word_embeddings") is not False
        return {"lm_head.weight": "transformer.wte.weight"} if tied else {}

    def consumed(self, site: Site) -> list[str]:
        return [f"{site.prefix}.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")]

    def read(self, site: Site, get: Callable[[str], Array], dimensions: Dimensions) -> AttentionHeads[Array]:
        d = dimensions.head_dim
        weights = get(f"{site.prefix}.c_attn.weight").T.reshape(3, -1, d, dimensions.width)  # Conv1D (D, 3D)
        query, key, value = weights
        query_bias, key_bias, value_bias = get(f"{site.prefix}.c_attn.bias").reshape(3, -1, d)
        return AttentionHeads(
            query=query,
            key=key,
            value=value,
            output=split_heads(get(f"{site.prefix}.c_proj.weight"), d),  # Conv1D (H * d, D): already row by head
            query_bias=query_bias,
            key_bias=key_bias,
            value_bias=value_bias,
            output_bias=get(f"{site.prefix}.c_proj.bias"),
        )

    def attention(self, site: Site, config: Config) -> Attention:
        from ..heads.attend import Attention

        scale = self.dimensions(config).head_dim ** -0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx"):
            scale /= site.layer + 1
        return Attention(scale, causal=True)

    def norms(self, site: Site) -> tuple[str, str]:
        norm = site.prefix.removesuffix("attn") + "ln_1"
        return norm, norm

    def write(self, site: Site, heads: AttentionHeads[Array]) -> dict[str, Array]:
        assert heads.query_bias is not None and heads.key_bias is not None and heads.value_bias is not None
        assert heads.output_bias is not None
        tensors = {
            "q_proj.weight": join_heads(heads.query),
            "q_proj.bias": heads.query_bias.reshape(-1),
            "k_proj.weight": join_heads(heads.key),
            "k_proj.bias": heads.key_bias.reshape(-1),
            "v_proj.weight": join_heads(heads.value),
            "v_proj.bias": heads.value_bias.reshape(-1),
            "o_proj.weight": join_heads(heads.output).T,  # Linear (D, Hq * d)
            "o_proj.bias": heads.output_bias,
        }
        return {f"{site.prefix}.{name}": tensor for name, tensor in tensors.items()}

    def written(self, site: Site, config: Config, q_heads: int, kv_heads: int) -> dict[str, Written]:
        sizes = self.dimensions(config)
        q, kv = q_heads * sizes.head_dim, kv_heads * sizes.head_dim
        written = {}
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            written[f"{name}.weight"] = Written((rows, sizes.width), f"{site.prefix}.c_attn.weight")
            written[f"{name}.bias"] = Written((rows,), f"{site.prefix}.c_attn.bias")
        written["o_proj.weight"] = Written((sizes.width, q), f"{site.prefix}.c_proj.weight")
        written["o_proj.bias"] = Written((sizes.width,), f"{site.prefix}.c_proj.bias")
        return {f"{site.prefix}.{name}": tensor for name, tensor in written.items()}

    def result_config(self, config: Config, heads: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        q_heads, kv_heads = heads["decoder"]
        return self.common_config(config, "sqa_gpt2") | {
            "n_head": q_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.dimensions(config).head_dim,
        }

    def uneven_config(self, heads: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, Any]:
        # `per_layer_config` is transformers' own: where a layer has another number than the config as a whole. Its keys
        # sort as numbers do.
        layers, names = heads["decoder"], ("n_head", "num_key_value_heads")
        whole = mean_counts(layers)
        last = max(layer for layer, counts in enumerate(layers) if counts != whole)
        other = {
            str(layer).zfill(len(str(last))): {
                name: number for name, number, of_all in zip(names, counts, whole, strict=True) if number != of_all
            }
            for layer, counts in enumerate(layers)
            if counts != whole
        }
        return {"layer_heads": uneven_kinds(heads), "per_layer_config": other}
