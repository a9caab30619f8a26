"""The two architectures. Importing this registers them with the Auto classes of transformers.

May import: torch, transformers and each other, since they are shipped inside of every result.
Exports: the configurations and models of both architectures.
"""

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .configuration_sqa_gpt2 import SQAGPT2Config
from .configuration_sqa_t5 import SQAT5Config
from .modeling_sqa_gpt2 import SQAGPT2ForCausalLM, SQAGPT2ForSequenceClassification, SQAGPT2Model
from .modeling_sqa_t5 import SQAT5EncoderModel, SQAT5ForConditionalGeneration, SQAT5Model

_CLASSES: dict[type[PreTrainedModel], tuple[str, ...]] = {
    SQAGPT2Model: ("AutoModel",),
    SQAGPT2ForCausalLM: ("AutoModelForCausalLM", "AutoModelForPreTraining"),
    SQAGPT2ForSequenceClassification: ("AutoModelForSequenceClassification",),
    SQAT5Model: ("AutoModel",),
    # Pipelines load a T5 by its class's name, which only transformers' own classes have: ours by the Auto class.
    SQAT5ForConditionalGeneration: ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForPreTraining"),
    SQAT5EncoderModel: ("AutoModelForTextEncoding",),
}
"""the Auto classes that load each, its own first; families' `auto_map` says the same to who has only the folder"""

for _config in (SQAGPT2Config, SQAT5Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
for _class, _autos in _CLASSES.items():
    for _auto in _autos:
        getattr(transformers, _auto).register(_class.config_class, _class, exist_ok=True)
    _class.register_for_auto_class(_autos[0])  # `save_pretrained` writes the modeling files, too
AutoModel.register(SQAT5Config, (SQAT5Model, SQAT5EncoderModel), exist_ok=True)  # the one that `architectures` names

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
