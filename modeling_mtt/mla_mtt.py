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
"""Multi-latent attention: keys and values made of one narrow latent per token, as in DeepSeek-V3.

What is computed is Megatron-Core's `MLASelfAttention`
(megatron/core/transformer/multi_latent_attention.py). Names, and the order of steps that vLLM looks
for when it puts its own attention here, are those of transformers' DeepSeek-V3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_mtt import TORCH_VARLEN, eager_attention_forward
from .configuration_mtt import MTTConfig
from .linear_mtt import build_linear
from .norms_mtt import build_norm
from .positions_mtt import latent_score_scale, rotate_heads

# These ask for value heads as wide as key heads. FlashAttention does too; transformers pads there.
PADDED_IMPLEMENTATIONS = (TORCH_VARLEN, "vllm", "sglang")


class MTTLatentAttention(nn.Module):
    """Self-attention whose cache holds a latent per token and a rotated key that heads share."""

    def __init__(self, config: MTTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None and config.qk_rope_head_dim is not None
        assert config.v_head_dim is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.q_lora_rank = config.q_lora_rank
        self.num_key_value_groups = 1
        self.scaling = config.attention_multiplier
        if self.scaling is None:
            self.scaling = latent_score_scale(config)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rope_interleave = config.rope_interleave

        num_heads, hidden_size = config.num_attention_heads, config.hidden_size
        query_size = num_heads * self.head_dim
        self.q_proj: Any = None
        self.q_a_proj: Any = None
        self.q_a_layernorm: Any = None
        self.q_b_proj: Any = None
        if self.q_lora_rank is None:
            self.q_proj = build_linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = build_linear(hidden_size, self.q_lora_rank, bias=False)
            self.q_a_layernorm = self._build_norm(self.q_lora_rank)
            self.q_b_proj = build_linear(self.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = build_linear(
            hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = self._build_norm(self.kv_lora_rank)
        self.kv_b_proj = build_linear(
            self.kv_lora_rank, num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = build_linear(
            num_heads * self.v_head_dim, hidden_size, bias=config.attention_out_bias
        )

    def _build_norm(self, size: int) -> nn.Module:
        return build_norm(self.config, size) if self.config.use_qk_norm else nn.Identity()

    def expand_kv(
        self, latents: torch.Tensor, rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make keys and values of what the cache holds.

        Args:
            latents (`torch.Tensor`): `[batch, 1, keys, kv_lora_rank]`.
            rotated (`torch.Tensor`): the part of keys that all heads share,
                `[batch, 1, keys, qk_rope_head_dim]`.

        Returns:
            Keys `[batch, heads, keys, head_dim]` and values `[batch, heads, keys, v_head_dim]`.
        """
        states = self.kv_b_proj(latents.squeeze(1))
        states = states.unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        keys, values = states.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], -1)
        rotated = rotated.expand(-1, keys.shape[1], -1, -1)
        return torch.cat((keys, rotated), dim=-1), values

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over states `[batch, sequence, hidden_size]`; the weights come second, if any."""
        input_shape = hidden_states.shape[:-1]
        if self.q_lora_rank is None:
            query_states = self.q_proj(hidden_states)
        else:
            query_states = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        # Heads are counted by the tensors: with tensor parallelism a process has some of them.
        query_states = query_states.view(*input_shape, -1, self.head_dim)
        query_pass, query_rotated = query_states.split(
            [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1
        )

        latents, key_rotated = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latents = self.kv_a_layernorm(latents).unsqueeze(1)
        query_rotated = rotate_heads(query_rotated, *position_embeddings, self.rope_interleave)
        key_rotated = rotate_heads(
            key_rotated.unsqueeze(2), *position_embeddings, self.rope_interleave
        ).transpose(1, 2)
        query_states = torch.cat((query_pass, query_rotated), dim=-1).transpose(1, 2)

        if past_key_values is not None:
            latents, key_rotated = past_key_values.update(latents, key_rotated, self.layer_idx)
        key_states, value_states = self.expand_kv(latents, key_rotated)

        implementation = self.config._attn_implementation
        padded = implementation in PADDED_IMPLEMENTATIONS or "cache" in kwargs
        if padded:
            value_states = nn.functional.pad(value_states, (0, self.head_dim - self.v_head_dim))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if padded:
            attn_output = attn_output.reshape(*input_shape, -1, self.head_dim)
            attn_output = attn_output[..., : self.v_head_dim]
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights

    def count_groups(self) -> int:
        """Return how many query heads share a key head: every one has its own."""
        return 1
