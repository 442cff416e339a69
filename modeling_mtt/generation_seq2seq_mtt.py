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
"""What `generate` needs to know of an MTT encoder-decoder."""

from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from .generation_mtt import MTTGenerationMixin


class MTTSeq2SeqGenerationMixin(MTTGenerationMixin):
    """What generation with an encoder-decoder has besides: masks are the decoder's."""

    def _create_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        mask: torch.Tensor | None = self.model.decoder.create_mask(
            inputs_embeds, attention_mask, past_key_values.self_attention_cache
        )
        return mask

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which has no place for an encoder's states.

        Raises:
            `ValueError`: always.
        """
        raise ValueError(
            "An encoder-decoder does not run with continuous batching, whose cache has no place "
            "for the encoder's states: use generate() in place of generate_batch()."
        )

    def _check_table(
        self, max_cache_length: int, attention_mask: torch.Tensor | None, compiles: bool
    ) -> None:
        # The mask is that of the text to read. What is not compiled may end before the table does.
        table_size = self.config.max_position_embeddings
        if compiles and max_cache_length > table_size:
            raise ValueError(
                "The generation does not fit the table of learned positions: found "
                f"{max_cache_length} positions to look up, of all new tokens but the last, "
                f"expected at most max_position_embeddings ({table_size}). "
                f"Lower max_new_tokens by {max_cache_length - table_size}."
            )
