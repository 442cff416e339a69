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
"""The feed-forward block of an MTT layer."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_mtt import MTTConfig
from .linear_mtt import build_linear, project


class MTTMLP(nn.Module):
    """Feed-forward block, gated or not, of `config.intermediate_size` unless another is given."""

    def __init__(self, config: MTTConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        if intermediate_size is None:
            intermediate_size = config.intermediate_size
        self.gate_proj = None
        if config.gated_mlp:
            self.gate_proj = build_linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = build_linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = build_linear(intermediate_size, hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return states `[..., hidden_size]` of the same shape."""
        activated = project(self.up_proj, hidden_states)
        if self.gate_proj is None:
            activated = self.act_fn(activated)
        else:
            activated = self.act_fn(project(self.gate_proj, hidden_states)) * activated
        return project(self.down_proj, activated)
