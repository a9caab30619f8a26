"""The first layer of a converted T5 for sentence-transformers, which loads any T5's config as the stock encoder."""

from sentence_transformers.models import Transformer
from transformers import AutoModelForTextEncoding


class SQAT5Transformer(Transformer):
    """`Transformer` of sentence-transformers, with the encoder that the folder's own code has."""

    def _load_encoder_only_model(self, model_name_or_path, config, **options):
        return AutoModelForTextEncoding.from_pretrained(model_name_or_path, config=config, **options)
