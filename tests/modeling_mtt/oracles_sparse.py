"""Models of transformers with experts or latents, for `oracles.py`."""

from __future__ import annotations

from typing import Any

from tests.modeling_mtt.oracle import LLAMA, Oracle, Tensors

_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_GROUPED: dict[str, Any] = {
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_LATENTS: dict[str, Any] = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}


def from_mixtral(tensors: Tensors) -> Tensors:
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}


def from_qwen2_moe(tensors: Tensors) -> Tensors:
    return {name.replace("shared_expert.", "shared_experts."): t for name, t in tensors.items()}


def _deepseek(option: str, **changes: Any) -> Oracle:
    """DeepSeek-V3, whose latent norms have an epsilon of 1e-6 whatever its configuration says."""
    rope = changes.pop("rope_parameters", {"rope_theta": 10000.0})
    interleave = changes.pop("rope_interleave", True)
    config = {
        **_LATENTS,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": None,
        "rope_interleave": interleave,
        "rope_parameters": dict(rope),
        **changes,
    }
    options = {
        **LLAMA,
        **_LATENTS,
        "q_lora_rank": config["q_lora_rank"],
        "norm_eps": 1e-6,
        "use_qk_norm": True,
        "rope_interleave": interleave,
        "rope_parameters": dict(rope),
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "mlp_layer_types": _DENSE_FIRST,
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": config["routed_scaling_factor"],
        "shared_expert_intermediate_size": 40,
    }
    length = 24 if "factor" in rope else 12
    return Oracle(option, "DeepseekV3ForCausalLM", config, options, prompt_length=length)


SPARSE_ORACLES: tuple[Oracle, ...] = (
    Oracle(
        "num_experts, num_experts_per_tok",
        "MixtralForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 3, **_GROUPED},
        {**LLAMA, "num_experts": 8, "num_experts_per_tok": 3, **_GROUPED},
        from_mixtral,
    ),
    Oracle(
        "use_shared_expert_gate, norm_topk_prob false, mlp_layer_types",
        "Qwen2MoeForCausalLM",
        {
            **_EXPERTS,
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [0],
        },
        {
            **LLAMA,
            **_EXPERTS,
            "norm_eps": 1e-6,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "shared_expert_intermediate_size": 28,
            "use_shared_expert_gate": True,
            "norm_topk_prob": False,
            "mlp_layer_types": _DENSE_FIRST,
        },
        from_qwen2_moe,
    ),
    *(
        Oracle(
            f"moe_intermediate_size, norm_topk_prob {str(norm).lower()}, use_qk_norm",
            "Qwen3MoeForCausalLM",
            {**_EXPERTS, "num_key_value_heads": 2, "head_dim": 12, "norm_topk_prob": norm},
            {
                **LLAMA,
                **_EXPERTS,
                "norm_eps": 1e-6,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "use_qk_norm": True,
                "norm_topk_prob": norm,
            },
        )
        for norm in (True, False)
    ),
    Oracle(
        "scoring_func sigmoid, use_expert_bias, shared_expert_intermediate_size",
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {
            **LLAMA,
            **_EXPERTS,
            "mlp_layer_types": _DENSE_FIRST,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "scoring_func": "sigmoid",
            "use_expert_bias": True,
            "routed_scaling_factor": 1.5,
            "shared_expert_intermediate_size": 20,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    _deepseek("kv_lora_rank, n_group, topk_group"),
    _deepseek("q_lora_rank", q_lora_rank=16),
    _deepseek("kv_lora_rank without rope_interleave", rope_interleave=False),
    _deepseek("kv_lora_rank, rope_type yarn, mscale", rope_parameters=_YARN, q_lora_rank=16),
)
