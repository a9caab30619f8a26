"""Configuration of a T5 model with Sparse Query Attention (arXiv 2510.01817)."""

from huggingface_hub.dataclasses import strict
from transformers import T5Config


@strict
class SQAT5Config(T5Config):
    """A T5Config with the head counts of Sparse Query Attention.

    `num_attention_heads` (`num_heads`) counts the query heads that decoder self-attention keeps; of an encoder alone
    the encoder's. The size of a head is `d_kv`. Where layers differ, `num_attention_heads`, `num_key_value_heads` and
    `site_heads` hold the mean of the layers, rounded.

    Attributes:
        num_key_value_heads (int): key/value heads of the same attention, a divisor of its query heads.
        site_heads (dict | None): by site, "encoder" or "cross", its query and key/value heads where they differ.
        layer_heads (dict | None): of the sites whose layers differ, the query and key/value heads of every layer.
        sqa (dict | None): where the weights come from, with the keys source, revision, source_heads, method
            and sqa_convert (the converter's version).
    """

    model_type = "sqa_t5"

    num_key_value_heads: int = 8
    site_heads: dict | None = None
    layer_heads: dict | None = None
    sqa: dict | None = None

    def __post_init__(self, **kwargs):
        # T5Config derives this from `tie_word_embeddings`, which it then overwrites: keep what a saved config states.
        scale_decoder_outputs = kwargs.pop("scale_decoder_outputs", None)
        super().__post_init__(**kwargs)
        if scale_decoder_outputs is not None:
            self.scale_decoder_outputs = scale_decoder_outputs
        self.architectures = self.architectures or []  # AutoModel looks through them, and fails on None

    def heads(self, site: str = "decoder", layer: int = 0) -> tuple[int, int]:
        """Query heads and key/value heads of one attention site: "encoder", "decoder" or "cross"."""
        counts = (self.site_heads or {}).get(site, (self.num_heads, self.num_key_value_heads))
        if self.layer_heads is not None and site in self.layer_heads:
            counts = self.layer_heads[site][layer]
        query_heads, key_value_heads = counts
        return query_heads, key_value_heads

    def to_dict(self):
        table = super().to_dict()
        return table if self.layer_heads else {key: value for key, value in table.items() if key != "layer_heads"}

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        super().validate_architecture()
        own = {**(self.site_heads or {}), **(self.layer_heads or {})}
        for site in ("encoder", "decoder", "cross"):
            if self.layer_heads and site not in own:
                continue  # its numbers are the mean of others, as those of the decoder that an encoder alone lacks
            uneven = (self.layer_heads or {}).get(site)
            layers = self.num_layers if site == "encoder" else self.num_decoder_layers
            if uneven is not None and len(uneven) != layers:
                raise ValueError(f"layer_heads has {len(uneven)} layers of {site}, the model {layers}")
            for layer in range(1 if uneven is None else layers):
                query_heads, key_value_heads = self.heads(site, layer)
                if key_value_heads < 1 or query_heads < 1 or query_heads % key_value_heads:
                    raise ValueError(
                        f"{site}: {query_heads} query heads must be a multiple of {key_value_heads} kv heads"
                    )


__all__ = ["SQAT5Config"]
