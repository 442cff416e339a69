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

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .base_seq2seq_mtt import MTTSeq2SeqPreTrainedModel
from .configuration_seq2seq_mtt import MTTSeq2SeqConfig
from .generation_seq2seq_mtt import MTTSeq2SeqGenerationMixin
from .linear_mtt import build_linear, project
from .modeling_mtt import slice_logits_to_keep  # type: ignore[attr-defined]
from .stacks_seq2seq_mtt import MTTDecoder, MTTEncoder


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


class MTTForConditionalGeneration(
    MTTSeq2SeqPreTrainedModel, MTTSeq2SeqGenerationMixin, GenerationMixin
):
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
