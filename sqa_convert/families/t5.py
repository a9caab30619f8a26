"""T5, v1.1, Flan and mT5: separate Linear layers without biases, a position bias table shared by a stack's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

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
    split_heads,
    uneven_kinds,
)
from .special_tokens import token_ids

if TYPE_CHECKING:
    from ..checkpoints.dtypes import Array
    from ..heads.attend import Attention

TABLE = "relative_attention_bias.weight"  # (buckets, H), in the source only in layer 0 of a stack
_STALE = "decoder.block.0.layer.1.EncDecAttention." + TABLE  # old checkpoints carry it; it was never used
_USUAL_CONTEXT = 512  # tokens; T5 has no longest input, this is what it was trained on


class T5(Family):
    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5")
    site_kinds = ("encoder", "decoder", "cross")
    model_files = ("configuration_sqa_t5.py", "modeling_sqa_t5.py")
    sentence_layer = "sentence_sqa_t5.SQAT5Transformer"
    tokenizer_class = "T5Tokenizer"
    auto_map = {
        "AutoConfig": "configuration_sqa_t5.SQAT5Config",
        "AutoModel": "modeling_sqa_t5.SQAT5Model",
        "AutoModelForSeq2SeqLM": "modeling_sqa_t5.SQAT5ForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_sqa_t5.SQAT5ForConditionalGeneration",
        "AutoModelForPreTraining": "modeling_sqa_t5.SQAT5ForConditionalGeneration",
        "AutoModelForTextEncoding": "modeling_sqa_t5.SQAT5EncoderModel",
    }
    architectures = {
        f"{prefix}{name}": f"SQAT5{name}"
        for prefix in ("T5", "MT5")
        for name in ("ForConditionalGeneration", "Model", "EncoderModel")
    } | {"T5WithLMHeadModel": "SQAT5ForConditionalGeneration"}  # the class's name when the first checkpoints were saved

    attributes = {
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "d_kv": "head_dim",
        "d_model": "hidden_size",
        "d_ff": "",
        "vocab_size": "",
    }
    untied = '"tie_word_embeddings": false, "scale_decoder_outputs": true'

    def check(self, config: Config) -> None:
        super().check(config)
        integers(config, ("num_heads",), "t5", most=MOST_HEADS)
        integers(config, ("num_layers",), "t5", most=MOST_LAYERS)
        integers(config, ("num_decoder_layers",), "t5", most=MOST_LAYERS, optional=True)
        integers(config, ("d_kv", "d_model", "d_ff", "vocab_size"), "t5")
        integers(config, ("n_positions",), "t5", optional=True)
        integers(config, ("relative_attention_num_buckets",), "t5", optional=True, least=4)
        half = self._buckets(config) // 2  # are for distances of their own, the rest for ranges up to the largest
        integers(config, ("relative_attention_max_distance",), "t5", optional=True, least=half + 1)
        if config.get("is_decoder") and not config.get("is_encoder_decoder", True):
            raise UnsupportedModelError("a T5 decoder on its own is not supported; whole T5 models and encoders are")

    def dimensions(self, config: Config) -> Dimensions:
        context = config.get("n_positions") or _USUAL_CONTEXT
        return Dimensions(config["num_heads"], config["d_kv"], config["d_model"], context)

    def _layers(self, config: Config) -> dict[str, int]:
        """Layers of each stack; an encoder-only model has no decoder."""
        layers = {"encoder": config["num_layers"]}
        if not self.source_architecture(config).endswith("EncoderModel"):
            layers["decoder"] = config.get("num_decoder_layers") or config["num_layers"]
        return layers

    def sites(self, config: Config) -> list[Site]:
        sites = []
        for stack, count in self._layers(config).items():
            for i in range(count):
                sites.append(Site(stack, i, f"{stack}.block.{i}.layer.0.SelfAttention"))
                if stack == "decoder":
                    sites.append(Site("cross", i, f"decoder.block.{i}.layer.1.EncDecAttention"))
        return sites

    def canonical(self, name: str) -> str | None:
        return None if name == _STALE else name

    def required(self, config: Config) -> dict[str, Shape]:
        width, ff = config["d_model"], config["d_ff"]
        inner = config["num_heads"] * config["d_kv"]
        gated = str(config.get("feed_forward_proj", self._default_ff(config))).startswith("gated")
        attention: dict[str, Shape] = dict.fromkeys(("q.weight", "k.weight", "v.weight"), (inner, width))
        attention["o.weight"] = (width, inner)
        feed_forward: dict[str, Shape] = dict.fromkeys(("wi_0", "wi_1") if gated else ("wi",), (ff, width))
        feed_forward["wo"] = (width, ff)

        shapes: dict[str, Shape] = {"shared.weight": (config["vocab_size"], width)}
        for site in self.sites(config):
            layer = site.prefix.rpartition(".")[0]
            shapes[f"{layer}.layer_norm.weight"] = (width,)
            shapes |= {f"{site.prefix}.{name}": shape for name, shape in attention.items()}
            if self._has_table(site):
                shapes[f"{site.prefix}.{TABLE}"] = (self._buckets(config), config["num_heads"])
        for stack, count in self._layers(config).items():
            for i in range(count):
                layer = f"{stack}.block.{i}.layer.{2 if stack == 'decoder' else 1}"
                shapes |= {f"{layer}.DenseReluDense.{name}.weight": shape for name, shape in feed_forward.items()}
                shapes[f"{layer}.layer_norm.weight"] = (width,)
            shapes[f"{stack}.final_layer_norm.weight"] = (width,)
        if config.get("tie_word_embeddings") is False:
            shapes |= self.optional(config)
        return shapes

    def optional(self, config: Config) -> dict[str, Shape]:
        head: dict[str, Shape] = {"lm_head.weight": (config["vocab_size"], config["d_model"])}
        return head if self.has_language_model_head(config) else {}

    def _default_ff(self, config: Config) -> str:
        return "gated-gelu" if config.get("model_type") == "mt5" else "relu"

    @staticmethod
    def _buckets(config: Config) -> int:
        return config.get("relative_attention_num_buckets") or 32

    def _has_table(self, site: Site) -> bool:
        """Whether the source stores a position bias table there."""
        return site.kind != "cross" and site.layer == 0

    def _table(self, site: Site) -> str:
        """The source's table of a self-attention."""
        return f"{site.kind}.block.0.layer.0.SelfAttention.{TABLE}"

    def tied(self, config: Config) -> Mapping[str, str]:
        copies = (*(f"{stack}.embed_tokens.weight" for stack in self._layers(config)), *self.optional(config))
        return dict.fromkeys(copies, "shared.weight")

    def separate(self, config: Config) -> frozenset[str]:
        # v1.1, Flan and mT5 have a head of their own; transformers 5 saves that only under the second name.
        said = (config.get("tie_word_embeddings"), config.get("scale_decoder_outputs"))
        own_head = False in said or config.get("model_type") == "mt5"
        return frozenset(self.optional(config) if own_head else ())

    def consumed(self, site: Site) -> list[str]:
        names = [f"{site.prefix}.{name}.weight" for name in "qkvo"]
        return names + ([self._table(site)] if self._has_table(site) else [])

    def read(self, site: Site, get: Callable[[str], Array], dimensions: Dimensions) -> AttentionHeads[Array]:
        query, key, value = (split_heads(get(f"{site.prefix}.{name}.weight"), dimensions.head_dim) for name in "qkv")
        return AttentionHeads(
            query=query,
            key=key,
            value=value,
            output=split_heads(get(f"{site.prefix}.o.weight").T, dimensions.head_dim),  # Linear (D, H * d)
            position_bias=None if site.kind == "cross" else get(self._table(site)).T,
        )

    def attention(self, site: Site, config: Config) -> Attention:
        from transformers.models.t5.modeling_t5 import T5Attention

        from ..heads.attend import Attention

        if site.kind == "cross":
            return Attention(1.0, causal=False)
        bucket = partial(
            T5Attention._relative_position_bucket,
            bidirectional=site.kind == "encoder",
            num_buckets=self._buckets(config),
            max_distance=config.get("relative_attention_max_distance") or 128,
        )
        return Attention(1.0, causal=site.kind == "decoder", bucket=bucket)

    def norms(self, site: Site) -> tuple[str, str]:
        own = site.prefix.rpartition(".")[0] + ".layer_norm"
        return own, "encoder.final_layer_norm" if site.kind == "cross" else own

    def write(self, site: Site, heads: AttentionHeads[Array]) -> dict[str, Array]:
        tensors = {
            "q.weight": join_heads(heads.query),
            "k.weight": join_heads(heads.key),
            "v.weight": join_heads(heads.value),
            "o.weight": join_heads(heads.output).T,
        }
        if heads.position_bias is not None:
            tensors[TABLE] = heads.position_bias.T
        return {f"{site.prefix}.{name}": tensor for name, tensor in tensors.items()}

    def written(self, site: Site, config: Config, q_heads: int, kv_heads: int) -> dict[str, Written]:
        sizes = self.dimensions(config)
        q, kv = q_heads * sizes.head_dim, kv_heads * sizes.head_dim
        shapes: dict[str, Shape] = {"q": (q, sizes.width), "k": (kv, sizes.width), "v": (kv, sizes.width)}
        shapes["o"] = (sizes.width, q)
        written = {
            f"{site.prefix}.{name}.weight": Written(shape, f"{site.prefix}.{name}.weight")
            for name, shape in shapes.items()
        }
        if site.kind != "cross":
            written[f"{site.prefix}.{TABLE}"] = Written((self._buckets(config), q_heads), self._table(site))
        return written

    def result_config(self, config: Config, heads: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        main = "decoder" if "decoder" in heads else "encoder"
        others = {kind: list(counts) for kind, counts in heads.items() if counts != heads[main]}
        is_mt5 = config.get("model_type") == "mt5"
        # T5 saves this under another name: only v1.1 and Flan say that the embeddings are not tied.
        tied = config.get("tie_word_embeddings") is not False
        padding = token_ids(config.get("pad_token_id"), config["vocab_size"]) or (0,)
        start = token_ids(config.get("decoder_start_token_id"), config["vocab_size"]) or padding
        return self.common_config(config, "sqa_t5") | {
            "pad_token_id": padding[0],
            "decoder_start_token_id": start[0],
            "num_heads": heads[main][0],
            "num_key_value_heads": heads[main][1],
            "site_heads": others or None,
            "feed_forward_proj": config.get("feed_forward_proj", self._default_ff(config)),
            "scale_decoder_outputs": config.get("scale_decoder_outputs", tied and not is_mt5),
        }

    def uneven_config(self, heads: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, Any]:
        # Not transformers' `per_layer_config`, which has one entry for layer 3 of encoder, decoder and cross-attention.
        return {"layer_heads": uneven_kinds(heads)}
