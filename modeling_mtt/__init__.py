# Copyright 2026 The mtt authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Megatron-Turing models for Hugging Face transformers.

Importing this package registers `MTTConfig` and the models with the auto classes, so that
`AutoModelForCausalLM.from_pretrained` and its siblings load MTT checkpoints without
`trust_remote_code`. It also has `save_pretrained` and `push_to_hub` put these files next to the
weights, so that what was saved loads with `trust_remote_code=True` where this package is missing.
"""

import sys

import transformers

from . import modeling_mtt, modeling_seq2seq_mtt
from .configuration_mtt import AUTO_MAP, MTTConfig
from .configuration_seq2seq_mtt import SEQ2SEQ_AUTO_MAP, MTTSeq2SeqConfig
from .modeling_mtt import (
    MTTForCausalLM,
    MTTForQuestionAnswering,
    MTTForSequenceClassification,
    MTTForTokenClassification,
    MTTModel,
    MTTPreTrainedModel,
)
from .modeling_seq2seq_mtt import (
    MTTForConditionalGeneration,
    MTTSeq2SeqModel,
    MTTSeq2SeqPreTrainedModel,
)
from .parallel_mtt import expert_parallelism

for _config_class, _auto_map, _module in (
    (MTTConfig, AUTO_MAP, modeling_mtt),
    (MTTSeq2SeqConfig, SEQ2SEQ_AUTO_MAP, modeling_seq2seq_mtt),
):
    transformers.AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _config_class.register_for_auto_class("AutoConfig")
    for _auto_class, _reference in _auto_map.items():
        if _auto_class != "AutoConfig":
            _model_class = getattr(_module, _reference.split(".")[1])
            getattr(transformers, _auto_class).register(_config_class, _model_class, exist_ok=True)
            # `transformers serve` takes the class that a configuration names from transformers,
            # which may have executed itself anew since it was imported above.
            setattr(sys.modules["transformers"], _model_class.__name__, _model_class)
            _model_class.register_for_auto_class(_auto_class)


def register_with_vllm() -> None:
    """Have vLLM run MTT models with its Transformers modeling backend.

    vLLM calls this in each of its processes: it is an entry point of `vllm.general_plugins`. The
    auto classes know the models since this package was imported; this names vLLM's class for them,
    which it would otherwise look for in the weights' own code, with `--trust-remote-code`.
    """
    from vllm import ModelRegistry

    for ours, theirs in (
        ("MTTForCausalLM", "TransformersForCausalLM"),
        ("MTTForSequenceClassification", "TransformersForSequenceClassification"),
    ):
        if ours not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(ours, f"vllm.model_executor.models.transformers:{theirs}")


__all__ = [
    "AUTO_MAP",
    "SEQ2SEQ_AUTO_MAP",
    "MTTConfig",
    "MTTForCausalLM",
    "MTTForConditionalGeneration",
    "MTTForQuestionAnswering",
    "MTTForSequenceClassification",
    "MTTForTokenClassification",
    "MTTModel",
    "MTTPreTrainedModel",
    "MTTSeq2SeqConfig",
    "MTTSeq2SeqModel",
    "MTTSeq2SeqPreTrainedModel",
    "expert_parallelism",
    "register_with_vllm",
]
