"""`modeling_mtt`: the class that computes every Megatron GPT, and more."""

from __future__ import annotations

from functools import partial

from ..architecture import Architecture
from ..argument_tables import Neutral
from .expert_fields import (
    Groups,
    LatentHeads,
    Only,
    RouterScores,
    ScoreFactor,
    SparseLayers,
)
from .family import Family
from .fields import Choice, Field, LayerWindows, Opposite, Rope, Same, Vocabulary, head_size
from .names import decoder_rules


def _has_experts(a: Architecture) -> bool:
    return a.num_experts is not None


def _is_latent(a: Architecture) -> bool:
    return a.multi_latent_attention


# What is said of a decoder and of an encoder-decoder alike: widths, what a layer is, training.
WIDTHS: tuple[Field, ...] = (
    Vocabulary(),
    Same("hidden_size", "hidden_size"),
    Same("intermediate_size", "ffn_hidden_size"),
)
LAYERS: tuple[Field, ...] = (
    Same("num_attention_heads", "num_attention_heads"),
    Same("num_key_value_heads", "num_query_groups", lambda c: c.get("num_attention_heads")),
    Same("head_dim", "kv_channels", head_size),
    Choice(
        "hidden_act",
        "activation",
        {
            "gelu": "gelu",
            "gelu_pytorch_tanh": "gelu_tanh",
            "silu": "silu",
            "relu2": "squared_relu",
        },
    ),
    Same("gated_mlp", "gated_linear_unit"),
    Choice("norm_type", "normalization", {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}),
    Same("norm_eps", "layernorm_epsilon"),
    Same("zero_centered_norm", "layernorm_zero_centered_gamma"),
)
TRAINING: tuple[Field, ...] = (
    Same("attention_dropout", "attention_dropout"),
    Same("hidden_dropout", "hidden_dropout"),
    Same("initializer_range", "init_method_std"),
)
EXPERTS = Only(
    "num_experts",
    _has_experts,
    (
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "moe_router_topk"),
        Same("moe_intermediate_size", "moe_ffn_hidden_size", lambda c: c.get("intermediate_size")),
        SparseLayers(),
        RouterScores(),
        ScoreFactor(),
        Same("use_expert_bias", "moe_router_enable_expert_bias"),
        Groups(),
        Same("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        Same("use_shared_expert_gate", "moe_shared_expert_gate"),
    ),
)
LATENT_ATTENTION = Only(
    "kv_lora_rank",
    _is_latent,
    (
        LatentHeads(),
        Same("kv_lora_rank", "kv_lora_rank"),
        Same("q_lora_rank", "q_lora_rank"),
        Same("qk_nope_head_dim", "qk_head_dim"),
        Same("qk_rope_head_dim", "qk_pos_emb_head_dim"),
        Same("v_head_dim", "v_head_dim"),
    ),
)
FURTHER_TOKENS = Only(
    "num_nextn_predict_layers",
    lambda a: a.mtp_num_layers > 0,
    (Same("num_nextn_predict_layers", "mtp_num_layers"),),
)
FAMILY = Family(
    name="mtt",
    causal_lm="MTTForCausalLM",
    base_model="MTTModel",
    prefix="model.",
    auto_map={
        "AutoConfig": "configuration_mtt.MTTConfig",
        "AutoModel": "modeling_mtt.MTTModel",
        "AutoModelForCausalLM": "modeling_mtt.MTTForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_mtt.MTTForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_mtt.MTTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mtt.MTTForTokenClassification",
    },
    code="modeling_mtt",
    rules=partial(decoder_rules, mtp=True),
    fields=(
        *WIDTHS,
        Same("num_hidden_layers", "num_layers"),
        *LAYERS,
        Choice(
            "position_embedding_type",
            "position_embedding_type",
            {"learned": "learned_absolute", "rope": "rope", "alibi": "alibi", "none": "none"},
        ),
        Same("max_position_embeddings", "max_position_embeddings"),
        Rope(partial=True, optional=True, interleaved="rope_interleave", yarn=True),
        LayerWindows(),
        Choice(
            ("attention_bias", "attention_out_bias", "mlp_bias"),
            ("add_qkv_bias", "add_bias_linear"),
            {
                (False, False, False): (False, False),
                (True, False, False): (True, False),
                (True, True, True): (True, True),
            },
        ),
        Same("use_qk_norm", "qk_layernorm"),
        Same("use_parallel_residual", "parallel_residual"),
        Same("shared_layernorm", "shared_layernorm"),
        Same("embedding_norm", "embedding_norm"),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        *TRAINING,
        EXPERTS,
        LATENT_ATTENTION,
        FURTHER_TOKENS,
    ),
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "gated_mlp": False,
        "norm_type": "layernorm",
        "norm_eps": 1e-5,
        "zero_centered_norm": False,
        "position_embedding_type": "learned",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "use_qk_norm": False,
        "use_parallel_residual": False,
        "shared_layernorm": False,
        "embedding_norm": False,
        "rope_interleave": False,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": False,
        "use_shared_expert_gate": False,
    },
    ignored=("router_aux_loss_coef", "output_router_logits"),
    neutral={
        "apply_residual_connection_post_layernorm": Neutral(
            "residuals taken after the norm", (False,)
        ),
        "embedding_multiplier": Neutral("embeddings multiplied by a number", (1.0, 1)),
        "residual_multiplier": Neutral("residuals multiplied by a number", (1.0, 1)),
        "attention_multiplier": Neutral("attention scores scaled by another number", (None,)),
        "logits_scaling": Neutral("logits divided by a number", (1.0, 1)),
    },
)
