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
"""What every encoder-decoder has beside what every model has: attention, parallelism, saving."""

from typing import Any

from .attention_mtt import check_bias
from .base_mtt import MTTPreTrainedModel
from .configuration_seq2seq_mtt import MTTSeq2SeqConfig


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
        if self.config.position_embedding_type == "relative":
            check_bias(chosen, "Relative positions add")
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
