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
"""The two stacks of layers of an encoder-decoder: the side that reads, and the side that writes."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .base_seq2seq_mtt import MTTSeq2SeqPreTrainedModel
from .cache_mtt import growing_cache, with_own_counts
from .configuration_seq2seq_mtt import MTTSeq2SeqConfig
from .layers_seq2seq_mtt import (
    MTTCrossAttention,
    MTTCrossDecoderLayer,
    MTTEncoderLayer,
    MTTSeq2SeqSelfAttention,
)
from .norms_mtt import build_norm
from .parallel_mtt import share_of_heads
from .positions_mtt import MTTRotaryEmbedding, rotation_of_heads
from .relative_mtt import MTTRelativePositionBias


class MTTSeq2SeqStack(MTTSeq2SeqPreTrainedModel):
    """What encoder and decoder share: embeddings, positions, layers, and the norm after them."""

    _input_embed_layer = "embed_tokens"

    def __init__(self, config: MTTSeq2SeqConfig, layers: list[MTTEncoderLayer]) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = self.relative_attention_bias = self.rotary_emb = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "relative":
            self.relative_attention_bias = MTTRelativePositionBias(
                config.relative_attention_num_buckets,
                config.num_attention_heads,
                config.relative_attention_max_distance,
                bidirectional=not layers[0].self_attn.is_causal,
            )
        elif config.position_embedding_type == "rope":
            self.rotary_emb = MTTRotaryEmbedding(config)
        self.layers = nn.ModuleList(layers)
        self.norm = build_norm(config, config.hidden_size) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False

        self.post_init()
        # The model's plan names what both stacks have.
        self._tp_plan: dict[str, str] = {}

    def _place(
        self, inputs_embeds: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return states with positions in them, the bias of scores, and the rotation of heads.

        Positions count from the start of the row, as Megatron's `t5_position_ids` do.
        """
        num_tokens = inputs_embeds.shape[1]
        # Cloned: a static cache counts in place, before the last layer is done.
        seen = 0 if cache is None else cache.get_seq_length()
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen
        positions = torch.arange(num_tokens, device=inputs_embeds.device) + seen

        hidden_states, bias, rotation = inputs_embeds, None, None
        if self.embed_positions is not None:
            if isinstance(seen, int) and not is_tracing(positions):
                self._check_length(seen + num_tokens)
            hidden_states = hidden_states + self.embed_positions(positions)
        if self.relative_attention_bias is not None:
            num_keys = num_tokens if cache is None else cache.get_mask_sizes(num_tokens, 0)[0]
            keys = torch.arange(num_keys, device=positions.device)
            bias = self.relative_attention_bias(keys - positions[:, None])
            first: Any = self.layers[0]
            bias = share_of_heads(bias, first.self_attn.q_proj.weight)
            bias = bias.expand(len(inputs_embeds), -1, -1, -1)
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb(hidden_states, position_ids=positions.unsqueeze(0))
            rotation = rotation_of_heads(cos, sin, self.config.rope_interleave)
        dropout = self.config.hidden_dropout
        return nn.functional.dropout(hidden_states, dropout, self.training), bias, rotation

    def _check_length(self, length: int) -> None:
        table_size = self.config.max_position_embeddings
        if length > table_size:
            raise ValueError(
                f"Position {length - 1} is beyond the table of learned positions: found a sequence "
                f"of {length} tokens, expected at most max_position_embeddings ({table_size}). "
                "Shorten the text or the generation; a learned table cannot be extended."
            )


class MTTEncoder(MTTSeq2SeqStack):
    """The side that reads."""

    _can_record_outputs = {
        "hidden_states": MTTEncoderLayer,
        "attentions": MTTSeq2SeqSelfAttention,
    }

    def __init__(self, config: MTTSeq2SeqConfig) -> None:
        super().__init__(
            config, [MTTEncoderLayer(config, index) for index in range(config.num_encoder_layers)]
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Compute the states that the decoder attends to.

        Args:
            input_ids (`torch.Tensor`, *optional*):
                Token ids, `[batch, sequence]`.
            attention_mask (`torch.Tensor`, *optional*):
                1 where there is a token and 0 where there is padding, `[batch, sequence]`.
            inputs_embeds (`torch.Tensor`, *optional*):
                Token embeddings in place of `input_ids`, `[batch, sequence, hidden_size]`.
            **kwargs:
                Passed down to the attention implementation.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `[batch, sequence, hidden_size]`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds` are given, or there are
                more tokens than learned positions.
        """
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states, position_bias, position_embeddings = self._place(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_bias,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class MTTDecoder(MTTSeq2SeqStack):
    """The side that writes."""

    _can_record_outputs = {
        "hidden_states": MTTCrossDecoderLayer,
        "attentions": MTTSeq2SeqSelfAttention,
        "cross_attentions": OutputRecorder(MTTCrossAttention, index=1),
    }

    def __init__(self, config: MTTSeq2SeqConfig) -> None:
        super().__init__(
            config,
            [MTTCrossDecoderLayer(config, index) for index in range(config.num_decoder_layers)],
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Compute the states that the head turns into logits.

        Args:
            input_ids (`torch.Tensor`, *optional*):
                Token ids, `[batch, sequence]`.
            attention_mask (`torch.Tensor`, *optional*):
                1 where there is a token and 0 where there is padding, `[batch, past + sequence]`;
                or a mask `[batch, 1, sequence, keys]` in the form the attention implementation
                asks for.
            encoder_hidden_states (`torch.Tensor`):
                The encoder's states, `[batch, keys, hidden_size]`.
            encoder_attention_mask (`torch.Tensor`, *optional*):
                1 where there is a token and 0 where there is padding, `[batch, keys]`.
            past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of earlier calls, and of the encoder's states. Changed in place.
            inputs_embeds (`torch.Tensor`, *optional*):
                Token embeddings in place of `input_ids`, `[batch, sequence, hidden_size]`.
            use_cache (`bool`, *optional*):
                Whether to start a cache if none is given.
            **kwargs:
                Passed down to the attention implementation.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions` with `last_hidden_state`
            `[batch, sequence, hidden_size]`.

        Raises:
            `ValueError`: arguments are missing, contradict each other or have another type, or
                there are more tokens than learned positions.
        """
        inputs_embeds = self.look_up(input_ids, inputs_embeds, "decoder_")
        if encoder_hidden_states is None:
            raise ValueError(
                "The decoder attends to the encoder's states: found no encoder_hidden_states. "
                "Call the whole model, or pass the encoder's last_hidden_state."
            )
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(
                growing_cache(self.config), DynamicCache(config=self.config)
            )
        if not isinstance(past_key_values, EncoderDecoderCache | None):
            raise ValueError(
                f"past_key_values holds two caches, the decoder's own and that of the encoder's "
                f"states: found {type(past_key_values).__name__}, expected EncoderDecoderCache."
            )

        own_cache = None if past_key_values is None else past_key_values.self_attention_cache
        attention_mask = self.create_mask(inputs_embeds, attention_mask, own_cache)
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        hidden_states, position_bias, position_embeddings = self._place(inputs_embeds, own_cache)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_bias,
                encoder_hidden_states,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def create_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> Any:
        """Return the causal mask in the form the attention implementation asks for."""
        implementation = self.config._attn_implementation
        if cache is not None and cache.is_compileable and implementation not in ("eager", "sdpa"):
            cache = with_own_counts(cache)
            if attention_mask is None:
                # FlashAttention learns from a mask alone that a static cache has slots for tokens
                # to come.
                num_seen = int(cache.get_seq_length()) + inputs_embeds.shape[1]
                attention_mask = torch.ones(
                    len(inputs_embeds), num_seen, dtype=torch.bool, device=inputs_embeds.device
                )
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
        )
