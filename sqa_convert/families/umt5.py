"""UMT5: a T5 with a position bias table in each layer, as every result has; image and video models use its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ..errors import UnsupportedModelError
from .base import Config, Site
from .t5 import T5, TABLE


class UMT5(T5):
    model_types = ("umt5",)
    architectures = {f"UMT5{name}": f"SQAT5{name}" for name in ("ForConditionalGeneration", "Model", "EncoderModel")}
    untied = '"tie_word_embeddings": false'

    def check(self, config: Config) -> None:
        super().check(config)
        major, minor = version("transformers").split(".")[:2]
        if (int(major), int(minor)) < (5, 18) and not self.source_architecture(config).endswith("EncoderModel"):
            raise UnsupportedModelError(
                f"the UMT5 decoder of transformers {major}.{minor} sees the tokens to come: pip install -U transformers"
            )

    def _has_table(self, site: Site) -> bool:
        return site.kind != "cross"

    def _table(self, site: Site) -> str:
        return f"{site.prefix}.{TABLE}"

    def _default_ff(self, config: Config) -> str:
        return "gated-gelu"

    def separate(self, config: Config) -> frozenset[str]:
        return frozenset(self.optional(config))  # a head of its own is loaded wherever there is one

    def result_config(self, config: Config, heads: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        # transformers takes the embeddings for tied whatever the file says, and scales what the head reads.
        return super().result_config(config, heads) | {"scale_decoder_outputs": True}
