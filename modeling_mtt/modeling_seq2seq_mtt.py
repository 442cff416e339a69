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
"""PyTorch MTT encoder-decoder model: what Megatron calls T5."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mtt import eager_attention_forward, pack_rows
from .base_mtt import MTTPreTrainedModel
from .cache_mtt import growing_cache, let_grow, with_own_counts
from .configuration_seq2seq_mtt import MTTSeq2SeqConfig
from .layers_mtt import MTTAttention
from .linear_mtt import build_linear, project
from .mlp_mtt import MTTMLP
from .modeling_mtt import (  # type: ignore[attr-defined]
    ALIBI_IMPLEMENTATIONS,
    slice_logits_to_keep,
)
from .norms_mtt import build_norm
from .parallel_mtt import share_of_heads, share_random_state
from .positions_mtt import MTTRotaryEmbedding, rotation_of_heads
from .relative_mtt import MTTRelativePositionBias

# A bias is a bias: those that add ALiBi's add this one too.
RELATIVE_IMPLEMENTATIONS = ALIBI_IMPLEMENTATIONS


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


class MTTSeq2SeqPreTrainedModel(MTTPreTrainedModel):
    """What transformers needs to know about every MTT encoder-decoder."""

    config: MTTSeq2SeqConfig
    _no_split_modules = ["MTTEncoderLayer", "MTTCrossDecoderLayer"]
    # What vLLM and SGLang ask for: neither has encoder-decoders.
    _supports_attention_backend = False
    _can_record_outputs: dict[str, Any] = {}
    # There are no experts, and no heads that predict further tokens.
    _keep_in_fp32_modules_strict: list[str] = []
    _keys_to_ignore_on_load_unexpected: list[str] = []

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        chosen = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if (
            self.config.position_embedding_type == "relative"
            and chosen not in RELATIVE_IMPLEMENTATIONS
        ):
            raise ValueError(
                f"Relative positions add a bias to attention scores: found attention "
                f"implementation '{chosen}', expected one of {RELATIVE_IMPLEMENTATIONS}. "
                'Load the model with attn_implementation="sdpa".'
            )
        return chosen

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, **kwargs: Any) -> tuple:
        """Start the processes' communication, unless the kind of parallelism is not for it.

        Raises:
            `ValueError`: pipeline parallelism is asked for.
        """
        given = distributed_config
        pp_size = given.get("pp_size") if isinstance(given, dict) else getattr(given, "pp_size", 1)
        if (pp_size or 1) > 1:
            raise ValueError(
                f"Pipeline parallelism cuts one stack of layers, and an encoder-decoder has two: "
                f"found pp_size {pp_size}, expected 1. Use tp_size, or device_map='auto'."
            )
        return super().prepare_distribute_model(distributed_config, **kwargs)

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what `save_pretrained` writes: whole tensors, and each tied one once."""
        gathered = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, *args, **kwargs
        )
        if not gathered:
            return gathered
        tied = model_to_save.all_tied_weights_keys
        return {name: tensor for name, tensor in gathered.items() if name not in tied}


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

    def _look_up(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
    ) -> torch.Tensor:
        """Return the token embeddings, of which exactly one form is given."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(
                f"You must specify exactly one of {prefix}input_ids or {prefix}inputs_embeds, "
                f"got {given}"
            )
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

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
        inputs_embeds = self._look_up(input_ids, inputs_embeds)
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
        inputs_embeds = self._look_up(input_ids, inputs_embeds, "decoder_")
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


class MTTSeq2SeqModel(MTTSeq2SeqPreTrainedModel):
    """Encoder and decoder without the head."""

    _input_embed_layer = "shared"

    def __init__(self, config: MTTSeq2SeqConfig) -> None:
        super().__init__(config)
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder = MTTEncoder(config)
        self.decoder = MTTDecoder(config)
        shared = {"embed_tokens.weight": "shared.weight"}
        if self.embed_positions is not None:
            shared["embed_positions.weight"] = "embed_positions.weight"
        self._tied_weights_keys = {
            f"{side}.{name}": source
            for side in ("encoder", "decoder")
            for name, source in shared.items()
        }

        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return what is tied whatever `tie_word_embeddings`, which is about the head, says."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of both sides."""
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Read a text and compute the decoder's states.

        Args:
            input_ids (`torch.Tensor`, *optional*):
                Token ids of the text to read, `[batch, source]`.
            attention_mask (`torch.Tensor`, *optional*):
                1 where there is a token and 0 where there is padding, `[batch, source]`. Positions
                count padding: with learned ones, it belongs on the right.
            decoder_input_ids (`torch.Tensor`, *optional*):
                Token ids of the text to write, `[batch, target]`, one to the right of the labels.
            decoder_attention_mask (`torch.Tensor`, *optional*):
                As `attention_mask`, `[batch, past + target]`. Later tokens are never seen.
            encoder_outputs (`BaseModelOutput`, *optional*):
                What the encoder returned of `input_ids`, which are not read again then.
            past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of earlier calls. Changed in place.
            inputs_embeds (`torch.Tensor`, *optional*):
                Token embeddings in place of `input_ids`, `[batch, source, hidden_size]`.
            decoder_inputs_embeds (`torch.Tensor`, *optional*):
                Token embeddings in place of `decoder_input_ids`, `[batch, target, hidden_size]`.
            use_cache (`bool`, *optional*):
                Whether to start a cache if none is given.
            **kwargs:
                Passed down to the attention implementation.

        Returns:
            `Seq2SeqModelOutput` with `last_hidden_state` `[batch, target, hidden_size]`.

        Raises:
            `ValueError`: arguments are missing or contradict each other, or there are more tokens
                than learned positions.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        assert isinstance(encoder_outputs, BaseModelOutput)

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class MTTForConditionalGeneration(MTTSeq2SeqPreTrainedModel, GenerationMixin):
    """The encoder-decoder with a head that gives the next token's logits."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MTTSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = MTTSeq2SeqModel(config)
        self.lm_head = build_linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

        self.post_init()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of both sides."""
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Compute logits, and a loss where there are labels.

        Arguments not listed here are those of `MTTSeq2SeqModel.forward`.

        Args:
            labels (`torch.Tensor`, *optional*):
                Token ids `[batch, target]` to write, -100 where there is nothing to. They become
                `decoder_input_ids`, one to the right, unless those are given.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions to compute logits for, or which ones. 0 means all.

        Returns:
            `Seq2SeqLMOutput` with `logits` `[batch, kept, vocab_size]` and `loss`.

        ```python
        >>> import torch
        >>> from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig

        >>> config = MTTSeq2SeqConfig(num_encoder_layers=2, num_decoder_layers=2)
        >>> model = MTTForConditionalGeneration(config)
        >>> model(torch.tensor([[1, 2, 3]]), decoder_input_ids=torch.tensor([[1]])).logits.shape
        torch.Size([1, 1, 29096])
        ```
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        outputs: Seq2SeqModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = project(self.lm_head, hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                # Shifted already: what the decoder reads is.
                shift_labels=labels,
                **kwargs,
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the decoder reads to write `labels`, `[batch, target]`: one to the right.

        Raises:
            `ValueError`: the configuration has no token to start with, or none for padding.
        """
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None:
            raise ValueError(
                "The decoder reads padding where labels are -100: found no pad_token_id. "
                "Set config.pad_token_id, or pass decoder_input_ids."
            )
        start = labels.new_full((len(labels), 1), self.config.start_token())
        shifted = torch.cat((start, labels[:, :-1]), dim=-1)
        return shifted.masked_fill(shifted == -100, pad_token_id)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin` does, with the same random numbers on every process."""
        share_random_state(getattr(self, "_device_mesh", None), self.device)
        return super().generate(*args, **kwargs)

    def create_masks_for_generate(
        self,
        config: MTTSeq2SeqConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Make the mask that `generate` passes with a static cache, as the decoder would."""
        if self.config._attn_implementation == "flex_attention":
            # `generate` takes what it passes for tensors, which flex attention's masks are not.
            return attention_mask
        cache = past_key_values.self_attention_cache
        return self.model.decoder.create_mask(inputs_embeds, attention_mask, cache)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which has no place for an encoder's states.

        Raises:
            `ValueError`: always.
        """
        raise ValueError(
            "An encoder-decoder does not run with continuous batching, whose cache has no place "
            "for the encoder's states: use generate() in place of generate_batch()."
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Refuse a compiled generation that may not fit a learned table before it starts.

        Compiled code could not say so later. The last token generated is never looked up, and
        `max_cache_length` does not count it.
        """
        compiles = (
            generation_config.cache_implementation == "static"
            or generation_config.compile_config is not None
            or hasattr(self.forward, "_torchdynamo_orig_callable")
        )
        table_size = self.config.max_position_embeddings
        if (
            compiles
            and self.config.position_embedding_type == "learned"
            and max_cache_length > table_size
        ):
            raise ValueError(
                "The generation does not fit the table of learned positions: found "
                f"{max_cache_length} positions to look up, of all new tokens but the last, "
                f"expected at most max_position_embeddings ({table_size}). "
                f"Lower max_new_tokens by {max_cache_length - table_size}."
            )
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if given is None and model_kwargs.get("past_key_values") is not None:
            let_grow(model_kwargs["past_key_values"].self_attention_cache)


# See modeling_mtt: Trainer, among others, tells by these names what a class computes.
modeling_auto.MODEL_MAPPING_NAMES[MTTSeq2SeqConfig.model_type] = MTTSeq2SeqModel.__name__
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[MTTSeq2SeqConfig.model_type] = (
    MTTForConditionalGeneration.__name__
)

__all__ = [
    "MTTForConditionalGeneration",
    "MTTSeq2SeqModel",
    "MTTSeq2SeqPreTrainedModel",
]
