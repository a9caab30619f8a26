"""Configuration of a GPT-2 model with Sparse Query Attention (arXiv 2510.01817)."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config


@strict
class SQAGPT2Config(GPT2Config):
    """A GPT2Config with the head counts of Sparse Query Attention.

    `num_attention_heads` (`n_head`) counts the query heads kept. Where layers differ, it and `num_key_value_heads` are
    the mean of the layers, rounded, and `per_layer_config` of transformers holds what a layer has instead.

    Attributes:
        num_key_value_heads (int): key/value heads, a divisor of the query heads.
        layer_heads (dict | None): where layers differ, under "decoder" the query and key/value heads of every layer.
        head_dim (int): size of one head, the source's; `hidden_size // num_attention_heads` does not give it.
        sqa (dict | None): where the weights come from, with the keys source, revision, source_heads, method
            and sqa_convert (the converter's version).
    """

    model_type = "sqa_gpt2"
    base_model_tp_plan = {
        "h.*.attn.q_proj": "colwise",
        "h.*.attn.k_proj": "colwise",
        "h.*.attn.v_proj": "colwise",
        "h.*.attn.o_proj": "rowwise",
    }
    base_model_fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}

    allow_global_per_layer_attribute_access = True  # transformers warns whoever reads the means, and goes on

    num_key_value_heads: int = 12
    head_dim: int = 64
    layer_heads: dict | None = None
    sqa: dict | None = None

    def heads(self, site: str = "decoder", layer: int = 0) -> tuple[int, int]:
        """Query heads and key/value heads of one attention site."""
        if self.layer_heads is None:
            return self.n_head, self.num_key_value_heads
        query_heads, key_value_heads = self.layer_heads[site][layer]
        return query_heads, key_value_heads

    def __iter__(self):
        """Names of the entries, without means of layers that differ: validation reads all that are named."""
        return (name for name in super().__iter__() if name not in (self.per_layer_attributes or ()))

    def to_dict(self):
        table = super().to_dict()
        return table if self.layer_heads else {key: value for key, value in table.items() if key != "layer_heads"}

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.layer_heads is not None and len(self.layer_heads["decoder"]) != self.n_layer:
            raise ValueError(f"layer_heads has {len(self.layer_heads['decoder'])} layers, the model {self.n_layer}")
        for layer in range(1 if self.layer_heads is None else self.n_layer):
            query_heads, key_value_heads = self.heads("decoder", layer)
            if key_value_heads < 1 or query_heads < 1 or query_heads % key_value_heads:
                raise ValueError(
                    f"num_attention_heads={query_heads} must be a multiple of num_key_value_heads={key_value_heads}"
                )
        if self.add_cross_attention:
            raise ValueError("add_cross_attention is not supported")


__all__ = ["SQAGPT2Config"]
