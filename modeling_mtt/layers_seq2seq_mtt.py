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
"""Layers of an encoder-decoder, and attention from one side to the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_mtt import eager_attention_forward, pack_rows
from .configuration_seq2seq_mtt import MTTSeq2SeqConfig
from .layers_mtt import MTTAttention
from .linear_mtt import project
from .mlp_mtt import MTTMLP
from .norms_mtt import build_norm


class MTTSeq2SeqSelfAttention(MTTAttention):
    """Attention within the encoder, where all tokens are seen, or within the decoder."""

    def __init__(self, config: MTTSeq2SeqConfig, layer_idx: int, is_causal: bool) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = is_causal


class MTTCrossAttention(MTTAttention):
    """Attention from the decoder to the encoder's states: no positions, no norms of heads."""

    def __init__(self, config: MTTSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False
        self.q_norm = self.k_norm = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to states `[batch, keys, hidden_size]`, or to what the cache has of them."""
        input_shape = hidden_states.shape[:-1]
        query_states = project(self.q_proj, hidden_states)
        query_states = query_states.view(*input_shape, -1, self.head_dim).transpose(1, 2)

        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key_states, value_states = cached.keys, cached.values
        else:
            head_shape = (*encoder_hidden_states.shape[:-1], -1, self.head_dim)
            key_states = project(self.k_proj, encoder_hidden_states).view(head_shape)
            value_states = project(self.v_proj, encoder_hidden_states).view(head_shape)
            key_states, value_states = key_states.transpose(1, 2), value_states.transpose(1, 2)
            if past_key_values is not None:
                key_states, value_states = past_key_values.cross_attention_cache.update(
                    key_states, value_states, self.layer_idx
                )
                past_key_values.is_updated[self.layer_idx] = True

        packed: dict[str, Any] = {}
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # FlashAttention's. transformers takes the padding of keys for that of queries too.
            query_states, key_states, value_states, packed = pack_rows(
                query_states, key_states, value_states, attention_mask
            )
            attention_mask = None
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
            **packed,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return project(self.o_proj, attn_output), attn_weights


class MTTEncoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: MTTSeq2SeqConfig, layer_idx: int, is_causal: bool = False) -> None:
        super().__init__()
        self.self_attn = MTTSeq2SeqSelfAttention(config, layer_idx, is_causal)
        self.mlp = MTTMLP(config)
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.hidden_dropout = config.hidden_dropout

    # What needs a gradient comes as a positional argument: reentrant checkpointing asks for it.
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return states `[batch, sequence, hidden_size]` of the same shape."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_bias=position_bias,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _drop(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(hidden_states, self.hidden_dropout, self.training)


class MTTCrossDecoderLayer(MTTEncoderLayer):
    """An encoder's layer that sees earlier tokens only, and the encoder's states before its MLP."""

    def __init__(self, config: MTTSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, is_causal=True)
        self.cross_attn = MTTCrossAttention(config, layer_idx)
        self.cross_attn_layernorm = build_norm(config, config.hidden_size)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return states of the same shape; the encoder's are `[batch, keys, hidden_size]`."""
        own_cache = None if past_key_values is None else past_key_values.self_attention_cache
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_bias=position_bias,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=own_cache,
            **kwargs,
        )
        hidden_states = hidden_states + self._drop(attended)
        attended, _ = self.cross_attn(
            self.cross_attn_layernorm(hidden_states),
            encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.mlp(self.post_attention_layernorm(hidden_states)))
