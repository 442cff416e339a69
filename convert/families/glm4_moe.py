"""`Glm4MoeForCausalLM`: GLM-4.5 and later: experts as in DeepSeek-V3, attention as in a llama.

Biases are on queries, keys and values alone, and a part of each head is rotated.
"""

from __future__ import annotations

from functools import partial

from .deepseek_v3 import (
    ROUTED,
    ROUTED_DEFAULTS,
    ROUTED_FIXED,
    ROUTED_IGNORED,
    ROUTED_LIMITS,
    ROUTED_NEUTRAL,
)
from .family import Family
from .fields import Opposite, Rope, Same
from .further_tokens import FurtherTokens, as_stored, copies, numbered_rules
from .llama import ACTIVATION, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import EXPERTS
from .stacked import unstacked

FAMILY = Family(
    name="glm4_moe",
    causal_lm="Glm4MoeForCausalLM",
    base_model="Glm4MoeModel",
    prefix="model.",
    rules=numbered_rules,
    respell=partial(unstacked, names=EXPERTS),
    copies=copies,
    as_stored=as_stored,
    fields=(
        *SIZES,
        *ROUTED,
        FurtherTokens(),
        ACTIVATION,
        Same("rms_norm_eps", "layernorm_epsilon"),
        Rope(partial=True, percent=0.5),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_bias", "add_qkv_bias"),
        Same("use_qk_norm", "qk_layernorm"),
        Same("attention_dropout", "attention_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={**FIXED, **ROUTED_FIXED, "add_bias_linear": False},
    defaults={
        **DEFAULTS,
        **ROUTED_DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    neutral={**ROUTED_NEUTRAL, "mlp_bias": NO_BIASES["mlp_bias"]},
    ignored=ROUTED_IGNORED,
    limits=ROUTED_LIMITS,
)
