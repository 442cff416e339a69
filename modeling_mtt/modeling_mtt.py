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
"""PyTorch MTT model."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mtt import (
    available_implementation,
    eager_attention_forward,
    positions_of_packed,
)
from .cache_mtt import growing_cache, let_grow
from .configuration_mtt import MTTConfig
from .linear_mtt import build_linear, project
from .parallel_mtt import (
    check_combination,
    check_continuous_batching,
    check_parallel_sizes,
    cut_stage,
    gather_stages,
    parallel_plan,
    share_random_state,
)
from .positions_mtt import (
    MTTRotaryEmbedding,
    alibi_distances,
    alibi_slopes,
    rotate_heads,
    rotation_of_heads,
)

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.23

    def slice_logits_to_keep(
        hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


@use_kernel_forward_from_hub("RMSNorm")
class MTTRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
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
        return _rms_norm(hidden_states, 1.0 + self.weight.float(), self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MTTZeroCenteredLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose weight is stored as gamma - 1, the 1 being added back in float32."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.layer_norm(
            hidden_states.float(),
            self.normalized_shape,
            1.0 + self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return normed.to(hidden_states.dtype)


MASK_FUNCTIONS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}

_NO_CONTINUOUS_BATCHING = (
    "ALiBi does not run with continuous batching, whose cache does not say how far keys are: "
    "use generate() in place of generate_batch()."
)

# The others have no argument for a bias, and some would ignore it.
ALIBI_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")

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


class MTTMLP(nn.Module):
    """Feed-forward block, gated or not."""

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_proj = None
        if config.gated_mlp:
            self.gate_proj = build_linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = build_linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = build_linear(intermediate_size, hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activated = project(self.up_proj, hidden_states)
        if self.gate_proj is None:
            activated = self.act_fn(activated)
        else:
            activated = self.act_fn(project(self.gate_proj, hidden_states)) * activated
        return project(self.down_proj, activated)


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
        sliding = config.types_of_layers()[layer_idx] == "sliding_attention"
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


class MTTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: MTTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MTTAttention(config, layer_idx)
        self.mlp = MTTMLP(config)
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
        return _multiply(hidden_states, self.residual_multiplier)


def _multiply(hidden_states: torch.Tensor, multiplier: float) -> torch.Tensor:
    return hidden_states if multiplier == 1.0 else hidden_states * multiplier


class MTTPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every MTT model."""

    config: MTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MTTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": MTTDecoderLayer,
        "attentions": MTTAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MTTZeroCenteredLayerNorm | MTTZeroCenteredRMSNorm):
            init.zeros_(module.weight)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        chosen: str = super()._check_and_adjust_attn_implementation(
            available_implementation(attn_implementation), *args, **kwargs
        )
        return chosen

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, **kwargs: Any) -> tuple:
        """Start the processes' communication, unless the kinds of parallelism cannot combine."""
        if distributed_config is not None:
            check_combination(distributed_config)
        return super().prepare_distribute_model(distributed_config, **kwargs)

    @classmethod
    def maybe_distribute_model(
        cls, model: "MTTPreTrainedModel", distributed_config: Any, mesh: Any
    ) -> "MTTPreTrainedModel":
        """Distribute a model that has no weights yet, with our own styles where they are needed."""
        if mesh is None:
            return super().maybe_distribute_model(model, distributed_config, mesh)
        check_parallel_sizes(model.config, distributed_config)
        given, plan = distributed_config, dict(model._tp_plan)
        if distributed_config.tp_size > 1:
            if isinstance(given.tp_plan, dict):
                plan |= given.tp_plan
            distributed_config = copy(given)
            distributed_config.tp_plan = parallel_plan(plan, model.config, given)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        # Caches are sized by the plan, and know the styles of transformers only.
        model._tp_plan, model.config.distributed_config = plan, given
        for module in model.modules():
            if isinstance(module, MTTAttention):
                module.num_key_value_groups = module.count_groups()
        return model

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[dict, dict, dict]:
        tp_plan, *others = super()._resolve_parallel_plans(distributed_config)
        if distributed_config.tp_size > 1 and distributed_config.pp_size > 1:
            # transformers resolves plans before it drops other stages' modules, which stay named.
            held = cut_stage(self, self._mesh_manager.get_mesh("pp"))
            tp_plan = {name: style for name, style in tp_plan.items() if name in held}
        return tp_plan, *others

    def gather_sharded_state_dict_for_save(
        self,
        model_to_save: nn.Module,
        state_dict: dict[str, Any],
        distributed_config: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return what `save_pretrained` writes: whole tensors, of all pipeline stages."""
        if distributed_config is None:
            return state_dict
        stage = getattr(model_to_save, "_pp_stage", None)
        if stage is not None:
            # Whichever stage it is, the first one writes what it holds.
            kwargs["save_on_this_rank"] = True
        state_dict = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )
        if stage is not None:
            state_dict = gather_stages(state_dict, stage)
        # Gathered one by one, tied weights no longer look tied.
        if self.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        return state_dict


class MTTModel(MTTPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MTTConfig) -> None:
        super().__init__(config)
        # No padding index: the padding token of a Megatron model is often one it was trained on.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_norm = build_norm(config, config.hidden_size) if config.embedding_norm else None
        self.layer_types = config.types_of_layers()
        self.layers = nn.ModuleList(
            [MTTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = build_norm(config, config.hidden_size)
        self.rotary_emb = None
        if config.position_embedding_type == "rope":
            self.rotary_emb = MTTRotaryEmbedding(config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the states that the head turns into logits.

        Args:
            input_ids (`torch.LongTensor`, *optional*):
                Token ids, `[batch, sequence]`.
            attention_mask (`torch.Tensor`, *optional*):
                1 where there is a token and 0 where there is padding, `[batch, past + sequence]`;
                or a mask `[batch, 1, sequence, keys]` in the form the attention implementation
                asks for; or the result of `create_masks`.
            position_ids (`torch.LongTensor`, *optional*):
                Positions, `[batch or 1, sequence]`. Counted from the end of the cache by default.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier calls. Changed in place.
            inputs_embeds (`torch.FloatTensor`, *optional*):
                Token embeddings in place of `input_ids`, `[batch, sequence, hidden_size]`. Learned
                positions are added to them.
            use_cache (`bool`, *optional*):
                Whether to start a cache if none is given.
            **kwargs:
                Passed down to the attention implementation.

        Returns:
            `BaseModelOutputWithPast` with `last_hidden_state` `[batch, sequence, hidden_size]`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds` are given, or a
                position lies beyond the table of learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(
                f"You must specify exactly one of input_ids or inputs_embeds, got {given}"
            )

        if self.config.position_embedding_type == "alibi":
            self._check_attention(kwargs)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # Positions that come with no cache may belong to several packed sequences.
        counted = position_ids is None or past_key_values is not None
        packed = kwargs.get("cu_seq_lens_q")
        if position_ids is None and past_key_values is None and packed is not None:
            position_ids = positions_of_packed(packed, inputs_embeds.shape[1])

        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            # Before there is a new cache, with which transformers takes nothing for packed.
            masks = self.create_masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = self._next_positions(inputs_embeds, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = growing_cache(self.config)

        hidden_states = inputs_embeds
        # A later pipeline stage gets the states of the stage before it as `inputs_embeds`.
        if self._first_layer() == 0:
            if self.embed_positions is not None and not is_tracing(position_ids):
                length = None
                if counted:
                    length = self._seen_tokens(past_key_values) + inputs_embeds.shape[1]
                self._check_positions(position_ids, length)
            hidden_states = self._finish_embedding(hidden_states, position_ids)

        position_embeddings = None
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids)
            position_embeddings = rotation_of_heads(cos, sin, self.config.rope_interleave)
        if "distances" in masks:
            kwargs["distances"] = masks["distances"]

        # A configuration may name fewer layers than there are: assistants that leave early do.
        layer_types = self.layer_types[: self.config.num_hidden_layers]
        for layer_type, decoder_layer in zip(layer_types, self.layers, strict=False):
            hidden_states = decoder_layer(
                hidden_states,
                # A stage has masks for the layers it holds.
                attention_mask=masks.get(layer_type),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
        )

    def create_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return what a call of these arguments needs besides states, shared by its layers.

        Returns:
            The mask of each type of layer this process holds, in the form the attention
            implementation asks for, and with ALiBi `distances` `[batch or 1, 1, queries, keys]`.
        """
        masks = {}
        for layer_type in dict.fromkeys(self.layer_types):
            layer_idx = self._first_layer(layer_type)
            if layer_idx < len(self.layers):
                masks[layer_type] = MASK_FUNCTIONS[layer_type](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                    layer_idx=layer_idx,
                )
        if self.config.position_embedding_type == "alibi":
            if position_ids is None:
                position_ids = self._next_positions(inputs_embeds, past_key_values)
            masks["distances"] = alibi_distances(
                attention_mask, past_key_values, position_ids, self._first_layer()
            )
        return masks

    def _first_layer(self, layer_type: str | None = None) -> int:
        """Return the index of the first layer, of this type if given, that this process holds.

        transformers, vLLM and SGLang put an identity where a layer is another pipeline stage's.
        `embed_tokens` would not tell the first stage: a tied head keeps it on the last one too.
        """
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, nn.Identity):
                continue
            if layer_type is None or self.layer_types[layer_idx] == layer_type:
                return layer_idx
        return len(self.layers)

    def _seen_tokens(self, past_key_values: Cache | None) -> int | torch.Tensor:
        # The cache of a layer that another pipeline stage holds stays empty here.
        if past_key_values is None:
            return 0
        return past_key_values.get_seq_length(self._first_layer())

    def _next_positions(
        self, inputs_embeds: torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Return positions `[1, sequence]` that go on where the cache ends."""
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        return (positions + self._seen_tokens(past_key_values)).unsqueeze(0)

    def _finish_embedding(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Apply what comes between the token embeddings and the first layer.

        Positions are added before the multiplier, as in Megatron's LanguageModelEmbedding.
        """
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        inputs_embeds = _multiply(inputs_embeds, self.config.embedding_multiplier)
        if self.embed_norm is not None:
            inputs_embeds = self.embed_norm(inputs_embeds)
        if self.training:
            inputs_embeds = nn.functional.dropout(inputs_embeds, self.config.hidden_dropout)
        return inputs_embeds

    def _check_positions(
        self, position_ids: torch.Tensor, length: int | torch.Tensor | None
    ) -> None:
        """Raise a readable error in place of an index error, or of a failed assertion on a GPU.

        Reading a position waits for the device. Off the CPU it is done only where `length`, the
        tokens seen up to and with this call, says that something may be wrong. It is no proof:
        padding on the left makes positions smaller.
        """
        table_size = self.config.max_position_embeddings
        too_long = isinstance(length, int) and length > table_size
        if not (too_long or position_ids.device.type == "cpu"):
            return
        largest = int(position_ids.max())
        if largest >= table_size:
            raise ValueError(
                f"Position {largest} is beyond the table of learned positions: found a sequence of "
                f"{largest + 1} tokens, expected at most max_position_embeddings ({table_size}). "
                "Shorten the prompt or the generation; a learned table cannot be extended."
            )

    def _check_attention(self, kwargs: dict[str, Any]) -> None:
        """Raise where ALiBi would be left out in silence."""
        implementation = self.config._attn_implementation
        if "cache" in kwargs:
            raise ValueError(_NO_CONTINUOUS_BATCHING)
        if implementation not in ALIBI_IMPLEMENTATIONS:
            raise ValueError(
                f"ALiBi adds a bias to attention scores: found attention implementation "
                f"'{implementation}', expected one of {ALIBI_IMPLEMENTATIONS}. "
                'Load the model with attn_implementation="sdpa".'
            )


class MTTForCausalLM(MTTPreTrainedModel, GenerationMixin):
    """The decoder with a head that gives the next token's logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MTTConfig) -> None:
        super().__init__(config)
        self.model = MTTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute logits, and a loss where there are labels.

        Arguments not listed here are those of `MTTModel.forward`.

        Args:
            labels (`torch.LongTensor`, *optional*):
                Token ids `[batch, sequence]` to predict, -100 where there is nothing to. The shift
                by one token is done here: pass `input_ids` to train on them.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions to compute logits for, or which ones. 0 means all.

        Returns:
            `CausalLMOutputWithPast` with `logits` `[batch, kept, vocab_size]` and `loss`.

        ```python
        >>> import torch
        >>> from modeling_mtt import MTTConfig, MTTForCausalLM

        >>> config = MTTConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> MTTForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 50257])
        ```
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = project(self.lm_head, hidden_states)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin` does, with the same random numbers on every process."""
        share_random_state(getattr(self, "_device_mesh", None), self.device)
        return super().generate(*args, **kwargs)

    def create_masks_for_generate(
        self,
        config: MTTConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | torch.Tensor | None:
        """Make the masks that `generate` passes with a static cache, as `MTTModel` would."""
        if self.config._attn_implementation == "flex_attention":
            # `generate` takes what it passes for tensors, which flex attention's masks are not.
            return attention_mask
        return self.model.create_masks(inputs_embeds, attention_mask, past_key_values, position_ids)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return a manager of continuous batching, which `generate_batch` asks for.

        Raises:
            `ValueError`: the model has ALiBi, or its layout shares heads or deals layers; and, by
                the manager, a prompt is longer than a table of learned positions.
        """
        if self.config.position_embedding_type == "alibi":
            raise ValueError(_NO_CONTINUOUS_BATCHING)
        check_continuous_batching(self.config, getattr(self.config, "distributed_config", None))
        manager = super().init_continuous_batching(*args, **kwargs)
        if self.config.position_embedding_type == "learned":
            self._keep_requests_within_table(manager)
        return manager

    def _keep_requests_within_table(self, manager: Any) -> None:
        """End texts where the table ends: an error later would end those of all requests."""
        table_size, add_request = self.config.max_position_embeddings, manager.add_request

        def add(
            input_ids: list[int],
            request_id: str | None = None,
            max_new_tokens: int | None = None,
            **options: Any,
        ) -> str | None:
            room = table_size - len(input_ids) + 1
            if room < 1:
                raise ValueError(
                    f"The prompt does not fit the table of learned positions: found "
                    f"{len(input_ids)} tokens, expected at most max_position_embeddings "
                    f"({table_size}). Shorten the prompt."
                )
            if max_new_tokens is None:
                max_new_tokens = manager.generation_config.max_new_tokens
            if max_new_tokens is None or max_new_tokens > room:
                max_new_tokens = room
            return add_request(input_ids, request_id, max_new_tokens, **options)

        manager.add_request = add

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Refuse a generation that cannot end within a learned table before it starts.

        Compiled code could not say so later. The last token generated is never looked up, and
        `max_cache_length` does not count it.
        """
        mask = model_kwargs.get("attention_mask")
        compiles = (
            generation_config.cache_implementation == "static"
            or generation_config.compile_config is not None
            or hasattr(self.forward, "_torchdynamo_orig_callable")
        )
        # `generate` drops a mask of ones. What is not compiled may end before the table does.
        checks = compiles if mask is None else mask.ndim == 2
        if self.config.position_embedding_type == "learned" and checks:
            padding = 0 if mask is None else int((mask == 0).sum(-1).min())
            positions = max_cache_length - padding
            table_size = self.config.max_position_embeddings
            if positions > table_size:
                raise ValueError(
                    "The generation does not fit the table of learned positions: found "
                    f"{positions} positions to look up, of the prompt and all new tokens but the "
                    f"last, expected at most max_position_embeddings ({table_size}). "
                    f"Lower max_new_tokens by {positions - table_size}, or shorten the prompt."
                )
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if given is None:
            let_grow(model_kwargs.get("past_key_values"))


# The generic heads of transformers ask the auto classes for the decoder, which refuse to answer for
# code that came with the weights: each builds its own here.


class MTTForSequenceClassification(GenericForSequenceClassification, MTTPreTrainedModel):
    """The decoder with a head that classifies a text by its last token."""

    def __init__(self, config: MTTConfig) -> None:
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = MTTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        self.post_init()


class MTTForTokenClassification(GenericForTokenClassification, MTTPreTrainedModel):
    """The decoder with a head that classifies each token."""

    def __init__(self, config: MTTConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = MTTModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

        self.post_init()


class MTTForQuestionAnswering(GenericForQuestionAnswering, MTTPreTrainedModel):
    """The decoder with a head that finds where an answer starts and ends."""

    def __init__(self, config: MTTConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = MTTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        self.post_init()


# Trainer, among others, tells by the names in these tables what a class computes: whether to shift
# labels. They know no other way, whether a class came with the weights or was registered.
for _table, _class in (
    (modeling_auto.MODEL_MAPPING_NAMES, MTTModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MTTForCausalLM),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, MTTForQuestionAnswering),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MTTForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, MTTForTokenClassification),
):
    _table[MTTConfig.model_type] = _class.__name__

__all__ = [
    "MTTForCausalLM",
    "MTTForQuestionAnswering",
    "MTTForSequenceClassification",
    "MTTForTokenClassification",
    "MTTModel",
    "MTTPreTrainedModel",
]
