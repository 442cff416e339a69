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
"""What `generate` and `generate_batch` need to know of an MTT model."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig

from .cache_mtt import let_grow
from .mtp_mtt import MTTCandidateGenerator
from .parallel_mtt import check_continuous_batching, share_random_state

NO_CONTINUOUS_BATCHING = (
    "ALiBi does not run with continuous batching, whose cache does not say how far keys are: "
    "use generate() in place of generate_batch()."
)


class MTTGenerationMixin:
    """Comes before transformers' `GenerationMixin` among the classes of a model with a head."""

    config: Any
    model: Any
    device: torch.device
    forward: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin` does, with the same random numbers on every process."""
        share_random_state(getattr(self, "_device_mesh", None), self.device)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | torch.Tensor | None:
        """Make the masks that `generate` passes with a static cache, as the model would."""
        if self.config._attn_implementation == "flex_attention":
            # `generate` takes what it passes for tensors, which flex attention's masks are not.
            return attention_mask
        return self._create_masks(inputs_embeds, attention_mask, past_key_values, position_ids)

    def _create_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any] | torch.Tensor | None:
        raise NotImplementedError

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
        if self.config.position_embedding_type == "learned":
            compiles = (
                generation_config.cache_implementation == "static"
                or generation_config.compile_config is not None
                or hasattr(self.forward, "_torchdynamo_orig_callable")
            )
            self._check_table(max_cache_length, model_kwargs.get("attention_mask"), compiles)
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if given is None:
            let_grow(model_kwargs.get("past_key_values"))

    def _check_table(
        self, max_cache_length: int, attention_mask: torch.Tensor | None, compiles: bool
    ) -> None:
        raise NotImplementedError


class MTTCausalGenerationMixin(MTTGenerationMixin):
    """What generation with a decoder has besides."""

    def _create_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        masks: dict[str, Any] = self.model.create_masks(
            inputs_embeds, attention_mask, past_key_values, position_ids
        )
        return masks

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return a manager of continuous batching, which `generate_batch` asks for.

        Raises:
            `ValueError`: the model has ALiBi, or its layout shares heads or deals layers; and, by
                the manager, a prompt is longer than a table of learned positions.
        """
        if self.config.position_embedding_type == "alibi":
            raise ValueError(NO_CONTINUOUS_BATCHING)
        check_continuous_batching(self.config, getattr(self.config, "distributed_config", None))
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
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

    def _check_table(
        self, max_cache_length: int, attention_mask: torch.Tensor | None, compiles: bool
    ) -> None:
        # `generate` drops a mask of ones. What is not compiled may end before the table does.
        if not (compiles if attention_mask is None else attention_mask.ndim == 2):
            return
        padding = 0 if attention_mask is None else int((attention_mask == 0).sum(-1).min())
        positions = max_cache_length - padding
        table_size = self.config.max_position_embeddings
        if positions > table_size:
            raise ValueError(
                "The generation does not fit the table of learned positions: found "
                f"{positions} positions to look up, of the prompt and all new tokens but the "
                f"last, expected at most max_position_embeddings ({table_size}). "
                f"Lower max_new_tokens by {positions - table_size}, or shorten the prompt."
            )

    def _get_candidate_generator(self, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """Return what makes drafts: with `use_mtp`, the model's own heads.

        Raises:
            `ValueError`: `use_mtp` asks for heads that the model does not have here.
        """
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(  # type: ignore[misc]
                generation_config=generation_config, **kwargs
            )
        self.model.check_heads()
        return MTTCandidateGenerator(self, generation_config, kwargs.get("logits_processor"))
