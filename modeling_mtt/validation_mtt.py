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
"""Which values of an `MTTConfig` go together."""

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# What belongs to a mixture of experts, and to multi-latent attention, with the value of a model
# that has none.
EXPERT_FIELDS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": None,
    "mlp_layer_types": None,
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": False,
    "n_group": None,
    "topk_group": None,
    "shared_expert_intermediate_size": None,
    "use_shared_expert_gate": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
LATENT_FIELDS: dict[str, Any] = {
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
}


def check_architecture(config: Any) -> None:
    """Check what no single field shows.

    Args:
        config (`MTTConfig`): with every field filled in.

    Raises:
        `ValueError`: names the fields that contradict each other.
    """
    check_sizes(config, "num_hidden_layers")
    _check_latents(config)
    check_positions(config)
    _check_layers(config)
    _check_residuals(config)
    _check_experts(config)
    _check_heads(config)


def check_sizes(config: Any, *numbers_of_layers: str) -> None:
    """Check what every configuration has: sizes, probabilities, factors, and how heads divide."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        *numbers_of_layers,
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1.")
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} ({getattr(config, name)}) is a probability, between 0 and 1.")
    for name in (
        "norm_eps",
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    ):
        value = getattr(config, name, None)
        if value is not None and value <= 0:
            raise ValueError(f"{name} ({value}) must be greater than 0.")

    if config.head_dim is None:
        raise ValueError(
            f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads "
            f"({config.num_attention_heads}): set head_dim."
        )
    if config.head_dim < 1:
        raise ValueError(f"head_dim ({config.head_dim}) must be at least 1.")
    if not divides(config.num_key_value_heads, config.num_attention_heads):
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})."
        )


def check_positions(config: Any) -> None:
    """Check that rotations are described where heads are rotated, and nowhere else."""
    kind = config.position_embedding_type
    if kind == "rope":
        check_rotated_part(config)
    elif hasattr(config, "rope_parameters"):
        raise ValueError(
            f"rope_parameters ({config.rope_parameters}) go with position_embedding_type 'rope', "
            f"not '{kind}': drop them or set the type."
        )
    elif config.rope_interleave:
        raise ValueError(
            f"rope_interleave goes with position_embedding_type 'rope', not '{kind}': drop it "
            "or set the type."
        )
    if kind == "alibi" and config.sliding_window is not None:
        raise ValueError(
            f"sliding_window ({config.sliding_window}) and position_embedding_type 'alibi' do "
            "not go together: drop one of them."
        )


def check_rotated_part(config: Any) -> None:
    """Check the part of a head that `rope_parameters` turn, of any configuration with them."""
    assert config.rope_parameters is not None
    latent = getattr(config, "kv_lora_rank", None) is not None
    name = "qk_rope_head_dim" if latent else "head_dim"
    width = getattr(config, name)
    rope_type = config.rope_parameters.get("rope_type")
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"rope_type ({rope_type}) of rope_parameters must be one of "
            f"{['default', *ROPE_INIT_FUNCTIONS]}."
        )
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if not 0 < factor <= 1:
        raise ValueError(f"partial_rotary_factor ({factor}) must be in (0, 1].")
    # One frequency turns two values, so that an odd part is rounded up.
    rotated = 2 * ((int(width * factor) + 1) // 2)
    if not 0 < rotated <= width:
        raise ValueError(
            f"{name} ({width}) times partial_rotary_factor ({factor}) makes "
            f"{rotated} values to rotate: expected 2 to {width}."
        )


def _check_layers(config: Any) -> None:
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"sliding_window ({config.sliding_window}) must be at least 1.")
    if config.layer_types is None:
        return
    types = config.layer_types
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"layer_types has {unknown}: expected 'full_attention' and 'sliding_attention'."
        )
    if len(types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(types)} entries: expected one for each of "
            f"num_hidden_layers ({config.num_hidden_layers})."
        )
    if ("sliding_attention" in types) != (config.sliding_window is not None):
        raise ValueError(
            f"sliding_window ({config.sliding_window}) and layer_types ({types}) do not agree: "
            "layers that slide need a window, and a window needs layers that slide."
        )


def _check_residuals(config: Any) -> None:
    if config.shared_layernorm and not config.use_parallel_residual:
        raise ValueError(
            "shared_layernorm goes with use_parallel_residual: one norm cannot feed attention "
            "and an MLP that comes after it."
        )
    if config.use_parallel_residual and config.apply_residual_connection_post_layernorm:
        raise ValueError(
            "use_parallel_residual and apply_residual_connection_post_layernorm do not go "
            "together: drop one of them."
        )


def _check_fields_alone(config: Any, owner: str, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} ({getattr(config, name)}) goes with {owner}: set that, or drop {name}."
            )


def _check_latents(config: Any) -> None:
    if config.kv_lora_rank is None:
        _check_fields_alone(config, "kv_lora_rank", LATENT_FIELDS)
        return
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in sizes if config.q_lora_rank is None else (*sizes, "q_lora_rank"):
        value = getattr(config, name)
        if value is None or value < 1:
            raise ValueError(
                f"{name} ({value}) must be at least 1 with multi-latent attention, which "
                "kv_lora_rank asks for."
            )
    if config.head_dim != config.qk_head_dim:
        raise ValueError(
            f"head_dim ({config.head_dim}) must be qk_nope_head_dim ({config.qk_nope_head_dim}) "
            f"and qk_rope_head_dim ({config.qk_rope_head_dim}) together: drop it."
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads ({config.num_key_value_heads}) must be num_attention_heads "
            f"({config.num_attention_heads}) with kv_lora_rank: every query head has keys and "
            "values of its own. Drop it."
        )
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"kv_lora_rank goes with position_embedding_type 'rope', not "
            f"'{config.position_embedding_type}': a part of each key is rotated."
        )
    if config.sliding_window is not None:
        raise ValueError(
            f"sliding_window ({config.sliding_window}) and kv_lora_rank do not go together: drop "
            "one of them."
        )
    if config.attention_bias:
        raise ValueError(
            "attention_bias and kv_lora_rank do not go together: projections to and from latents "
            "have no bias. Set attention_bias to False."
        )


def _check_experts(config: Any) -> None:
    if config.num_experts is None:
        _check_fields_alone(config, "num_experts", EXPERT_FIELDS)
        return
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1.")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok ({config.num_experts_per_tok}) is more than num_experts "
            f"({config.num_experts})."
        )
    for name in ("routed_scaling_factor", "shared_expert_intermediate_size"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} ({value}) must be greater than 0.")
    if config.router_aux_loss_coef < 0:
        raise ValueError(
            f"router_aux_loss_coef ({config.router_aux_loss_coef}) must not be less than 0."
        )
    types = config.types_of_mlps()
    unknown = sorted(set(types) - {"dense", "sparse"})
    if unknown:
        raise ValueError(f"mlp_layer_types has {unknown}: expected 'dense' and 'sparse'.")
    if len(types) != config.num_hidden_layers:
        raise ValueError(
            f"mlp_layer_types has {len(types)} entries: expected one for each of "
            f"num_hidden_layers ({config.num_hidden_layers})."
        )
    if config.scoring_func == "softmax" and config.use_expert_bias:
        raise ValueError("use_expert_bias goes with scoring_func 'sigmoid', not 'softmax'.")
    if (
        config.scoring_func == "sigmoid"
        and config.norm_topk_prob
        and config.num_experts_per_tok == 1
    ):
        raise ValueError(
            "norm_topk_prob would make the weight of a token's only expert 1, whatever its sigmoid "
            "says: set norm_topk_prob to False, or num_experts_per_tok to more than 1."
        )
    if config.use_shared_expert_gate and config.shared_expert_intermediate_size is None:
        raise ValueError("use_shared_expert_gate goes with shared_expert_intermediate_size.")
    if config.mlp_bias and config.shared_expert_intermediate_size is not None:
        raise ValueError(
            "mlp_bias and shared_expert_intermediate_size do not go together: shared experts have "
            "no bias. Set mlp_bias to False."
        )
    _check_groups(config)


def _check_groups(config: Any) -> None:
    num_groups, chosen = config.n_group, config.topk_group
    if (num_groups is None) != (chosen is None):
        raise ValueError(f"n_group ({num_groups}) and topk_group ({chosen}) need each other.")
    if num_groups is None:
        return
    if not divides(num_groups, config.num_experts):
        raise ValueError(
            f"num_experts ({config.num_experts}) is not a multiple of n_group ({num_groups})."
        )
    if not 1 <= chosen <= num_groups:
        raise ValueError(f"topk_group ({chosen}) must be between 1 and n_group ({num_groups}).")
    per_token, per_group = config.num_experts_per_tok, config.num_experts // num_groups
    if not chosen <= per_token <= chosen * per_group:
        raise ValueError(
            f"num_experts_per_tok ({per_token}) must be between topk_group ({chosen}) and the "
            f"{chosen * per_group} experts of so many groups."
        )


def _check_heads(config: Any) -> None:
    if config.num_nextn_predict_layers < 0:
        raise ValueError(
            f"num_nextn_predict_layers ({config.num_nextn_predict_layers}) must not be less than 0."
        )
    if config.num_nextn_predict_layers and len(set(config.types_of_layers())) > 1:
        raise ValueError(
            "num_nextn_predict_layers goes with layers of one type: layer_types does not say what "
            "a layer after the last one sees."
        )


def divides(divisor: int | None, number: int) -> bool:
    """Return whether a count can be split into so many equal parts."""
    return divisor is not None and divisor > 0 and number % divisor == 0
