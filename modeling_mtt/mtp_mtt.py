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
"""Multi-token prediction: heads that predict tokens after the next one, and drafts made of them.

Head `k`, counted from 1, takes for the token at position `i` the states there of the head before
it, or of the model, and the embedding of the token at `i + k`; it predicts the token at
`i + k + 1`. As in megatron/core/transformer/multi_token_prediction.py; its `roll_tensor` puts token
0 at position 0 where a text has no such token.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.utils import output_capturing

from .configuration_mtt import MTTConfig
from .layers_mtt import MTTDecoderLayer
from .linear_mtt import build_linear, project
from .norms_mtt import build_norm

# Which states to keep of those that a model can return: its last ones. transformers < 5.23 counts
# them otherwise.
_LAST_STATES: Any = -1 if hasattr(output_capturing, "selected_hidden_states") else None


class MTTPredictionLayer(nn.Module):
    """One head: the embedding and the states of the head before it, joined for a decoder layer."""

    def __init__(self, config: MTTConfig, head_idx: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.enorm = build_norm(config, hidden_size)
        self.hnorm = build_norm(config, hidden_size)
        self.eh_proj = build_linear(2 * hidden_size, hidden_size, bias=False)
        self.transformer_layer = MTTDecoderLayer(config, config.num_hidden_layers + head_idx)
        attention: Any = self.transformer_layer.self_attn
        attention.layer_idx = head_idx
        self.final_layernorm = build_norm(config, hidden_size)

    def forward(
        self, inputs_embeds: torch.Tensor, hidden_states: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return states `[batch, sequence, hidden_size]`; more arguments are the layer's."""
        joined = torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)
        states = self.transformer_layer(project(self.eh_proj, joined), **kwargs)
        return self.final_layernorm(states)


class MTTPredictionHeads(nn.Module):
    """All heads of a model; they have a cache of their own."""

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [MTTPredictionLayer(config, head) for head in range(config.num_nextn_predict_layers)]
        )

    def forward(
        self,
        model: Any,
        hidden_states: torch.Tensor,
        token_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Return the states of each head for whole texts, `[batch, sequence, hidden_size]`.

        Args:
            model (`MTTModel`): whose heads these are.
            hidden_states (`torch.Tensor`): its last states.
            token_embeds (`torch.Tensor`): embeddings of the tokens, without positions.
            attention_mask, position_ids: as the model got them.
        """
        masks = model.create_masks(token_embeds, attention_mask, None, position_ids)
        if position_ids is None:
            position_ids = model.next_positions(token_embeds, None)
        kwargs |= model.layer_arguments(token_embeds, masks, position_ids)
        padding = model.embed_tokens(token_embeds.new_zeros(1, 1, dtype=torch.long))
        states = []
        for layer in self.layers:
            token_embeds = torch.cat(
                (token_embeds[:, 1:], padding.expand(token_embeds.shape[0], -1, -1)), dim=1
            )
            position_ids = nn.functional.pad(position_ids[:, 1:], (0, 1))
            inputs_embeds = model.finish_embedding(token_embeds, position_ids)
            hidden_states = layer(inputs_embeds, hidden_states, **kwargs)
            states.append(hidden_states)
        return states


class MTTCandidateGenerator(MTPCandidateGenerator):
    """Drafts of the model's own heads, for `generate(..., use_mtp=True)`.

    The class it extends, whose name `generate` looks for, reads heads from files in DeepSeek's
    layout. Of a text of which `n` tokens went through the model, and whose next token is known, the
    cache of the heads holds the first `n - num_heads + 1`: what they computed of tokens that may
    not have been accepted is computed again.

    Args:
        main_model (`MTTForCausalLM`): with heads.
        generation_config (`GenerationConfig`): tells where a text ends, and whether to sample.
        logits_processor (`LogitsProcessorList`, *optional*): what the model's logits go through.
    """

    def __init__(
        self,
        main_model: Any,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
    ) -> None:
        self.main_model = main_model
        self.heads = main_model.model.mtp.layers
        last = main_model.config.num_hidden_layers - 1
        self.model_kwargs_overrides = {"output_hidden_states": _LAST_STATES or [last]}
        self.max_length = generation_config.max_length
        self.do_sample = generation_config.do_sample
        self.eos_token_id = getattr(generation_config, "_eos_token_tensor", None)
        self.logits_processor = logits_processor
        self.cache = DynamicCache()
        self.start: int | None = None
        self.num_seen = 0
        self.states: torch.Tensor | None = None

    def get_candidates(
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the text with a draft of its next tokens, and the logits of the draft.

        Args:
            input_ids (`torch.LongTensor`): the text so far, `[1, n + 1]`.
            model_kwargs (`dict`): arguments of the model, for all of it.
            model_outputs (`CausalLMOutputWithPast`): of the model's last call, with states of
                accepted tokens and, after them, of others.
            is_first_iteration (`bool`): whether the model has not been called.
            n_last_matches (`int`): not needed.
        """
        if is_first_iteration:
            return input_ids, None
        num_tokens = input_ids.shape[1] - 1
        self._keep_states(model_outputs.hidden_states[-1], num_tokens)
        assert self.states is not None and self.start is not None
        num_drafts = min(len(self.heads), self.max_length - num_tokens - 2)
        if num_drafts < 1:
            return input_ids, None
        ids, logits = self._draft(input_ids, model_kwargs, num_drafts)

        # What comes after a token that may turn out wrong is computed anew.
        doubtful = len(self.heads) - 1
        if doubtful:
            for layer in self.cache.layers[:num_drafts]:
                layer.crop(-doubtful)
        self.states = self.states[:, max(self.states.shape[1] - doubtful, 0) :]

        drafts = ids[:, num_tokens + 1 :]
        if self.eos_token_id is not None:
            ends = torch.isin(drafts[0], self.eos_token_id.to(drafts.device)).nonzero()
            if ends.numel():
                num_drafts = int(ends[0]) + 1
        return ids[:, : num_tokens + 1 + num_drafts], logits[:, :num_drafts]

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        """Draft as many tokens next time."""

    def _keep_states(self, states: torch.Tensor, num_tokens: int) -> None:
        """Append what the model computed for accepted tokens."""
        if self.start is None:
            # A cache that `generate` was given holds tokens whose states are gone.
            self.start = num_tokens - min(states.shape[1], num_tokens)
            self.num_seen = self.start
        accepted = states[:, : num_tokens - self.num_seen].to(self.main_model.device)
        self.states = accepted if self.states is None else torch.cat((self.states, accepted), dim=1)
        self.num_seen = num_tokens

    def _draft(
        self, ids: torch.Tensor, model_kwargs: dict[str, Any], num_drafts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.states is not None and self.start is not None
        model = self.main_model.model
        hidden_states = self.states
        num_tokens, length = ids.shape[1] - 1, hidden_states.shape[1]
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, self.start : num_tokens]
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=ids.device).unsqueeze(0)
        position_ids = position_ids[:, num_tokens - length : num_tokens].to(hidden_states.device)
        masks = model.create_masks(hidden_states, mask, self.cache, position_ids)
        arguments = model.layer_arguments(hidden_states, masks, position_ids)
        arguments |= {"past_key_values": self.cache, "use_cache": True}

        all_logits = []
        for ahead, head in enumerate(self.heads[:num_drafts], start=1):
            embeds = model.embed_tokens(ids[:, -length:].to(hidden_states.device))
            embeds = model.finish_embedding(embeds, position_ids + ahead)
            hidden_states = head(embeds, hidden_states, **arguments)
            logits = self.main_model.compute_logits(hidden_states[:, -1:])[:, 0].to(ids.device)
            if self.logits_processor is not None:
                logits = self.logits_processor(ids, logits.float())
            all_logits.append(logits)
            if self.do_sample:
                token = torch.multinomial(logits.float().softmax(dim=-1), num_samples=1)
            else:
                token = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, token), dim=-1)
        return ids, torch.stack(all_logits, dim=1)
