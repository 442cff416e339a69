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
"""The norms of an MTT model: LayerNorm and RMSNorm, with weights around one or around zero."""

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub

from .configuration_mtt import MTTConfig


@use_kernel_forward_from_hub("RMSNorm")
class MTTRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return normed states of the same shape and dtype."""
        return _rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Return size and epsilon, for `repr`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MTTZeroCenteredRMSNorm(nn.Module):
    """`MTTRMSNorm` whose weight is stored as gamma - 1.

    The 1 is added back in float32, as Transformer Engine does: in bfloat16 the sum would lose the
    low bits that storing the difference is meant to keep.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return normed states of the same shape and dtype."""
        return _rms_norm(hidden_states, 1.0 + self.weight.float(), self.variance_epsilon)

    def extra_repr(self) -> str:
        """Return size and epsilon, for `repr`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MTTZeroCenteredLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose weight is stored as gamma - 1, the 1 being added back in float32."""

    def reset_parameters(self) -> None:
        """Set all to what changes nothing."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return normed states of the same shape and dtype."""
        normed = nn.functional.layer_norm(
            hidden_states.float(),
            self.normalized_shape,
            1.0 + self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return normed.to(hidden_states.dtype)


NORM_CLASSES: dict[tuple[str, bool], type[nn.Module]] = {
    ("layernorm", False): nn.LayerNorm,
    ("layernorm", True): MTTZeroCenteredLayerNorm,
    ("rmsnorm", False): MTTRMSNorm,
    ("rmsnorm", True): MTTZeroCenteredRMSNorm,
}


def build_norm(config: MTTConfig, size: int) -> nn.Module:
    """The one kind of norm a configuration asks for, over the last dimension of `size` values."""
    return NORM_CLASSES[config.norm_type, config.zero_centered_norm](size, eps=config.norm_eps)


def _rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.dtype == hidden_states.dtype:
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)
    # What it computes, but that it would warn.
    normed = nn.functional.rms_norm(hidden_states.float(), weight.shape, weight.float(), eps)
    return normed.to(hidden_states.dtype)
