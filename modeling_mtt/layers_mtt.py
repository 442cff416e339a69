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
"""A decoder layer and its attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_mtt import eager_attention_forward
from .configuration_mtt import MTTConfig
from .linear_mtt import build_linear, project
from .mla_mtt import MTTLatentAttention
from .mlp_mtt import MTTMLP
from .moe_mtt import MTTMoE
from .norms_mtt import build_norm
from .positions_mtt import alibi_slopes, rotate_heads


class MTTAttention(nn.Module):
    """Self-attention with grouped key and value heads."""

    def __init__(self, config: MTTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_multiplier
        if self.scaling is None:
            self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rope_interleave = config.rope_interleave
        sliding = of_layer(config.types_of_layers(), layer_idx) == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = build_linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = build_linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = build_linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = build_linear(query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = build_norm(config, self.head_dim) if config.use_qk_norm else None
        self.k_norm = build_norm(config, self.head_dim) if config.use_qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        distances: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over states `[batch, sequence, hidden_size]`; the weights come second, if any."""
        input_shape = hidden_states.shape[:-1]
        # Heads are counted by the tensors: with tensor parallelism a process has some of them.
        head_shape = (*input_shape, -1, self.head_dim)

        query_states = project(self.q_proj, hidden_states).view(head_shape)
        key_states = project(self.k_proj, hidden_states).view(head_shape)
        value_states = project(self.v_proj, hidden_states).view(head_shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query_states = self.q_norm(query_states)
            key_states = self.k_norm(key_states)
        if position_embeddings is not None:
            query_states = rotate_heads(query_states, *position_embeddings, self.rope_interleave)
            key_states = rotate_heads(key_states, *position_embeddings, self.rope_interleave)
        query_states = query_states.transpose(1, 2)
        key_states = key_states.transpose(1, 2)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(
                key_states, value_states, self.layer_idx
            )

        if distances is not None:
            kwargs["position_bias"] = self._position_bias(query_states, distances)
        # vLLM looks for this call in the source of `forward`, and for `scaling` in it.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return project(self.o_proj, attn_output), attn_weights

    def count_groups(self) -> int:
        """Return how many of this process's query heads share one of its key and value heads."""
        num_queries, num_keys = (
            (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]
            for weight in (self.q_proj.weight, self.k_proj.weight)
        )
        return num_queries // num_keys

    def _position_bias(self, query_states: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Return ALiBi's bias `[batch, heads, queries, keys]` for the heads of this process."""
        num_heads = query_states.shape[1]
        slopes = alibi_slopes(self.config.num_attention_heads, query_states.device)
        if num_heads != self.config.num_attention_heads:
            # Tensor parallelism gives each process the heads of its rows of the query projection.
            weight: Any = self.q_proj.weight
            rank = weight.device_mesh.get_local_rank()
            slopes = slopes[rank * num_heads : (rank + 1) * num_heads]
        bias = slopes[:, None, None] * distances
        if self.config._attn_implementation != "eager":
            bias = bias.to(query_states.dtype)
        return bias.expand(query_states.shape[0], -1, -1, -1)


def build_attention(config: MTTConfig, layer_idx: int) -> nn.Module:
    """The one kind of attention a configuration asks for."""
    if config.kv_lora_rank is not None:
        return MTTLatentAttention(config, layer_idx)
    return MTTAttention(config, layer_idx)


def build_mlp(config: MTTConfig, layer_idx: int) -> nn.Module:
    """The MLP of a layer: experts, or one for all tokens."""
    return (
        MTTMoE(config)
        if of_layer(config.types_of_mlps(), layer_idx) == "sparse"
        else MTTMLP(config)
    )


def of_layer(types: list[str], layer_idx: int) -> str:
    """Return a layer's type; layers after the last one, which predict tokens ahead, are like it."""
    return types[min(layer_idx, len(types) - 1)]


class MTTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: MTTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.mlp = build_mlp(config, layer_idx)
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.post_attention_layernorm = None
        if not config.shared_layernorm:
            self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.hidden_dropout = config.hidden_dropout
        self.residual_multiplier = config.residual_multiplier
        self.use_parallel_residual = config.use_parallel_residual
        self.apply_residual_connection_post_layernorm = (
            config.apply_residual_connection_post_layernorm
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return states `[batch, sequence, hidden_size]` of the same shape."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            normed,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if self.use_parallel_residual:
            if self.post_attention_layernorm is not None:
                normed = self.post_attention_layernorm(hidden_states)
            return hidden_states + self._scale(attended) + self._scale(self.mlp(normed))

        assert self.post_attention_layernorm is not None
        residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
        hidden_states = residual + self._scale(attended)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
        return residual + self._scale(self.mlp(normed))

    def _scale(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply what comes before the residual addition."""
        if self.training:
            hidden_states = nn.functional.dropout(hidden_states, self.hidden_dropout)
        return multiply(hidden_states, self.residual_multiplier)


def multiply(hidden_states: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Return the product, or the same tensor where it would be equal."""
    return hidden_states if multiplier == 1.0 else hidden_states * multiplier
