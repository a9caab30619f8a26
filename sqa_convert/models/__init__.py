"""The two architectures. Importing this registers them with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from .configuration_sqa_gpt2 import SQAGPT2Config
from .configuration_sqa_t5 import SQAT5Config
from .modeling_sqa_gpt2 import SQAGPT2ForCausalLM, SQAGPT2ForSequenceClassification, SQAGPT2Model
from .modeling_sqa_t5 import SQAT5EncoderModel, SQAT5ForConditionalGeneration, SQAT5Model

for _config in (SQAGPT2Config, SQAT5Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(SQAGPT2Config, SQAGPT2Model, exist_ok=True)
AutoModelForCausalLM.register(SQAGPT2Config, SQAGPT2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SQAGPT2Config, SQAGPT2ForSequenceClassification, exist_ok=True)
AutoModel.register(SQAT5Config, SQAT5Model, exist_ok=True)
AutoModelForSeq2SeqLM.register(SQAT5Config, SQAT5ForConditionalGeneration, exist_ok=True)
AutoModelForTextEncoding.register(SQAT5Config, SQAT5EncoderModel, exist_ok=True)

__all__ = [
    "SQAGPT2Config",
    "SQAGPT2ForCausalLM",
    "SQAGPT2ForSequenceClassification",
    "SQAGPT2Model",
    "SQAT5Config",
    "SQAT5EncoderModel",
    "SQAT5ForConditionalGeneration",
    "SQAT5Model",
]
