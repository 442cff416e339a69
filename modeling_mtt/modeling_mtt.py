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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mtt import check_bias, positions_of_packed
from .base_mtt import MTTPreTrainedModel
from .cache_mtt import growing_cache, with_own_counts
from .configuration_mtt import MTTConfig
from .generation_mtt import NO_CONTINUOUS_BATCHING, MTTCausalGenerationMixin
from .layers_mtt import MTTAttention, MTTDecoderLayer, multiply
from .linear_mtt import build_linear, project
from .mlp_mtt import MTTMLP
from .moe_mtt import balance_loss, check_server
from .mtp_mtt import MTTPredictionHeads
from .norms_mtt import build_norm
from .positions_mtt import MTTRotaryEmbedding, alibi_distances, rotation_of_heads

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.23

    def slice_logits_to_keep(
        hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


@dataclass
class MTTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and what only some models have.

    Attributes:
        aux_loss (`torch.Tensor`, *optional*): 1 where a mixture's experts get as many tokens.
        router_logits (`tuple[torch.Tensor]`, *optional*): of each sparse layer,
            `[batch * sequence, num_experts]`.
        mtp_logits (`tuple[torch.Tensor]`, *optional*): of each head that predicts further
            tokens, `[batch, kept, vocab_size]`: the first says what comes after the next token.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    mtp_logits: tuple[torch.Tensor, ...] | None = None


MASK_FUNCTIONS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}

# Attention implementations of servers that run layers of their own in place of some of these.
SERVERS = ("vllm", "vllm_mla", "sglang")


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
        # A server of its own runs none of them, and says so by the attention it brings.
        self.mtp = None
        if config._attn_implementation in SERVERS:
            check_server(config)
        elif config.num_nextn_predict_layers:
            self.mtp = MTTPredictionHeads(config)
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
    ) -> MoeModelOutputWithPast:
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
            `MoeModelOutputWithPast` with `last_hidden_state` `[batch, sequence, hidden_size]`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds` are given, or a
                position lies beyond the table of learned positions.
        """
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        if self.config.position_embedding_type == "alibi":
            if "cache" in kwargs:
                raise ValueError(NO_CONTINUOUS_BATCHING)
            check_bias(self.config._attn_implementation, "ALiBi adds")

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
            position_ids = self.next_positions(inputs_embeds, past_key_values)
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
            hidden_states = self.finish_embedding(hidden_states, position_ids)

        arguments = self.layer_arguments(hidden_states, masks, position_ids)
        # A configuration may name fewer layers than there are: assistants that leave early do.
        layer_types = self.layer_types[: self.config.num_hidden_layers]
        for layer_type, decoder_layer in zip(layer_types, self.layers, strict=False):
            # A stage has masks for the layers it holds.
            arguments["attention_mask"] = masks.get(layer_type)
            hidden_states = decoder_layer(
                hidden_states,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **arguments,
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
        )

    def layer_arguments(
        self, states: torch.Tensor, masks: dict[str, Any], position_ids: torch.Tensor
    ) -> dict[str, Any]:
        """Return what layers take besides states: the mask is that of the last one held here."""
        arguments: dict[str, Any] = {"position_ids": position_ids, "position_embeddings": None}
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb(states, position_ids=position_ids)
            rotation = rotation_of_heads(cos, sin, self.config.rope_interleave)
            arguments["position_embeddings"] = rotation
        if "distances" in masks:
            arguments["distances"] = masks["distances"]
        arguments["attention_mask"] = masks.get(self.layer_types[-1])
        return arguments

    def check_heads(self) -> None:
        """Refuse to predict further tokens where there is nothing to do so with.

        Raises:
            `ValueError`: the model has no heads.
        """
        if self.mtp is None:
            raise ValueError(
                "The model has no heads that predict further tokens: found "
                f"num_nextn_predict_layers {self.config.num_nextn_predict_layers}, expected 1 or "
                "more. Load a checkpoint that has them, and leave that field alone."
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
        if past_key_values is not None and self.config._attn_implementation == "flex_attention":
            past_key_values = with_own_counts(past_key_values)
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
                position_ids = self.next_positions(inputs_embeds, past_key_values)
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

    def next_positions(
        self, inputs_embeds: torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Return positions `[1, sequence]` that go on where the cache ends."""
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        return (positions + self._seen_tokens(past_key_values)).unsqueeze(0)

    def finish_embedding(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Apply what comes between the token embeddings and the first layer.

        Positions are added before the multiplier, as in Megatron's LanguageModelEmbedding.
        """
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        inputs_embeds = multiply(inputs_embeds, self.config.embedding_multiplier)
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


class MTTForCausalLM(MTTPreTrainedModel, MTTCausalGenerationMixin, GenerationMixin):
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
        output_router_logits: bool | None = None,
        output_mtp_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MTTCausalLMOutputWithPast:
        """Compute logits, and a loss where there are labels.

        Arguments not listed here are those of `MTTModel.forward`.

        Args:
            labels (`torch.LongTensor`, *optional*):
                Token ids `[batch, sequence]` to predict, -100 where there is nothing to. The shift
                by one token is done here: pass `input_ids` to train on them.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions to compute logits for, or which ones. 0 means all.
            output_router_logits (`bool`, *optional*):
                Whether to return `router_logits` and `aux_loss`, of which the loss then has
                `router_aux_loss_coef`. Only with experts; the configuration's by default.
            output_mtp_logits (`bool`, *optional*, defaults to `False`):
                Whether to return `mtp_logits`, for whole texts: without a past.

        Returns:
            `MTTCausalLMOutputWithPast` with `logits` `[batch, kept, vocab_size]` and `loss`.

        Raises:
            `ValueError`: `output_mtp_logits` without heads, or with a past.

        ```python
        >>> import torch
        >>> from modeling_mtt import MTTConfig, MTTForCausalLM

        >>> config = MTTConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> MTTForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 50257])
        ```
        """
        if self.config.num_experts is not None:
            if output_router_logits is None:
                output_router_logits = self.config.output_router_logits
            kwargs["output_router_logits"] = output_router_logits
        if output_mtp_logits:
            self.model.check_heads()
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError(
                    "output_mtp_logits is for whole texts: found past_key_values with tokens, "
                    "expected none. To generate with the heads, pass use_mtp=True to generate()."
                )
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.compute_logits(kept)

        loss = aux_loss = mtp_logits = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if outputs.router_logits:
            aux_loss = balance_loss(
                outputs.router_logits, self.config.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if output_mtp_logits:
            if inputs_embeds is None:
                inputs_embeds = self.model.embed_tokens(input_ids)
            states = self.model.mtp(
                self.model,
                outputs.last_hidden_state,
                inputs_embeds,
                attention_mask,
                position_ids,
            )
            mtp_logits = tuple(
                self.compute_logits(slice_logits_to_keep(each, logits_to_keep)) for each in states
            )

        return MTTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
            mtp_logits=mtp_logits,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., vocab_size]` of states `[..., hidden_size]`."""
        logits = project(self.lm_head, hidden_states)
        return logits if self.config.logits_scaling == 1.0 else logits / self.config.logits_scaling


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
    "MTTMLP",
    "MTTAttention",
    "MTTCausalLMOutputWithPast",
    "MTTForCausalLM",
    "MTTForQuestionAnswering",
    "MTTForSequenceClassification",
    "MTTForTokenClassification",
    "MTTModel",
    "MTTPreTrainedModel",
    "build_norm",
]
