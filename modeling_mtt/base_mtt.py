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
"""What every MTT model has: initial values, attention implementations, parallelism."""

from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .attention_mtt import available_implementation
from .configuration_mtt import MTTConfig
from .layers_mtt import MTTAttention, MTTDecoderLayer
from .mla_mtt import MTTLatentAttention
from .moe_mtt import MTTExperts, MTTRouter
from .norms_mtt import MTTZeroCenteredLayerNorm, MTTZeroCenteredRMSNorm
from .parallel_mtt import (
    check_combination,
    check_parallel_sizes,
    cut_stage,
    gather_stages,
    parallel_plan,
)


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
        "hidden_states": OutputRecorder(MTTDecoderLayer, layer_name="layers"),
        "attentions": [
            OutputRecorder(kind, index=1, layer_name="layers")
            for kind in (MTTAttention, MTTLatentAttention)
        ],
        "router_logits": OutputRecorder(MTTRouter, index=0),
    }
    # Heads that a configuration without them leaves out.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)mtp\.layers\."]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if getattr(config, "use_expert_bias", False):
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MTTZeroCenteredLayerNorm | MTTZeroCenteredRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, MTTRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MTTExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=self.config.initializer_range)

    def look_up(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
    ) -> Any:
        """Return the token embeddings, of which exactly one form is given.

        Raises:
            `ValueError`: both or neither are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(
                f"You must specify exactly one of {prefix}input_ids or {prefix}inputs_embeds, "
                f"got {given}"
            )
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    # transformers looks for the experts in the file of the model.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return hasattr(cls.config_class, "num_experts")

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
            if given.tp_plan == {}:
                plan = {}
            elif isinstance(given.tp_plan, dict):
                plan |= given.tp_plan
            distributed_config = copy(given)
            distributed_config.tp_plan = parallel_plan(plan, model.config, given)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        # Caches are sized by the plan, and know the styles of transformers only.
        model._tp_plan, model.config.distributed_config = plan, given
        for module in model.modules():
            if isinstance(module, MTTAttention | MTTLatentAttention):
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
