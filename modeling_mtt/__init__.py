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

Importing this package registers `MTTConfig`, `MTTModel` and `MTTForCausalLM` with the auto
classes, so that `AutoModelForCausalLM.from_pretrained` loads MTT checkpoints without
`trust_remote_code`. It also has `save_pretrained` and `push_to_hub` put these files next to the
weights, so that what was saved loads with `trust_remote_code=True` where this package is missing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mtt import AUTO_MAP, MTTConfig
from .modeling_mtt import MTTForCausalLM, MTTModel, MTTPreTrainedModel

AutoConfig.register(MTTConfig.model_type, MTTConfig, exist_ok=True)
AutoModel.register(MTTConfig, MTTModel, exist_ok=True)
AutoModelForCausalLM.register(MTTConfig, MTTForCausalLM, exist_ok=True)

MTTConfig.register_for_auto_class("AutoConfig")
MTTModel.register_for_auto_class("AutoModel")
MTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "AUTO_MAP",
    "MTTConfig",
    "MTTForCausalLM",
    "MTTModel",
    "MTTPreTrainedModel",
]
