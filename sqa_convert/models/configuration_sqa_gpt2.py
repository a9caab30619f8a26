"""Configuration of a GPT-2 model with Sparse Query Attention (arXiv 2510.01817)."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config


@strict
class SQAGPT2Config(GPT2Config):
    """A GPT2Config with the head counts of Sparse Query Attention.

    `num_attention_heads` (`n_head`) counts the query heads kept.

    Attributes:
        num_key_value_heads (int): key/value heads, a divisor of the query heads.
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

    num_key_value_heads: int = 12
    head_dim: int = 64
    sqa: dict | None = None

    def heads(self, site: str = "decoder", layer: int = 0) -> tuple[int, int]:
        """Query heads and key/value heads of one attention site."""
        return self.n_head, self.num_key_value_heads

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.num_key_value_heads < 1 or self.n_head < 1 or self.n_head % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.n_head} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.add_cross_attention:
            raise ValueError("add_cross_attention is not supported")


__all__ = ["SQAGPT2Config"]
