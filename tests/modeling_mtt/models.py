"""What tells the tiny models of `conftest.py` apart, by name."""

from __future__ import annotations

from typing import Any

# The three shapes that differ most, what Megatron-Turing NLG is, what Llama is, and Nemotron; then
# what none of them has.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "nemotron": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "hidden_act": "relu2",
        "zero_centered_norm": True,
        "use_qk_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "bloom": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "position_embedding_type": "alibi",
        "embedding_norm": True,
        "apply_residual_connection_post_layernorm": True,
    },
    "falcon": {
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "position_embedding_type": "rope",
        "rope_interleave": True,
        "use_parallel_residual": True,
        "shared_layernorm": True,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    "qwen2": {
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "attention_out_bias": False,
        "mlp_bias": False,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}
# Experts with biases and without gates, with gates and a shared expert, and with latents; then
# heads that predict further tokens.
PRESETS |= {
    "switch": {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "mixtral": {
        **PRESETS["llama"],
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "use_shared_expert_gate": True,
    },
    "deepseek": {
        **PRESETS["llama"],
        "num_key_value_heads": None,
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "use_qk_norm": True,
        "rope_interleave": True,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "shared_expert_intermediate_size": 24,
    },
    "mtp": {**PRESETS["llama"], "num_nextn_predict_layers": 2},
}
SHAPES = ("gpt", "llama", "nemotron")
